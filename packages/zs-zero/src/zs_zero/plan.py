"""Who owns which elements: a pure function of names, shapes, dtypes, units and the number of slices.

No tensor and no process group in here, so the plan is the same on every rank and can be computed offline, by a
checkpoint or a memory estimator. ZeRO (Rajbhandari et al., 2020), section 5, with one addition: a *unit* is the set of
parameters that are gathered and reduced together, and each unit has one flat buffer per dtype and trainability.

    unit 0                        unit 1
    |w w w w w w w b b p p p|     |w w w ...      p = padding, never read
    |slice 0|slice 1|slice 2|     a slice is what one rank owns (its shard)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

# Each parameter and each slice starts on a cache line. Vector kernels then see the alignment they see in plain torch
# (the bits of a matrix product can depend on it), and a cut falls on a multiple of 16 elements of its parameter:
# torch's fused optimizers round differently in the last numel % 16 elements, so elsewhere a piece would differ from
# the whole.
ALIGN_NBYTES = 64
LARGE_NUMEL = 1 << 16


@dataclass(frozen=True)
class ParamSpec:
    """One parameter as the plan sees it. `name` is its first qualified name in the model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """A parameter's place in its flat buffer: elements `[offset, offset + spec.numel)`."""

    spec: ParamSpec
    offset: int

    @property
    def stop(self) -> int:
        return self.offset + self.spec.numel


@dataclass(frozen=True)
class Piece:
    """The part of one parameter inside one slice: `param[start:stop]` (flattened) is `shard[shard_start:...]`."""

    index: int  # position of the entry in its flat
    start: int
    stop: int
    shard_start: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def shard_stop(self) -> int:
        return self.shard_start + self.numel


@dataclass(frozen=True)
class FlatPlan:
    """One flat buffer of a unit: its parameters in order, cut into `slices` equal slices of `shard_numel` elements."""

    dtype: torch.dtype
    trainable: bool
    entries: tuple[Entry, ...]
    slices: int
    shard_numel: int

    @property
    def padded_numel(self) -> int:
        return self.shard_numel * self.slices

    @property
    def numel(self) -> int:
        """Elements that belong to parameters (without padding)."""
        return sum(entry.spec.numel for entry in self.entries)

    def pieces(self, slice_index: int) -> list[Piece]:
        """The pieces of slice `slice_index`, in order; parameters outside the slice have none."""
        low, high = slice_index * self.shard_numel, (slice_index + 1) * self.shard_numel
        found = []
        for index, entry in enumerate(self.entries):
            start, stop = max(entry.offset, low), min(entry.stop, high)
            if start < stop:
                found.append(Piece(index, start - entry.offset, stop - entry.offset, start - low))
        return found


@dataclass(frozen=True)
class UnitPlan:
    """Parameters gathered and reduced together. `modules` are the modules whose forward needs them."""

    name: str
    modules: tuple[str, ...]
    flats: tuple[FlatPlan, ...]

    @property
    def numel(self) -> int:
        return sum(flat.numel for flat in self.flats)


@dataclass(frozen=True)
class Plan:
    """The whole model: units in the order of the model's definition.

    Printing it shows one line per unit: its modules, parameters, elements and padding.
    """

    units: tuple[UnitPlan, ...]
    slices: int

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)

    @property
    def padded_numel(self) -> int:
        return sum(flat.padded_numel for flat in self.flats())

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are not trained."""
        return frozenset(e.spec.name for flat in self.flats() if not flat.trainable for e in flat.entries)

    def flats(self) -> Iterator[FlatPlan]:
        for unit in self.units:
            yield from unit.flats

    def __str__(self) -> str:
        padding = self.padded_numel / self.numel - 1 if self.numel else 0.0
        lines = [f"{len(self.units)} units, {self.numel:,} parameters, {self.slices} slices, padding {padding:.2%}"]
        for unit in self.units:
            flats = ", ".join(
                f"{len(flat.entries)} x {str(flat.dtype).removeprefix('torch.')}{'' if flat.trainable else ' frozen'}"
                for flat in unit.flats
            )
            lines.append(f"  {unit.name or '(root)':<32} {unit.numel:>14,}  {flats}")
        return "\n".join(lines)


def plan_flat(specs: Sequence[ParamSpec], *, slices: int) -> FlatPlan:
    """Lays parameters of one dtype and trainability out in one flat buffer.

    Raises:
        ValueError: for no parameter, or for parameters of different dtype or trainability.
    """
    if not specs or len({(spec.dtype, spec.trainable) for spec in specs}) != 1:
        raise ValueError("a flat buffer holds at least one parameter, all of one dtype and trainability")
    align = ALIGN_NBYTES // specs[0].dtype.itemsize
    entries, offset = [], 0
    for spec in specs:
        entries.append(Entry(spec, offset))
        offset += _round_up(spec.numel, align)
    shard_numel = _round_up(-(-entries[-1].stop // slices), align) if entries[-1].stop else align
    return FlatPlan(specs[0].dtype, specs[0].trainable, tuple(entries), slices, shard_numel)


def make_plan(units: Sequence[tuple[str, Sequence[str], Sequence[ParamSpec]]], *, slices: int) -> Plan:
    """The plan for `units`, each (name, modules, parameters); every parameter belongs to exactly one unit.

    Raises:
        ValueError: when a parameter is in two units.
    """
    seen: set[str] = set()
    planned = []
    for name, modules, specs in units:
        for spec in specs:
            if spec.name in seen:
                raise ValueError(f"parameter {spec.name!r} is in two units")
            seen.add(spec.name)
        kinds = dict.fromkeys((spec.dtype, spec.trainable) for spec in specs)
        parts = [p for kind in kinds for p in _apart([s for s in specs if (s.dtype, s.trainable) == kind])]
        planned.append(UnitPlan(name, tuple(modules), tuple(plan_flat(part, slices=slices) for part in parts)))
    return Plan(tuple(planned), slices)


def _apart(specs: list[ParamSpec]) -> list[list[ParamSpec]]:
    """A large parameter that is most of its unit has a buffer of its own: its gradient is that buffer, uncopied."""
    largest = max(specs, key=lambda spec: spec.numel)
    rest = [spec for spec in specs if spec is not largest]
    if rest and largest.numel >= LARGE_NUMEL and largest.numel > sum(spec.numel for spec in rest):
        return [[largest], rest]
    return [specs]


def _round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
