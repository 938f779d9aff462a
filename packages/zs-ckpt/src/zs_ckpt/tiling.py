"""Do these boxes make up the whole: no hole, no overlap?"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .boxes import Box, intersect, numel

_MOST_TANGLED = 2048  # boxes that no cut along a dim separates, which are compared pair by pair


def tiling_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str:
    """Why `boxes` do not tile a tensor of `shape`; empty where they do.

    Boxes with no element are allowed where the tensor has none. The time is that of sorting for what a partition of
    ranges, rows or a grid gives.
    """
    for box in boxes:
        if len(box) != len(shape):
            return f"a box has {len(box)} dims and the tensor {len(shape)}"
        for (start, stop), size in zip(box, shape, strict=True):
            if not 0 <= start <= stop <= size:
                return f"the box {box} is not inside the shape {tuple(shape)}"
    whole = prod(shape)
    if whole == 0:
        return ""
    if any(numel(box) == 0 for box in boxes):
        return "a box has no element"
    overlap = _overlap(list(boxes))
    if overlap:
        return overlap
    held = sum(numel(box) for box in boxes)
    return f"the boxes hold {held} of {whole} elements" if held != whole else ""


def _overlap(boxes: list[Box]) -> str:
    """Two boxes with an element in common, in words. Cuts the set apart along one dim after the other."""
    work = [boxes]
    while work:
        group = work.pop()
        if len(group) < 2:
            continue
        for dim in range(len(group[0])):
            parts = _cut(group, dim)
            if len(parts) > 1:
                work.extend(parts)
                break
        else:
            found = _pairwise(group)
            if found:
                return found
    return ""


def _cut(group: list[Box], dim: int) -> list[list[Box]]:
    """The group in parts whose intervals along `dim` have nothing in common."""
    ordered = sorted(group, key=lambda box: box[dim])
    parts, reach = [[ordered[0]]], ordered[0][dim][1]
    for box in ordered[1:]:
        start, stop = box[dim]
        if start >= reach:
            parts.append([])
        parts[-1].append(box)
        reach = max(reach, stop)
    return parts


def _pairwise(group: list[Box]) -> str:
    if len(group) > _MOST_TANGLED:
        return f"{len(group)} boxes overlap one another along every dim"
    for index, box in enumerate(group):
        for other in group[:index]:
            if not box or intersect(box, other) is not None:
                return f"the boxes {other} and {box} overlap"
    return ""
