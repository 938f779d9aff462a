"""`train`: a training step of each system, interleaved A B C A B C in fresh processes, as ratios per round."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import probes
import tables
import torch
from launch import Outcome, Record, launch, say
from systems import DESCRIPTIONS, SYSTEMS, data, package_of
from workload import SIZES, Workload

CPU_SYSTEMS = "compute,ddp,fsdp2,ds1,ds2,ds3,zs0,zs1,zs2,zs3,collectives,collectives3,optimizer"
CUDA_SYSTEMS = "torch,compute,fsdp2,zs0,zs1,zs2,zs3"
REFERENCES = ("ddp", "fsdp2", "ds3", "torch", "compute")
FLOORS = ("compute", "compute-autocast", "collectives", "collectives3", "optimizer")

# The ratios that two gloo ranks on CPU are held to: (system, reference) -> at most.
TARGETS = {
    "fp32": {("zs1", "ddp"): 1.03, ("zs2", "ddp"): 1.03, ("zs3", "fsdp2"): 0.86, ("zs3", "ds3"): 0.80},
    "bf16": {("zs1", "ddp"): 0.88, ("zs2", "ddp"): 0.92, ("zs3", "fsdp2"): 0.80, ("zs3", "ds3"): 0.66},
}


class Rounds:
    """The records of one dtype: system -> round -> the ranks' records."""

    def __init__(self, systems: Sequence[str]) -> None:
        self.records: dict[str, dict[int, list[Record]]] = {system: {} for system in systems}
        self.errors: dict[str, str] = {}

    def add(self, system: str, round_: int, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.errors.setdefault(system, outcome.error)
        else:
            self.records[system][round_] = outcome.records

    def measured(self) -> list[str]:
        return [system for system, rounds in self.records.items() if rounds]

    def every(self, system: str, key: str) -> list[Any]:
        """One value per rank and round."""
        return [record[key] for ranks in self.records[system].values() for record in ranks]

    def step_seconds(self, system: str) -> list[float]:
        return [seconds for record in self.every(system, "step_s") for seconds in record]

    def round_median(self, system: str, round_: int) -> float:
        return median(s for record in self.records[system][round_] for s in record["step_s"])

    def ratios(self, system: str, reference: str) -> list[float]:
        """Per round, so that what disturbs a whole round disturbs both sides of the ratio."""
        rounds = self.records[system].keys() & self.records.get(reference, {}).keys()
        return [self.round_median(system, r) / self.round_median(reference, r) for r in sorted(rounds)]

    def losses(self, system: str) -> list[float]:
        """The first round's, averaged over the ranks; empty where nothing is learned."""
        ranks = next(iter(self.records[system].values()))
        return [sum(step) / len(ranks) for step in zip(*(record["losses"] for record in ranks), strict=True)]


def worker(task: dict[str, Any]) -> Record:
    """One rank of one system in one round."""
    workload = Workload(**task)
    if workload.device == "cuda":
        torch.cuda.set_device(0)
    resident = probes.resident_nbytes()
    probes.reset_resident_peak()
    began = time.perf_counter()
    step = SYSTEMS[workload.system](workload)
    init_s = time.perf_counter() - began

    seconds: list[float] = []
    losses: list[torch.Tensor] = []
    carried = 0
    for index, (ids, targets) in enumerate(data(workload, probes.rank())):
        if index == workload.warmup:
            probes.barrier()
            carried = probes.loopback_nbytes()
        if index == workload.warmup + workload.steps:
            break
        probes.synchronize(workload.device)
        began = time.perf_counter()
        loss = step(ids, targets)
        probes.synchronize(workload.device)
        if index >= workload.warmup:
            seconds.append(time.perf_counter() - began)
        if loss is not None:
            losses.append(loss)
    probes.barrier()
    carried = probes.loopback_nbytes() - carried
    peak = probes.resident_nbytes("VmHWM") - resident
    return {
        "step_s": seconds,
        "init_s": init_s,
        "losses": [float(loss) for loss in losses],
        "held_nbytes": probes.held_nbytes(workload.device),
        "peak_nbytes": torch.cuda.max_memory_allocated() if workload.device == "cuda" else peak,
        "loopback_nbytes": carried / workload.steps,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", help=f"of {', '.join(SYSTEMS)} (default: {CPU_SYSTEMS}; on cuda {CUDA_SYSTEMS})")
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--dtype", default="fp32,bf16", help="one or both, separated by a comma")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ranks", type=int, help="default: 2 on cpu, 1 on cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences per rank")
    parser.add_argument("--deepspeed-python", default=sys.executable, help="an interpreter that has DeepSpeed")
    parser.add_argument("--name", help="of the file in benchmarks/results (default: train_<device>)")


def main(args: argparse.Namespace) -> int:
    ranks = args.ranks or (1 if args.device == "cuda" else 2)
    systems = (args.systems or (CUDA_SYSTEMS if args.device == "cuda" else CPU_SYSTEMS)).split(",")
    unknown = [system for system in systems if system not in SYSTEMS]
    if unknown:
        raise SystemExit(f"unknown system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    machine = probes.hardware(args.device)
    pythons = {s: args.deepspeed_python if s.startswith("ds") else sys.executable for s in systems}
    absent = {s: package for s in systems if (package := package_of(s)) and not _has(package, pythons[s])}
    present = [system for system in systems if system not in absent]

    sections, failed = [], False
    for dtype in args.dtype.split(","):
        rounds = Rounds(present)
        workload = Workload("", args.size, dtype, args.micro_batch, args.steps, args.warmup, args.device)
        for round_ in range(args.rounds):
            for system in present:
                outcome = launch("train", replace(workload, system=system), ranks=ranks, python=pythons[system])
                rounds.add(system, round_, outcome)
                middle = outcome.error or f"{rounds.round_median(system, round_):.3f} s a step"
                say(f"{dtype} round {round_ + 1}/{args.rounds}  {system:16} {middle}")
        text = render(rounds, dtype, on_cpu=args.device == "cpu")
        if args.device == "cpu" and args.size == "base" and ranks == 2:  # what the targets are about
            text += _against_targets(rounds, dtype)
        sections.append(text)
        failed = failed or bool(rounds.errors)

    config = SIZES[args.size]
    text = f"""# Training step, {args.device}, {ranks} rank{"s" if ranks > 1 else ""}

{machine}.

A GPT of {config.layers} layers, width {config.width}, vocabulary {config.vocab}; {args.micro_batch} sequences of \
{config.context} tokens per rank and step; AdamW; gradient_clipping 0.0; one thread per rank. Every system runs \
{args.rounds} times, in turn, each time in fresh processes: {args.warmup} steps to warm up, {args.steps} measured. \
Figures are medians (least-most): seconds over all steps, ratios over the rounds.

"""
    if absent:
        text += "Not installed here: " + ", ".join(f"{s} ({package})" for s, package in absent.items()) + ".\n\n"
    text += "\n\n".join(sections)
    print(text)
    say(f"written: {tables.save(args.name or f'train_{args.device}', text)}")
    return 1 if failed else 0


def render(rounds: Rounds, dtype: str, *, on_cpu: bool) -> str:
    """The tables of one dtype."""
    measured = rounds.measured()
    references = [reference for reference in REFERENCES if reference in measured]
    anchor = next((r for r in ("ddp", "torch", "fsdp2") if r in measured), None)
    header = ["system", "step s", *(f"x {reference}" for reference in references)]
    header += ["held MB", "peak growth MB" if on_cpu else "peak MB", "loopback MB a step", "init s"]
    header += [f"loss, most off {anchor}"]
    rows = []
    for system in measured:
        row = [DESCRIPTIONS[system], tables.spread(rounds.step_seconds(system))]
        row += [tables.spread(rounds.ratios(system, r), 2) if r != system else "1" for r in references]
        row += [tables.spread(rounds.every(system, "held_nbytes"), 0, 1e-6)]
        row += [tables.spread(rounds.every(system, "peak_nbytes"), 0, 1e-6)]
        row += [tables.megabytes(median(rounds.every(system, "loopback_nbytes"))) if on_cpu else "-"]
        row += [tables.spread(rounds.every(system, "init_s"), 1)]
        row += [_parity(rounds, system, anchor) if anchor and system not in FLOORS else "-"]
        rows.append(row)
    text = f"## {dtype}\n\n{tables.table(header, rows)}"
    if on_cpu:
        text += _against_floor(rounds)
    for system, error in rounds.errors.items():
        text += f"\n\n{system} failed: `{error}`"
    return text


def _against_floor(rounds: Rounds) -> str:
    """What a step costs above compute, and the sum of its parts when nothing overlaps."""
    measured = rounds.measured()
    rows = []
    for system in measured:
        parts = ["compute", "collectives3" if system.endswith("3") or system == "fsdp2" else "collectives", "optimizer"]
        if system in FLOORS or any(part not in measured for part in parts):
            continue
        excess = [rounds.round_median(system, r) - rounds.round_median("compute", r) for r in _common(rounds, system)]
        floor = sum(median(rounds.step_seconds(part)) for part in parts)
        whole = median(rounds.step_seconds(system))
        rows.append([DESCRIPTIONS[system], tables.spread(excess, 0, 1e3), f"{floor:.3f}", f"{whole / floor:.2f}"])
    header = ["system", "ms above compute", "compute + collectives + optimizer, s", "x that sum"]
    return f"\n\n{tables.table(header, rows)}" if rows else ""


def _against_targets(rounds: Rounds, dtype: str) -> str:
    rows = []
    for (system, reference), most in TARGETS[dtype].items():
        ratios = rounds.ratios(system, reference) if system in rounds.records else []
        if ratios:
            verdict = "met" if median(ratios) <= most else "missed"
            rows.append([f"{system} / {reference}", f"{most:.2f}", tables.spread(ratios, 3), verdict])
    return f"\n\n{tables.table(['ratio', 'target', 'measured', ''], rows)}" if rows else ""


def _parity(rounds: Rounds, system: str, anchor: str) -> str:
    """The largest difference between two systems' losses at the same step."""
    pairs = zip(rounds.losses(system), rounds.losses(anchor), strict=True)
    return f"{max(abs(one - other) for one, other in pairs):.1e}"


def _common(rounds: Rounds, system: str) -> list[int]:
    return sorted(rounds.records[system].keys() & rounds.records["compute"].keys())


def _has(package: str, python: str) -> bool:
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", probe], check=False).returncode == 0
