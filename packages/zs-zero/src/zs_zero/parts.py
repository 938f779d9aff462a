"""Parts of tensors as a checkpoint sees them: zs-ckpt's `TensorSpec`, `Piece` and `LazyPiece`, met without an import.

A flat buffer is cut anywhere, a checkpoint knows boxes: `parts_of` turns one into the other. Values that are not in
memory are moved by a `Source`, a range at a time: `lazy_parts_of`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Box = tuple[tuple[int, int], ...]  # (start, stop) for each dim
PROTOCOL = 1  # of zs-ckpt's Shardable


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """The elements `box` of a tensor, in row-major order in `data`; see zs-ckpt for `replica` and `scope`."""

    spec: TensorSpec
    box: Box
    data: Tensor
    replica: int = 0
    replicas: int = 1
    scope: str = ""


class Source(Protocol):
    """Values of a tensor that are not in memory, by their places in the flattened tensor.

    A save loads, a load stores, in the thread that called it: in ascending ranges that leave nothing out, from one end
    of a piece to the other. What comes next is most often next to what came last.
    """

    def load(self, start: int, into: Tensor) -> None:
        """Fill `into`, (n,), in host memory and of the spec's dtype, with the elements from `start` on."""

    def store(self, start: int, values: Tensor) -> None:
        """Take `values`, (n,), in host memory and of the spec's dtype, as the elements from `start` on."""


@dataclass(frozen=True)
class LazyPiece:
    """The elements `box` of a tensor, which `source` moves: it counts those of the box, in row-major order."""

    spec: TensorSpec
    box: Box
    source: Source
    replica: int = 0
    replicas: int = 1
    scope: str = ""


@dataclass(frozen=True)
class _From:
    """`source`, counted from its element `first` on."""

    source: Source
    first: int

    def load(self, start: int, into: Tensor) -> None:
        self.source.load(self.first + start, into)

    def store(self, start: int, values: Tensor) -> None:
        self.source.store(self.first + start, values)


def whole_box(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements `[start, stop)` of the flattened tensor as boxes, whose elements follow one another in their order."""
    inner = [prod(shape[dim + 1 :]) for dim in range(len(shape))]  # elements in one step along each dim
    if not shape and start < stop:
        yield ()
    while shape and start < stop:
        # the outermost dim along which at least one whole step begins here
        dim = next(d for d, step in enumerate(inner) if start % step == 0 and stop - start >= step)
        place = [start // step % size for step, size in zip(inner, shape, strict=True)]
        steps = min((stop - start) // inner[dim], shape[dim] - place[dim])
        yield (
            *((at, at + 1) for at in place[:dim]),
            (place[dim], place[dim] + steps),
            *whole_box(shape[dim + 1 :]),
        )
        start += steps * inner[dim]


def parts_of(spec: TensorSpec, start: int, values: Tensor, *, replica: int = 0, replicas: int = 1) -> Iterator[Piece]:
    """Pieces for `values`, (n,): the elements `[start, start + n)` of the tensor `spec`."""
    low = 0
    for box in boxes_of_range(spec.shape, start, start + values.numel()):
        high = low + prod(b - a for a, b in box)
        yield Piece(spec, box, values[low:high], replica, replicas)
        low = high


def lazy_parts_of(
    spec: TensorSpec, start: int, stop: int, source: Source, *, replica: int = 0, replicas: int = 1
) -> Iterator[LazyPiece]:
    """Pieces for the elements `[start, stop)` of the tensor `spec`; `source` counts the elements of all of it."""
    for box in boxes_of_range(spec.shape, start, stop):
        yield LazyPiece(spec, box, _From(source, start), replica, replicas)
        start += prod(b - a for a, b in box)


def whole_part(spec: TensorSpec, data: Tensor, *, replica: int = 0, replicas: int = 1, scope: str = "") -> Piece:
    """One piece with all of a tensor (also of one without elements)."""
    return Piece(spec, whole_box(spec.shape), data, replica, replicas, scope)
