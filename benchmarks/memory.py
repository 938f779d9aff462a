"""`memory`: bytes per parameter that a rank holds between steps and at the worst moment of one, against the formulas.

With AdamW, W ranks, c bytes per parameter (4 or 2) and m bytes of optimizer state (8; with fp32 masters 12):

    stage    held             the peak of a step adds
    0        c + m            the gradient, c
    1        c + m / W        the gradient, c
    2        c + m / W        its shard, c / W, and two units of it
    3        (c + m) / W      its shard, c / W, two units of it, and two whole units of parameters

The peak is counted from the allocator's own events, less what the activations of the same forward take in plain torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import probes
import tables
import torch
from launch import Record, launch, say
from torch.profiler import record_function
from workload import ADAMW, DTYPES, SIZES, Workload

STEPS = 3  # the state exists after the first; the last is measured


@dataclass(frozen=True)
class Task:
    """One stage in one dtype."""

    stage: int
    size: str
    dtype: str


def held_formula(stage: int, ranks: int, dtype: str) -> float:
    """Bytes per parameter between steps."""
    c, m = _state(dtype)
    return [c + m, c + m / ranks, c + m / ranks, (c + m) / ranks][stage]


def peak_formula(stage: int, ranks: int, dtype: str, unit: float) -> float:
    """Bytes per parameter at the worst moment; `unit` is the largest unit's share of the parameters."""
    c, _ = _state(dtype)
    extra = [c, c, c / ranks + 2 * unit * c, c / ranks + 4 * unit * c][stage]
    return held_formula(stage, ranks, dtype) + extra


def worker(task: dict[str, Any]) -> Record:
    """One rank: the activations of plain torch, then a sharded model from its first tensor on."""
    import zs_comm
    import zs_zero

    todo = Task(**task)
    group = zs_comm.init_distributed()
    workload = Workload("zsz", todo.size, todo.dtype, micro_batch=1)
    activations = activation_nbytes(workload)
    before = probes.held_nbytes()
    with probes.trace_allocations() as trace:
        model = workload.model()
        numel = sum(p.numel() for p in model.parameters())
        largest = max(sum(p.numel() for p in part.parameters()) for part in model.parts())
        adamw = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
        half = torch.bfloat16 if todo.dtype == "bf16" else None
        optimizer = zs_zero.shard(model, adamw, stage=todo.stage, dtype=half)
        for index in range(STEPS):
            ids, targets = workload.batch(index, group.rank)
            with record_function(f"step {index}"):
                model(ids, targets).backward()
                optimizer.step()
                optimizer.zero_grad()
        del ids, targets
        held = probes.held_nbytes() - before
    return {
        "numel": numel,
        "unit": largest / numel,
        "held": held,
        "peak": trace.peak(f"step {STEPS - 1}"),
        "activations": activations,
    }


def activation_nbytes(workload: Workload) -> int:
    """The most that a forward takes in plain torch beside the parameters."""
    with probes.trace_allocations() as trace:
        model = workload.model().to(workload.torch_dtype)
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        with record_function("forward"):
            loss = model(*workload.batch(0, 0))
        del loss
    return trace.peak("forward") - parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="short", choices=SIZES)
    parser.add_argument("--dtype", default="fp32,bf16", help="one or both, separated by a comma")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks, separated by commas")
    parser.add_argument("--name", default="memory")


def main(args: argparse.Namespace) -> int:
    rows, failed = [], False
    machine = probes.hardware()
    for dtype in args.dtype.split(","):
        for ranks in map(int, args.worlds.split(",")):
            for stage in map(int, args.stages.split(",")):
                outcome = launch("memory", Task(stage, args.size, dtype), ranks=ranks)
                say(f"{dtype}, {ranks} ranks, stage {stage}: {outcome.error or 'done'}")
                failed = failed or outcome.error is not None
                cells = [outcome.error] if outcome.error is not None else _cells(outcome.records, stage, dtype)
                rows.append([dtype, ranks, stage, *cells])
    header = ["dtype", "ranks", "stage", "held", "formula", "held / formula"]
    header += ["peak", "activations", "peak formula", "(peak - activations) / formula"]
    text = f"""# Bytes per parameter and rank

{machine}.

The GPT of size "{args.size}", one sequence per rank, AdamW; the rank that holds most. Held: live tensors between \
steps. Peak: the allocator's events in the third step.

{tables.table(header, rows)}
"""
    print(text)
    say(f"written: {tables.save(args.name, text)}")
    return 1 if failed else 0


def _cells(records: list[Record], stage: int, dtype: str) -> list[str]:
    numel, unit = records[0]["numel"], records[0]["unit"]
    held, peak, activations = (max(r[key] for r in records) / numel for key in ("held", "peak", "activations"))
    held_most, peak_most = held_formula(stage, len(records), dtype), peak_formula(stage, len(records), dtype, unit)
    cells = [held, held_most, held / held_most, peak, activations, peak_most, (peak - activations) / peak_most]
    return [f"{cell:.3f}" for cell in cells]


def _state(dtype: str) -> tuple[int, int]:
    """(bytes of a parameter and of its gradient, bytes of its optimizer state with the master copy if there is one)."""
    return DTYPES[dtype].itemsize, 8 if dtype == "fp32" else 12
