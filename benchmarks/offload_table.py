"""What the `offload` benchmark found, as tables: systems, floors, and the ratios that are held to a goal.

T_cpu   the step in memory: forward, backward and the optimizer, nothing moved
T_io    bytes of the step over the disk's mixed rate in the same round
floor   max(T_cpu, T_io): no step with these bytes is shorter
overlap efficiency   (T_cpu + T_io - T_step) / (T_cpu + T_io - floor): 1 at the floor, 0 where nothing overlaps
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import tables
from launch import Outcome, Record
from offload_systems import describe

FLOOR_GOAL, OVERLAP_GOAL, CPU_GOAL, MEMORY_GOAL, DEEPSPEED_GOAL = 1.15, 0.85, 1.10, 1.05, 0.70


class Rounds:
    """The records of one dtype, round by round."""

    def __init__(self, dtype: str, systems: Sequence[str], no_disk: str) -> None:
        self.dtype, self.systems, self.no_disk = dtype, systems, no_disk
        self.rates: list[dict[str, list[float]]] = []
        self.records: list[dict[str, Record]] = []
        self.errors: dict[str, str] = {}

    def begin(self, rates: dict[str, list[float]]) -> None:
        self.rates.append(rates)
        self.records.append({})

    def add(self, system: str, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.errors.setdefault(system, outcome.error)
        else:
            self.records[-1][system] = outcome.records[0]

    @property
    def in_memory(self) -> str:
        """The step without offload that computes the same numbers."""
        return "torch-masters" if self.dtype == "bf16" and "torch-masters" in self.systems else "torch"

    def of(self, system: str, value: Callable[[Record], float]) -> list[float]:
        return [value(records[system]) for records in self.records if system in records]

    def ratios(self, system: str, reference: str, value: Callable[[Record], float]) -> list[float]:
        both = [records for records in self.records if system in records and reference in records]
        return [value(records[system]) / value(records[reference]) for records in both if value(records[reference])]

    def floors(self, system: str, disk: str) -> list[tuple[float, float, float]]:
        """(T_step, T_cpu, T_io) of each round that has all three."""
        found = []
        for rates, records in zip(self.rates, self.records, strict=True):
            if system in records and self.in_memory in records and rates.get(disk):
                mine, rate = records[system], median(rates[disk]) * 1e9
                found.append((step_s(mine), step_s(records[self.in_memory]), moved_nbytes(mine) / rate))
        return found


def step_s(record: Record) -> float:
    return float(median(record["step_s"]))


def peak_nbytes(record: Record) -> float:
    return float(max(record["peak_nbytes"], record["init_peak_nbytes"]))


def moved_nbytes(record: Record) -> float:
    """By the system's own count where it has one; else what the kernel saw."""
    report = record["report"]
    if report:
        return float(sum(report["read"].values()) + sum(report["written"].values()))
    return float(record["read_nbytes"] + record["written_nbytes"])


def render(rounds: Rounds) -> tuple[str, bool]:
    """The text of one dtype, and whether every goal is met."""
    goals, met = _goals(rounds)
    parts = [f"## {rounds.dtype}", _systems(rounds), goals]
    rates = [rate for found in rounds.rates for rate in found.get("fio", [])]
    engine = [rate for found in rounds.rates for rate in found.get("engine", [])]
    if rates:
        parts.append(
            f"Half read, half written, GB/s: fio {tables.spread(rates, 2)}, engine {tables.spread(engine, 2)}."
        )
    if rounds.no_disk:
        parts.append(f"No floor of the disk: {rounds.no_disk}.")
    parts += [f"{system} failed: `{error}`" for system, error in rounds.errors.items()]
    return "\n\n".join(parts), met and not rounds.errors and not rounds.no_disk


def _systems(rounds: Rounds) -> str:
    reference = rounds.in_memory
    header = ["system", "step s", "x in memory", "peak MB", "x in memory", "MB a step: planned", "read", "written"]
    header += ["stall s", "overlap", "init s", "loss, most off"]
    rows = []
    for system in rounds.systems:
        records = [found[system] for found in rounds.records if system in found]
        if not records:
            continue
        report = records[-1]["report"]
        planned = sum(report["expected_read"].values()) + sum(report["expected_written"].values()) if report else 0
        row = [describe(system), tables.spread([s for record in records for s in record["step_s"]])]
        row += [tables.spread(rounds.ratios(system, reference, step_s), 2)]
        row += [tables.spread(rounds.of(system, peak_nbytes), 0, 1e-6)]
        row += [tables.spread(rounds.ratios(system, reference, peak_nbytes), 2)]
        row += [tables.megabytes(planned) if report else "-"]
        row += [
            tables.megabytes(median(record[key] for record in records)) for key in ("read_nbytes", "written_nbytes")
        ]
        row += [tables.spread([record["report"][key] for record in records], 2) if report else "-" for key in _OWN]
        row += [tables.spread([record["init_s"] for record in records], 1), _parity(rounds, system, reference)]
        rows.append(row)
    note = f'"In memory" is {describe(reference)}; the peak is that of resident memory above the imports.'
    return f"{tables.table(header, rows)}\n\n{note}"


_OWN = ("stall_s", "overlap")  # of the system's own report
_KERNEL = ("read_nbytes", "written_nbytes")  # what the kernel counts as storage traffic of this process


def _goals(rounds: Rounds) -> tuple[str, bool]:
    rows: list[list[str]] = []
    missed = False

    def hold(name: str, values: list[float], goal: float, *, least: bool = False, binding: bool = True) -> None:
        nonlocal missed
        if not values:
            return
        middle = median(values)
        met = middle >= goal if least else middle <= goal
        missed = missed or (binding and not met)
        verdict = ("met" if met else "MISSED") if binding else "-"
        rows.append([name, f"{'>=' if least else '<='} {goal:.2f}", tables.spread(values, 3), verdict])

    for system in rounds.systems:
        if not system.startswith("zs"):
            continue
        if "nvme" in system:
            for disk, binding in (("fio", True), ("engine", False)):
                found = rounds.floors(system, disk)
                steps = [step / max(cpu, io) for step, cpu, io in found]
                overlaps = [(cpu + io - step) / min(cpu, io) for step, cpu, io in found if min(cpu, io) > 0]
                side = f"{system}, disk by {disk}"
                hold(f"step / max(T_cpu, T_io): {side}", steps, FLOOR_GOAL, binding=binding)
                hold(f"overlap efficiency: {side}", overlaps, OVERLAP_GOAL, least=True, binding=binding)
        if system.endswith("-cpu"):
            for reference in dict.fromkeys((rounds.in_memory, "torch", f"zs{system[2]}")):
                binding = reference == rounds.in_memory
                times, peaks = (rounds.ratios(system, reference, key) for key in (step_s, peak_nbytes))
                hold(f"step: {system} / {reference}", times, CPU_GOAL, binding=binding)
                hold(f"peak memory: {system} / {reference}", peaks, MEMORY_GOAL, binding=binding)
        peer = system.replace("zs", "ds")
        if peer in rounds.systems and "-" in system:
            hold(f"step: {system} / {peer}", rounds.ratios(system, peer, step_s), DEEPSPEED_GOAL)
    return tables.table(["ratio", "goal", "measured", ""], rows) if rows else "", not missed


def _parity(rounds: Rounds, system: str, reference: str) -> str:
    for records in rounds.records:
        if system in records and reference in records:
            pairs = zip(records[system]["losses"], records[reference]["losses"], strict=True)
            return f"{max(abs(one - other) for one, other in pairs):.1e}"
    return "-"
