"""Filling what is not in memory: the values of a place, a range at a time, through one buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from zs_comm.views import bytes_of

from .boxes import Box, boxes_of_range, numel, shape_of
from .extents import Target, reads_into
from .manifest import StoredPiece, StoredTensor
from .shardable import Source
from .snapshot import Snapshot

_MOST_NBYTES = 16 << 20  # of the buffer: at the ends of a range extents, of up to 4 MiB, are read for a part of them


@dataclass(frozen=True)
class LazyTarget:
    """Where a box of a stored tensor goes, as values of `dtype`: see `Target`, which has `data` for `source`."""

    stored: StoredTensor
    box: Box
    source: Source
    dtype: torch.dtype
    rank: int | None = None

    @property
    def nbytes(self) -> int:
        return numel(self.box) * self.dtype.itemsize


def store(snapshot: Snapshot, targets: Sequence[LazyTarget]) -> None:
    """Read every target's values, verified, and give them to its source: one target after the other, in order.

    Raises as `Snapshot.fill`, and what a source raises.
    """
    snapshot.open(piece.file for target in targets for piece in target.stored.pieces)
    memory = torch.empty(min(max((target.nbytes for target in targets), default=0), _MOST_NBYTES), dtype=torch.uint8)
    for target in targets:
        if not target.nbytes:
            continue
        piece = next((piece for piece in target.stored.pieces if piece.box == target.box), None)
        ranges = _of_boxes(snapshot, target, memory) if piece is None else _of_piece(snapshot, target, piece, memory)
        for start, values in ranges:
            target.source.store(start, values)


def _of_piece(
    snapshot: Snapshot, target: LazyTarget, piece: StoredPiece, memory: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """The values of a box that was saved as it is, in whole extents: nothing is read twice."""
    stored, step = target.stored.spec.dtype, piece.extent_nbytes
    most = max(_MOST_NBYTES * stored.itemsize // max(stored.itemsize, target.dtype.itemsize) // step, 1) * step
    nbytes = min(most, piece.nbytes)
    raw = memory[:nbytes] if nbytes <= memory.nbytes else torch.empty(nbytes, dtype=torch.uint8)
    for offset in range(0, piece.nbytes, most):
        part = raw[: min(most, piece.nbytes - offset)]
        whole = Target(target.stored, target.box, part, target.rank)
        snapshot.run(list(reads_into(whole, piece, offset, bytes_of(part))))
        yield offset // stored.itemsize, part.view(stored).to(target.dtype)


def _of_boxes(snapshot: Snapshot, target: LazyTarget, memory: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The values of a box that is in several pieces, or a part of one; in ranges of whole rows, where those fit."""
    shape, most = shape_of(target.box), memory.nbytes // target.dtype.itemsize
    rows = (prod(shape[dim:]) for dim in range(1, len(shape) + 1))
    row = next((count for count in rows if count <= most), 1)
    for start in range(0, numel(target.box), most // row * row):
        count = min(most // row * row, numel(target.box) - start)
        values = memory[: count * target.dtype.itemsize].view(target.dtype)
        snapshot.fill(list(_targets(target, start, values)))
        yield start, values


def _targets(target: LazyTarget, start: int, values: Tensor) -> Iterator[Target]:
    """The boxes of a range, each with its part of `values`."""
    done = 0
    for box in boxes_of_range(shape_of(target.box), start, start + values.numel()):
        moved = tuple((low + first, high + first) for (low, high), (first, _) in zip(box, target.box, strict=True))
        yield Target(target.stored, moved, values[done : done + numel(box)], target.rank)
        done += numel(box)
