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
    whole: bool = False  # its optimizer needs it in one piece: one slice's rank updates all of it
    wire: torch.dtype | None = None  # of its gradient on the way; None: as all others
    rows: bool = False  # few rows of its gradient are not 0, and only those travel

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
    def rows(self) -> bool:
        """Whether only those rows of gradients travel that some rank touched."""
        return self.entries[0].spec.rows

    @property
    def wire(self) -> torch.dtype | None:
        """The dtype of gradients on the way, where it is not that of all others."""
        return self.entries[0].spec.wire

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

    @property
    def owners(self) -> dict[str, int]:
        """{name of each parameter that is updated whole: the slice whose rank does it}.

        The largest first, each to the slice with the fewest elements so far: no slice gets more than the mean and the
        largest parameter together.
        """
        whole = [e.spec for flat in self.flats() if flat.trainable for e in flat.entries if e.spec.whole]
        loads = [0] * self.slices
        owners = {}
        for spec in sorted(whole, key=lambda spec: -spec.numel):
            owner = loads.index(min(loads))
            loads[owner] += spec.numel
            owners[spec.name] = owner
        return owners

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


@dataclass(frozen=True)
class Move:
    """A piece on its way from the slice that stores it to the one whose rank updates its parameter whole."""

    flat: int  # position in `Plan.flats()`
    piece: Piece
    source: int
    owner: int
    at: int  # place in the message from `source` to `owner`


def moves_of(plan: Plan) -> list[Move]:
    """All pieces of the parameters that are updated whole. Messages are packed: pieces follow one another in order."""
    owners, ends = plan.owners, dict[tuple[int, int], int]()
    moves = []
    for number, flat in enumerate(plan.flats()):
        if not any(entry.spec.name in owners for entry in flat.entries):
            continue
        for source in range(plan.slices):
            for piece in flat.pieces(source):
                owner = owners.get(flat.entries[piece.index].spec.name)
                if owner is not None:
                    at = ends.get((source, owner), 0)
                    ends[source, owner] = at + piece.numel
                    moves.append(Move(number, piece, source, owner, at))
    return moves


def plan_flat(specs: Sequence[ParamSpec], *, slices: int) -> FlatPlan:
    """Lays parameters of one kind (dtype, trainability, dtype of the gradient's way) out in one flat buffer.

    Raises:
        ValueError: for no parameter, or for parameters of different kinds.
    """
    if not specs or len({_kind(spec) for spec in specs}) != 1:
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
        kinds = dict.fromkeys(_kind(spec) for spec in specs)
        parts = [p for kind in kinds for p in _apart([s for s in specs if _kind(s) == kind])]
        planned.append(UnitPlan(name, tuple(modules), tuple(plan_flat(part, slices=slices) for part in parts)))
    return Plan(tuple(planned), slices)


def _kind(spec: ParamSpec) -> tuple[torch.dtype, bool, torch.dtype | None, bool]:
    return spec.dtype, spec.trainable, spec.wire, spec.rows


def _apart(specs: list[ParamSpec]) -> list[list[ParamSpec]]:
    """A large parameter that is most of its unit has a buffer of its own: its gradient is that buffer, uncopied."""
    largest = max(specs, key=lambda spec: spec.numel)
    rest = [spec for spec in specs if spec is not largest]
    if rest and largest.numel >= LARGE_NUMEL and largest.numel > sum(spec.numel for spec in rest):
        return [[largest], rest]
    return [specs]


def _round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
