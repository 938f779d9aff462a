"""`infinity`: a model whose states are many times the memory that the kernel lets it have."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import probes
import tables
import torch
from aio_sides import Fio, Unavailable, fresh
from gpt import GPT, Block, Embed, GPTConfig, Head
from launch import Record, launch, say

LAYERS, WIDTH, HEADS, VOCAB = 24, 2048, 16, 12_000  # 1.26e9 parameters at scale 1
STATE_NBYTES = 16  # of an fp32 parameter: itself, its gradient, Adam's two moments
FILE_NBYTES = 36  # master and moments twice, the parameter twice, the gradient once
LEAST_STATE = 20e9
PEAK_GOAL = 1.1
LIMIT = 4 << 30  # at scale 1


@dataclass(frozen=True)
class Task:
    """One run; plain values, because it travels to a process of its own."""

    scale: float
    limit: int | None  # None: in memory, for comparison
    folder: str
    steps: int
    tokens: int
    kind: str | None = None
    store: str = "auto"

    def config(self) -> GPTConfig:
        """Parameters grow with the square of the width: scale 1 is 24 layers of width 2048."""
        width = max(round(WIDTH * math.sqrt(self.scale) / 64), 1) * 64
        vocab = max(round(VOCAB * math.sqrt(self.scale)), 256)
        return GPTConfig(layers=LAYERS, width=width, heads=HEADS, context=self.tokens, vocab=vocab)

    def model(self) -> GPT:
        """On the meta device: no bytes yet."""
        with torch.device("meta"):
            return GPT(self.config())

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self.config().vocab, (1, self.tokens + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    def options(self) -> dict[str, Any]:
        if self.limit is None:
            return {}
        files = {"device": "nvme", "nvme_path": self.folder}
        return {
            "offload_optimizer": files,
            "offload_param": {**files, "max_in_cpu": 0},
            "aio": {"zs_store": self.store},
            "host_memory_limit": self.limit,
        }


def worker(task: dict[str, Any]) -> Record:
    """Everything that is not the training is imported before the limit begins."""
    import zs_comm
    import zs_zero
    from zs_comm.testing.limits import limited

    chosen = Task(**task)
    zs_comm.init_distributed()
    enforced: Any = contextlib.nullcontext()
    if chosen.limit is not None:
        enforced = limited(chosen.limit, kind=chosen.kind)  # type: ignore[arg-type]
    seconds: list[float] = []
    losses: list[float] = []
    moved = [probes.storage_nbytes()]
    with enforced as memory:
        began = time.perf_counter()
        torch.manual_seed(0)
        model = chosen.model()
        client = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        options = {"units": [Embed, Block, Head], "device": "cpu", **chosen.options()}
        optimizer = zs_zero.shard(model, client, stage=3, **options)
        init_s = time.perf_counter() - began
        for step in range(chosen.steps):
            ids, targets = chosen.batch(step)
            began = time.perf_counter()
            loss = model(ids, targets)
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            losses.append(loss.item())
            moved.append(probes.storage_nbytes())
            del loss
        record: dict[str, Any] = {}
        if chosen.limit is not None:
            report = optimizer.offload_report()
            names = ("planned", "read", "written", "expected_read", "expected_written", "stall_s", "overlap")
            record = {name: getattr(report, name) for name in (*names, "store", "resident", "peak_nbytes")}
            record["table"] = str(report)
        optimizer.close(parameters=False)
    if memory is not None:
        record |= {"kind": memory.kind, "peak": memory.peak_nbytes, "peak_resident": memory.peak_resident_nbytes}
    last = [after - before for after, before in zip(moved[-1], moved[-2], strict=True)]
    return {**record, "step_s": seconds, "losses": losses, "init_s": init_s, "storage": last}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk in question (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of parameters (%(default)s: 1.26e9)")
    parser.add_argument("--limit-mib", type=int, help=f"of memory above the imports (default: {LIMIT >> 20} x scale)")
    parser.add_argument("--kind", help="cgroup1, cgroup2 or rlimit (default: the strictest that works here)")
    parser.add_argument("--store", default="auto", choices=["auto", "aio", "file"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of a step; the disk is measured, not the processor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=3600.0)
    parser.add_argument("--check", action="store_true", help="train in memory as well, and compare the losses")
    parser.add_argument("--name", default="infinity")


def main(args: argparse.Namespace) -> int:
    limit = args.limit_mib << 20 if args.limit_mib else max(int(LIMIT * args.scale), 256 << 20)
    task = Task(args.scale, limit, args.folder, args.steps, args.tokens, args.kind, args.store)
    machine, numel = probes.hardware(), sum(param.numel() for param in task.model().parameters())
    wanted, free = FILE_NBYTES * numel, shutil.disk_usage(args.folder).free
    if wanted > 0.95 * free:
        most = 0.95 * free / wanted * args.scale
        raise SystemExit(
            f"{args.folder} has {free / 1e9:.1f} GB free: {numel / 1e9:.2f}e9 parameters need {wanted / 1e9:.1f} GB "
            f"({FILE_NBYTES} bytes each, blocks have a second slot): --scale {most:.2f} fits, or name another --folder"
        )
    run = partial(launch, "infinity", ranks=1, threads=args.threads, timeout_s=args.timeout_s)
    with tempfile.TemporaryDirectory(prefix="zs-bench-", dir=args.folder) as folder:
        rates = _rates(folder, numel)
        outcome = run(Task(**{**vars(task), "folder": folder}))
        left = sorted(os.listdir(folder))
        rates += _rates(folder, numel)
    if outcome.error is not None:
        raise SystemExit(f"{numel / 1e9:.2f}e9 parameters under {limit / 1e6:.0f} MB failed: {outcome.error}")
    found = outcome.records[0]
    same: bool | None = None
    if args.check:
        reference = run(Task(**{**vars(task), "limit": None}))
        if reference.error is not None:
            raise SystemExit(f"the same in memory failed: {reference.error}")
        same = reference.records[0]["losses"] == found["losses"]
        say(f"in memory: {median(reference.records[0]['step_s']):.2f} s a step")
    text, met = render(task, machine, numel, found, rates, same, args.threads)
    print(text)
    if left:
        say(f"left behind in the folder: {', '.join(left)}")
    say(f"written: {tables.save(args.name, text)}")
    return 0 if met and not left else 1


def _rates(folder: str, numel: int) -> list[float]:
    """fio, half read and half written, GB/s; nothing where there is no fio."""
    path, nbytes = os.path.join(folder, "fio"), 1 << 30 if numel > 1e8 else 1 << 28
    try:
        fio = Fio(path, nbytes, [])
    except Unavailable:
        return []
    fresh(path, nbytes)
    fio.run("write", 1 << 20, 32)
    found = [fio.run("mixed", 1 << 20, 32)["rate"] for _ in range(3)]
    os.unlink(path)
    return found


def render(
    task: Task, machine: str, numel: int, found: Record, rates: list[float], same: bool | None, threads: int
) -> tuple[str, bool]:
    config, state, limit = task.config(), STATE_NBYTES * numel, task.limit or 0
    planned = sum(found["planned"].values())
    read, written = sum(found["read"].values()), sum(found["written"].values())
    expected = sum(found["expected_read"].values()) + sum(found["expected_written"].values())
    steps = found["step_s"][1:] or found["step_s"]
    kernel = sum(found["storage"])
    # Page cache takes what the limit leaves and gives way; files that are read directly have none.
    peak = found["peak"] if found["store"] == "aio" else found["peak_resident"]
    checks = [
        ("states / limit", f"{state / limit:.2f}", ">= 4", state >= 4 * limit),
        ("peak / planned", f"{peak / planned:.3f}", f"<= {PEAK_GOAL}", peak <= PEAK_GOAL * planned),
        ("peak / limit", f"{peak / limit:.3f}", "<= 1", peak <= limit),
        ("bytes of a step / planned", f"{(read + written) / max(expected, 1):.4f}", "1", read + written == expected),
    ]
    if task.scale >= 1:
        checks.append(("states, GB", f"{state / 1e9:.1f}", f">= {LEAST_STATE / 1e9:.0f}", state >= LEAST_STATE))
    if found["store"] == "aio":
        ratio = kernel / (read + written)
        checks.append(("bytes that the kernel counts / ours", f"{ratio:.4f}", "1 +- 0.02", abs(ratio - 1) <= 0.02))
    if same is not None:
        checks.append(("losses of the same in memory", "the same" if same else "others", "the same", same))
    rate = (read + written) / median(steps) / 1e9
    fio = f"fio here, half read and half written: {tables.spread(rates, 2)} GB/s." if rates else "fio is not installed."
    rows = [
        ["parameters", f"{numel / 1e9:.3f}e9"],
        ["states (parameters, gradients, Adam), fp32", f"{state / 1e9:.2f} GB"],
        ["limit, enforced by " + found["kind"], f"{limit / 1e6:.0f} MB"],
        ["planned", f"{planned / 1e6:.0f} MB"],
        ["peak that counted against the limit", f"{found['peak'] / 1e6:.0f} MB"],
        ["peak growth of the resident set", f"{found['peak_resident'] / 1e6:.0f} MB"],
        ["store", found["store"]],
        ["read in a step", f"{read / 1e9:.2f} GB"],
        ["written in a step", f"{written / 1e9:.2f} GB"],
        ["seconds a step, after the first", tables.spread(steps, 2)],
        ["GB/s over the whole step", f"{rate:.2f}"],
        ["stalled for transfers in the last step", f"{found['stall_s']:.2f} s"],
        ["sharding and first write, s", f"{found['init_s']:.1f}"],
    ]
    verdicts = [[name, goal, value, "met" if met else "MISSED"] for name, value, goal, met in checks]
    plan = "\n".join(f"    {line}" for line in found["table"].splitlines())
    text = f"""# Parameters, gradients and optimizer in files, under a limit that the kernel enforces

{machine}, {threads} threads.

A GPT of {config.layers} layers, width {config.width}, vocabulary {config.vocab}, fp32, built on the meta device; \
{task.tokens} tokens a step; AdamW with clipping; {task.steps} steps. The limit counts from the process's size after \
the imports; a control group counts page cache too. {fio}

{tables.table(["", ""], rows)}

{tables.table(["", "goal", "measured", ""], verdicts)}

The report of the last step:

{plan}
"""
    return text, all(met for *_, met in checks)
