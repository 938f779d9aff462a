"""Parts of tensors as a checkpoint sees them: the fields of zs-ckpt's `TensorSpec` and `Piece`, met without an import.

A flat buffer is cut anywhere, a checkpoint knows boxes: `parts_of` turns one into the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

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


def whole_part(spec: TensorSpec, data: Tensor, *, replica: int = 0, replicas: int = 1, scope: str = "") -> Piece:
    """One piece with all of a tensor (also of one without elements)."""
    return Piece(spec, whole_box(spec.shape), data, replica, replicas, scope)
