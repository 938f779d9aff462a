"""`wire`: bytes that a rank sends in a step, by the collective log and by the kernel's counters, against the theory.

With N parameters of c bytes, W ranks and A backwards in a step, each rank sends (W - 1) / W x N c bytes times

    stage 0, 1    2        one reduction and one gather of everything, at the end of the window
    stage 2       A + 1    a reduce-scatter in each backward, one gather
    stage 3       3 A      a gather in each forward, another in each backward, a reduce-scatter

The last unit of a stage 3 forward is the first of its backward and may stay whole in between: then it is gathered once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import probes
import tables
import torch
from launch import Record, launch, say
from workload import ADAMW, DTYPES, SIZES, Workload

ACCUMULATIONS = (1, 4)


@dataclass(frozen=True)
class Task:
    """One stage with one length of the accumulation window."""

    stage: int
    accumulation: int
    size: str
    dtype: str
    steps: int
    warmup: int = 4  # ranks compare their calls in the first steps, which costs some bytes


def factor(stage: int, accumulation: int) -> int:
    """How many times the parameters travel in a step."""
    return {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[stage]


def worker(task: dict[str, Any]) -> Record:
    """One rank: warm up, then count over whole steps."""
    import zs_comm
    import zs_zero

    todo = Task(**task)
    group = zs_comm.init_distributed()
    workload = Workload("zsz", todo.size, todo.dtype, micro_batch=1)
    model = workload.model()
    numel = sum(p.numel() for p in model.parameters())
    kept = sum(p.numel() for p in model.parts()[-1].parameters())
    adamw = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    half = torch.bfloat16 if todo.dtype == "bf16" else None
    optimizer = zs_zero.shard(model, adamw, stage=todo.stage, dtype=half)
    log = zs_comm.CollectiveLog()

    def step(index: int) -> None:
        for micro in range(todo.accumulation):
            ids, targets = workload.batch(index * todo.accumulation + micro, group.rank)
            model(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    for index in range(todo.warmup):
        step(index)
    probes.barrier()
    carried = probes.loopback_nbytes()
    probes.barrier()
    optimizer.group.observers.add(log)
    for index in range(todo.steps):
        step(todo.warmup + index)
    probes.barrier()
    carried = probes.loopback_nbytes() - carried
    probes.barrier()
    return {
        "numel": numel,
        "kept_numel": kept,
        "logged": log.total_wire_nbytes / todo.steps,
        "carried": carried / todo.steps / group.size,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--dtype", default="fp32,bf16", help="one or both, separated by a comma")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--name", default="wire")


def main(args: argparse.Namespace) -> int:
    rows, failed = [], False
    machine = probes.hardware()
    for dtype in args.dtype.split(","):
        for stage in map(int, args.stages.split(",")):
            for accumulation in ACCUMULATIONS:
                outcome = launch("wire", Task(stage, accumulation, args.size, dtype, args.steps), ranks=args.ranks)
                name = [dtype, stage, accumulation]
                say(f"{dtype} stage {stage}, accumulation {accumulation}: {outcome.error or 'done'}")
                failed = failed or outcome.error is not None
                rows.append([*name, *(_cells(outcome.records, *name) if outcome.error is None else [outcome.error])])
    header = ["dtype", "stage", "backwards a step", "theory MB", "logged MB", "loopback MB"]
    header += ["logged / theory", "loopback / logged"]
    text = f"""# Bytes a rank sends in a step, {args.ranks} ranks

{machine}.

The GPT of size "{args.size}". Logged: what zs_comm's CollectiveLog counted, the rank that sent most. Loopback: what \
the kernel's interface counters carried, protocol headers included, per rank; nothing else may use the interface.

{tables.table(header, rows)}
"""
    print(text)
    say(f"written: {tables.save(args.name, text)}")
    return 1 if failed else 0


def _cells(records: list[Record], dtype: str, stage: int, accumulation: int) -> list[str]:
    ranks, first = len(records), records[0]
    nbytes = first["numel"] * DTYPES[dtype].itemsize * (ranks - 1) / ranks
    theory = factor(stage, accumulation) * nbytes
    logged, carried = max(r["logged"] for r in records), first["carried"]
    against = f"{logged / theory:.3f}"
    if stage == 3:
        once = theory - accumulation * first["kept_numel"] * DTYPES[dtype].itemsize * (ranks - 1) / ranks
        against += f" ({logged / once:.3f} with the head gathered once)"
    in_mb = [tables.megabytes(value, 2) for value in (theory, logged, carried)]
    return [*in_mb, against, f"{carried / logged:.3f}" if logged else "-"]
