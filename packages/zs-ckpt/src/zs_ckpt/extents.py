"""Which bytes of a stored piece a box needs, in reads of whole extents, and how they get to their place.

Every byte that is used is verified: where a box needs a part of an extent, all of it is read. A read goes straight into
the target where the extents lie there as they lie in the file, and through a buffer otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from zs_comm.views import bytes_of

from .boxes import Box, boxes_of_range, intersect, numel, shape_of
from .errors import CheckpointCorrupt
from .manifest import StoredPiece, StoredTensor
from .shardable import TensorSpec
from .shardfile import entry_name, extent_seed

MOST_READ = 8 << 20  # bytes of one read, and so of a buffer


@dataclass(frozen=True)
class Target:
    """Where a box of a stored tensor goes: `data` holds the box's elements in row-major order."""

    stored: StoredTensor
    box: Box
    data: Tensor
    rank: int | None = None  # whose tensor it is, where it is one rank's own

    @property
    def spec(self) -> TensorSpec:
        return self.stored.spec


@dataclass(frozen=True)
class Read:
    """`nbytes` from `offset` on in a piece: whole extents. `into`: the target's own memory, where it goes there."""

    target: Target
    piece: StoredPiece
    offset: int
    nbytes: int
    into: memoryview | None = None

    def verify(self, data: memoryview, path: Path) -> None:
        """Raise CheckpointCorrupt unless every extent in `data` has its checksum."""
        entry = entry_name(self.target.spec, self.piece.box, self.target.rank)
        step = self.piece.extent_nbytes
        for start in range(0, self.nbytes, step):
            offset = self.offset + start
            found = zlib.crc32(data[start : min(start + step, self.nbytes)], extent_seed(entry, offset))
            expected = self.piece.crc(offset // step)
            if found != expected:
                raise CheckpointCorrupt(
                    f"bytes {offset} to {min(offset + step, self.piece.nbytes)} of the piece at "
                    f"{self.piece.offset}: the checksum is {found:08x}, and {expected:08x} was written",
                    path,
                    self.target.spec.name,
                )

    def place(self, buffer: Tensor) -> None:
        """Copy what the target needs of the bytes in `buffer`, cast to its dtype."""
        target, piece = self.target, self.piece
        size = target.spec.dtype.itemsize
        flat = buffer[: self.nbytes].view(target.spec.dtype)
        whole = target.data.detach().view(shape_of(target.box))
        first, done = self.offset // size, 0
        for part in boxes_of_range(shape_of(piece.box), first, first + flat.numel()):
            box = _moved(part, piece.box)
            source = flat[done : done + numel(part)].view(shape_of(part))
            done += numel(part)
            common = intersect(box, target.box)
            if common is not None:
                whole[_slices(common, target.box)].copy_(source[_slices(common, box)])


def reads_of(target: Target) -> Iterator[Read]:
    """What has to be read for `target`."""
    for piece in target.stored.pieces:
        common = intersect(piece.box, target.box)
        if common is not None:
            yield from _reads_of_piece(target, piece, common)


def reads_into(target: Target, piece: StoredPiece, offset: int, view: memoryview) -> Iterator[Read]:
    """What has to be read to have a piece's bytes from `offset` on, where an extent begins, in `view`.

    It ends where an extent does. Of `target` only the tensor matters.
    """
    most = _most(piece.extent_nbytes)
    for start in range(0, view.nbytes, most):
        nbytes = min(most, view.nbytes - start)
        yield Read(target, piece, offset + start, nbytes, view[start : start + nbytes])


def _reads_of_piece(target: Target, piece: StoredPiece, common: Box) -> Iterator[Read]:
    size, step = target.spec.dtype.itemsize, piece.extent_nbytes
    start, stop = _span(common, piece.box)
    solid = stop - start == numel(common)  # one run of bytes in the piece
    start, stop = start * size, stop * size
    first, last = start // step, -(-stop // step)
    direct = _direct(target, common, start) if solid else None
    if direct is not None:
        view, at = direct
        inner, outer = -(-start // step), stop // step  # extents that are needed whole
        if stop == piece.nbytes:
            outer = last
        if inner < outer:
            low, high = inner * step, min(outer * step, piece.nbytes)
            yield from _runs(target, piece, first * step, low)
            for offset in range(low, high, _most(step)):
                nbytes = min(_most(step), high - offset)
                yield Read(target, piece, offset, nbytes, view[at + offset - start : at + offset - start + nbytes])
            yield from _runs(target, piece, high, min(last * step, piece.nbytes))
            return
    if solid:
        yield from _runs(target, piece, first * step, min(last * step, piece.nbytes))
        return
    begin: int | None = None
    for index in range(first, last + 1):
        needed = index < last and _needs(target, piece, index, size)
        if needed and begin is None:
            begin = index
        if not needed and begin is not None:
            yield from _runs(target, piece, begin * step, min(index * step, piece.nbytes))
            begin = None


def _runs(target: Target, piece: StoredPiece, start: int, stop: int) -> Iterator[Read]:
    most = _most(piece.extent_nbytes)
    for offset in range(start, stop, most):
        yield Read(target, piece, offset, min(most, stop - offset))


def _most(step: int) -> int:
    return max(MOST_READ // step, 1) * step


def _needs(target: Target, piece: StoredPiece, index: int, size: int) -> bool:
    start = index * piece.extent_nbytes // size
    stop = min((index + 1) * piece.extent_nbytes, piece.nbytes) // size
    parts = boxes_of_range(shape_of(piece.box), start, stop)
    return any(intersect(_moved(part, piece.box), target.box) is not None for part in parts)


def _direct(target: Target, common: Box, start: int) -> tuple[memoryview, int] | None:
    """The target's memory and the place in it of the first common byte, where it can be read into."""
    data = target.data
    if data.device.type != "cpu" or data.dtype != target.spec.dtype or not data.is_contiguous():
        return None
    low, high = _span(common, target.box)
    if high - low != numel(common):
        return None
    return bytes_of(data.detach()), low * data.dtype.itemsize


def _span(inner: Box, outer: Box) -> tuple[int, int]:
    """First and behind-last element of `inner` among those of `outer`, in row-major order."""
    first = last = 0
    for (start, stop), (low, high) in zip(inner, outer, strict=True):
        first = first * (high - low) + start - low
        last = last * (high - low) + stop - 1 - low
    return first, last + 1


def _moved(box: Box, within: Box) -> Box:
    return tuple((start + first, stop + first) for (start, stop), (first, _) in zip(box, within, strict=True))


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(inner, outer, strict=True))
