"""Whole tensors from DeepSpeed's flat partitions: masters and optimizer states by key and parameter, as views."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zs_comm import ConfigError

from .boxes import Box, boxes_of_range, numel
from .errors import CheckpointCorrupt, CheckpointIncomplete
from .names import name_problem
from .unpickler import read_pickled

Shapes = dict[str, tuple[int, ...]]  # of a group's parameters, in order
Place = tuple[str, int, int]  # a parameter, where a part of it starts in a rank's partition, and its elements


@dataclass(frozen=True)
class Whole:
    """A tensor in parts: one after the other they are its elements in row-major order."""

    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def tensor(self) -> Tensor:
        """The tensor: a view of the file where it is in one part there, else a copy."""
        return (self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)).view(self.shape)

    def pieces(self) -> Iterator[tuple[Box, Tensor]]:
        """The parts as boxes with their elements: no copy."""
        at = 0
        for part in self.parts:
            start = 0
            for box in boxes_of_range(self.shape, at, at + part.numel()):
                yield box, part.view(-1)[start : start + numel(box)]
                start += numel(box)
            at += part.numel()


def sharded(
    folder: Path, shapes: list[Shapes], ranks: list[dict[str, Any]], files: list[Path]
) -> tuple[dict[str, dict[str, Whole]], Any]:
    """Masters (`fp32`) and states by key and parameter, and the parameter groups, from every rank's partitions."""
    parts: dict[str, dict[str, list[Tensor]]] = {}
    scalars: dict[str, dict[str, Tensor]] = {}
    groups: Any = None
    reached = [0] * len(shapes)  # elements of each group in the ranks before
    for rank, (zero, file) in enumerate(zip(ranks, files, strict=True)):
        three = "fp32_flat_groups" in zero
        counts = zero.get("partition_count")
        world = max(counts, default=None) if isinstance(counts, list) else counts
        if isinstance(world, int) and world != len(ranks):
            raise CheckpointIncomplete(f"written by {world} ranks; files of {len(ranks)} are here", folder)
        masters = member(zero, "fp32_flat_groups" if three else "single_partition_of_fp32_groups", file)
        base = member(zero, "optimizer_state_dict" if three else "base_optimizer_state", file)
        if not isinstance(base, dict) or "param_groups" not in base:
            raise ConfigError(f"{file}: written in elastic mode, which has no parameter groups")
        groups = groups or base["param_groups"]
        if len(masters) != len(shapes):
            raise CheckpointCorrupt(f"{len(masters)} groups; the model's file has {len(shapes)}", file)
        for group, master in enumerate(masters):
            values = {"fp32": master, **base["state"].get(group, {})}
            if three:
                places = _equal_places(shapes[group], rank, len(ranks))
            else:
                paddings = (zero.get("param_alignment_paddings") or {group: None})[group]
                places = _places(shapes[group], paddings, reached[group], master.numel())
                reached[group] += master.numel()  # only what follows the last parameter is padding, and it is left out
            for name, start, count in places:
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.dim() == 1:
                        if start + count > value.numel():
                            raise CheckpointCorrupt(
                                f"{key} ends at {value.numel()}, before {start + count}", file, name
                            )
                        parts.setdefault(key, {}).setdefault(name, []).append(value[start : start + count])
                    elif isinstance(value, Tensor | int | float):
                        scalar = torch.as_tensor(value, dtype=torch.float32)
                        if scalar.numel() != 1 or not scalars.setdefault(key, {}).setdefault(name, scalar).equal(
                            scalar
                        ):
                            raise CheckpointCorrupt(
                                f"{key} differs from the other ranks': of another step?", file, name
                            )
    known = {name: shape for group in shapes for name, shape in group.items()}
    found = {
        key: {name: whole(known, name, pieces, folder) for name, pieces in named.items()}
        for key, named in parts.items()
    }
    if set(found["fp32"]) != set(known):
        missing = sorted(set(known) ^ set(found["fp32"]))
        raise CheckpointIncomplete("no rank has a part of it", folder, missing[0])
    found |= {key: {name: Whole((), (value,)) for name, value in named.items()} for key, named in scalars.items()}
    return found, groups


def _places(shapes: Mapping[str, tuple[int, ...]], paddings: Any, first: int, held: int) -> Iterator[Place]:
    """For stages 1 and 2: what of the group's elements `first` to `first + held` belongs to which parameter.

    By the order of `param_shapes`. `param_slice_mappings`, which says the same, is wrong with round-robin gradients.
    """
    start = 0
    for number, (name, shape) in enumerate(shapes.items()):
        total = math.prod(shape)
        low, high = max(start, first), min(start + total, first + held)
        if low < high:
            yield name, low - first, high - low
        start += total + (paddings[number] if paddings else 0)


def _equal_places(shapes: Mapping[str, tuple[int, ...]], rank: int, world: int) -> Iterator[Place]:
    """For stage 3: an equal part of each parameter, the last ones padded."""
    start = 0
    for name, shape in shapes.items():
        total = math.prod(shape)
        share = -(-total // world)
        yield name, start, max(0, min(share, total - rank * share))
        start += share


def universal(folder: Path, shapes: list[Shapes], optimizer: Mapping[str, Any]) -> dict[str, dict[str, Whole]]:
    """Masters and states from one folder for each parameter; the step from the optimizer's own state where need be."""
    found: dict[str, dict[str, Whole]] = {"fp32": {}}
    known = {name: shape for group in shapes for name, shape in group.items()}
    for name in known:
        if name_problem(name) or Path(name).name != name:
            raise CheckpointCorrupt(f"{name!r} names no folder", folder)
        if not (folder / "zero" / name / "fp32.pt").is_file():
            raise CheckpointIncomplete("this file is missing", folder / "zero" / name / "fp32.pt", name)
        for file in sorted((folder / "zero" / name).glob("*.pt")):
            value = read_pickled(file)
            value = value["param"] if isinstance(value, dict) and "param" in value else value
            if file.stem == "step":
                found.setdefault("step", {})[name] = Whole((), (torch.as_tensor(value, dtype=torch.float32),))
            elif isinstance(value, Tensor):
                found.setdefault(file.stem, {})[name] = whole(known, name, [value.reshape(-1)], file)
            else:
                raise CheckpointCorrupt(f"a {type(value).__name__} and no tensor", file, name)
    inner = (optimizer.get("optimizer_state_dict") or {}).get("state") or {}
    for index, group in enumerate(shapes):
        step = inner.get(index, {}).get("step")
        for name in group if step is not None and len(found) > 1 else ():
            steps = found.setdefault("step", {})
            steps.setdefault(name, Whole((), (torch.as_tensor(step, dtype=torch.float32),)))
    return found


def member(state: Mapping[str, Any], name: str, file: Path) -> Any:
    if name not in state:
        raise CheckpointCorrupt(f"{name!r} is missing from it", file)
    return state[name]


def whole(known: Mapping[str, tuple[int, ...]], name: str, parts: list[Tensor], where: Path) -> Whole:
    have, want = sum(part.numel() for part in parts), math.prod(known.get(name, ()))
    if name not in known or have != want or len({part.dtype for part in parts}) != 1:
        raise CheckpointCorrupt(f"{have} elements for the shape {known.get(name)}", where, name)
    kept = [part for part in parts if part.numel()] or parts[:1]
    return Whole(known[name], tuple(part.contiguous() for part in kept))
