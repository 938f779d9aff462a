"""Who holds which bytes of a growing file. Pure arithmetic: nothing here touches a disk.

Extents and holes begin and end at multiples of `alignment`; two holes never touch:

    |-- a --|-- free --|---- b ----|-- free --| end
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where new extents would go; nothing is taken until `Extents.take`."""

    offsets: list[int]
    end: int  # length of the file with them
    holes: list[tuple[int, int]]


class Extents:
    """Space of one file in bytes. Not thread-safe."""

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.end = 0
        self._holes: list[tuple[int, int]] = []  # (offset, nbytes), by offset

    @property
    def free_nbytes(self) -> int:
        """Bytes within the file that nobody holds."""
        return sum(nbytes for _, nbytes in self._holes)

    @property
    def holes(self) -> int:
        """Number of separate free ranges."""
        return len(self._holes)

    def padded(self, nbytes: int) -> int:
        """`nbytes` rounded up to whole alignments."""
        return -(-nbytes // self.alignment) * self.alignment

    def place(self, sizes: Iterable[int]) -> Placement:
        """Find room for extents of `sizes` bytes: the smallest hole that holds each, else the end of the file."""
        holes, end, offsets = list(self._holes), self.end, []
        for size in sizes:
            nbytes = self.padded(size)
            if nbytes == 0:
                offsets.append(0)
                continue
            index = min(
                (i for i, hole in enumerate(holes) if hole[1] >= nbytes), key=lambda i: holes[i][1], default=None
            )
            if index is not None:
                offset, room = holes.pop(index)
                if room > nbytes:
                    holes.insert(index, (offset + nbytes, room - nbytes))
            elif holes and sum(holes[-1]) == end:  # what is free at the end need not be allocated twice
                offset, _ = holes.pop()
                end = offset + nbytes
            else:
                offset, end = end, end + nbytes
            offsets.append(offset)
        return Placement(offsets, end, holes)

    def take(self, placement: Placement) -> None:
        """Make it so. `placement` must come from the latest `place`, with nothing given back in between."""
        self.end, self._holes = placement.end, placement.holes

    def give(self, offset: int, nbytes: int) -> None:
        """The extent of `nbytes` bytes at `offset` is free again; it joins the holes that it touches."""
        nbytes = self.padded(nbytes)
        if nbytes == 0:
            return
        index = bisect_left(self._holes, (offset, 0))
        if index < len(self._holes) and offset + nbytes == self._holes[index][0]:
            nbytes += self._holes.pop(index)[1]
        if index > 0 and sum(self._holes[index - 1]) == offset:
            index -= 1
            before, more = self._holes.pop(index)
            offset, nbytes = before, nbytes + more
        self._holes.insert(index, (offset, nbytes))
