"""`overhead`: what the Python around a training step costs: 200 tiny parameters in 100 modules, one rank, on the CPU.

The systems take turns step by step in one process, and what is compared is the ratio within a turn, so that other work
on the same cores disturbs both sides of it. The operators are so small that their own time is little; every system has
the same, and the same AdamW. CPU seconds are of all the process's threads; on an idle machine they are the wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import launch
import probes
import tables
import torch
import torch.distributed as dist
from torch import Tensor, nn

MODULES, WIDTH, BATCH = 100, 8, 4
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "fused": True}
NAMES = {
    "torch": "plain torch loop",
    "fsdp2": "FSDP2, fully_shard on each module",
    "zsz1": "zs_zero.shard, stage 1, plain loop",
    "zs1": "zs_engine, stage 1",
    "zsz3": "zs_zero.shard, stage 3, plain loop",
    "zs3": "zs_engine, stage 3",
}
GOALS = [("zs1", "torch", 2.0), ("zs3", "fsdp2", 1.5)]
Step = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """One round."""

    systems: list[str]
    steps: int
    warmup: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1, help="more than one: communication over gloo is in it too")
    parser.add_argument("--name", default="overhead")


def main(args: argparse.Namespace) -> int:
    machine = probes.hardware()
    names = args.systems.split(",")
    rounds: list[launch.Record] = []
    for number in range(args.rounds):
        outcome = launch.launch("overhead", Task(names, args.steps, 20), ranks=args.ranks)
        if outcome.error is not None:
            launch.say(outcome.error)
            return 1
        rounds.append(outcome.records[0])
        launch.say(f"round {number + 1}/{args.rounds}")
    text = report(machine, args, rounds)
    print(text)
    launch.say(f"written: {tables.save(args.name, text)}")
    return 0


def report(machine: str, args: argparse.Namespace, rounds: list[launch.Record]) -> str:
    names = list(rounds[0]["wall"])
    rows = [
        [NAMES[name], *(tables.spread([median(r[kind][name]) for r in rounds], scale=1e3) for kind in ("wall", "cpu"))]
        for name in names
    ]
    compared = []
    for name, base, goal in GOALS:
        if name in names and base in names:
            ratios = {
                kind: [median(a / b for a, b in zip(r[kind][name], r[kind][base], strict=True)) for r in rounds]
                for kind in ("wall", "cpu")
            }
            met = "yes" if median(ratios["wall"]) <= goal else "no"
            shown = [tables.spread(found, 2) for found in ratios.values()]
            compared.append([f"{NAMES[name]} / {NAMES[base]}", *shown, f"{goal:g}", met])
    return f"""# Overhead of a step

{machine}.

{MODULES} modules of two parameters each, {2 * MODULES} in all ({WIDTH} x {WIDTH} and {WIDTH}); {args.ranks} rank(s).
Milliseconds a step, and ratios: medians (least-most) of {args.rounds} rounds, each the median of {args.steps} turns.
At one rank zs has nobody to share with and gathers nothing at stage 3; FSDP2 gathers from itself.

{tables.table(["system", "wall ms", "CPU ms"], rows)}

{tables.table(["ratio within a turn", "wall", "CPU", "goal", "met"], compared)}
"""


# -- in the process that is measured ----------------------------------------------------------------------------------


def worker(task: dict[str, Any]) -> launch.Record:
    """Seconds of each step, by kind of clock and system."""
    if "fsdp2" in task["systems"]:
        dist.init_process_group("gloo")
    steps = {name: make(name) for name in task["systems"]}
    for step in steps.values():
        for _ in range(task["warmup"]):
            step()
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(task["steps"]):
        for name, step in steps.items():
            began, busy = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - busy)
    return {"wall": wall, "cpu": cpu}


def make(system: str) -> Step:
    """One training step of `system`, ready to be called."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(MODULES)))
    x = torch.randn(BATCH, WIDTH)
    if system.startswith("zs") and system[2].isdigit():
        return engine_step(model, x, int(system[-1]))
    if system == "fsdp2":
        shard_fully(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), **ADAMW)
    if system.startswith("zsz"):
        import zs_comm
        import zs_zero

        optimizer = zs_zero.shard(model, optimizer, mesh=zs_comm.init_distributed(), stage=int(system[-1]))

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def shard_fully(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for module in model.children():
        fully_shard(module)
    fully_shard(model)


def engine_step(model: nn.Module, x: Tensor, stage: int) -> Step:
    import zs_engine

    params = {key: value for key, value in ADAMW.items() if key != "fused"}  # as it is in any case
    engine = zs_engine.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": params},
            "zero_optimization": {"stage": stage},
        },
    )[0]

    def step() -> None:
        engine.backward(engine(x).square().mean())
        engine.step()

    return step
