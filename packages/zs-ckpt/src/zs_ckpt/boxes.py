"""Boxes: axis-aligned parts of a tensor, as `((start, stop), ...)`, one pair for each dim. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor of `shape`."""
    return tuple((0, size) for size in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def numel(box: Box) -> int:
    return prod(shape_of(box))


def intersect(a: Box, b: Box) -> Box | None:
    """The common part; None where there is none (an empty one counts as none)."""
    common = tuple((max(low, start), min(high, stop)) for (low, high), (start, stop) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements `[start, stop)` of the flattened tensor as boxes, in order: at most `2 * len(shape) - 1` of them.

    The boxes' elements, one box after the other, each in row-major order, are the range's elements in their order.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"elements [{start}, {stop}) of a tensor of shape {tuple(shape)}")
    if start == stop:
        return
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:  # inside one row
        for rest in boxes_of_range(shape[1:], start - first * inner, stop - first * inner):
            yield ((first, first + 1), *rest)
        return
    low = first if start == first * inner else first + 1
    high = last + 1 if stop == (last + 1) * inner else last
    if low > first:
        for rest in boxes_of_range(shape[1:], start - first * inner, inner):
            yield ((first, first + 1), *rest)
    if low < high:
        yield ((low, high), *whole(shape[1:]))
    if high <= last:
        for rest in boxes_of_range(shape[1:], 0, stop - last * inner):
            yield ((last, last + 1), *rest)
