"""`offload`: a step with the optimizer on the host or in files, beside the step in memory, the disk, and DeepSpeed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import offload_table
import probes
import tables
import torch
from aio_sides import Fio, Unavailable, Worker, fresh
from launch import Record, launch, say
from offload_systems import Task, build, parse
from offload_table import Rounds
from systems import data
from workload import SIZES

SYSTEMS = "torch,torch-masters,zs2,zs2-cpu,zs3-cpu,zs3-nvme,zs3-nvme-early,zs3-nvme-all,ds2-cpu,ds3-cpu,ds3-nvme"


def worker(task: dict[str, Any]) -> Record:
    """One system in one round: its files are in a folder of their own, which goes when it is done."""
    chosen = Task(**task)
    folder = tempfile.mkdtemp(prefix="zs-bench-", dir=chosen.folder)
    try:
        return _measure(Task(**{**task, "folder": folder}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(task: Task) -> Record:
    resident = probes.resident_nbytes()
    probes.reset_resident_peak()
    began = time.perf_counter()
    step, report = build(task)
    init_s, init_peak = time.perf_counter() - began, probes.resident_nbytes("VmHWM") - resident
    probes.reset_resident_peak()
    seconds: list[float] = []
    losses: list[torch.Tensor] = []
    before = probes.storage_nbytes()
    for index, (ids, targets) in zip(range(task.warmup + task.steps), data(task, 0), strict=False):
        if index == task.warmup:
            before = probes.storage_nbytes()
        began = time.perf_counter()
        loss = step(ids, targets)
        if loss is not None:
            losses.append(loss)
        if index >= task.warmup:
            seconds.append(time.perf_counter() - began)
    moved = [(now - then) / task.steps for now, then in zip(probes.storage_nbytes(), before, strict=True)]
    return {
        "step_s": seconds,
        "init_s": init_s,
        "init_peak_nbytes": init_peak,
        "losses": [float(loss) for loss in losses],
        "peak_nbytes": probes.resident_nbytes("VmHWM") - resident,
        "read_nbytes": moved[0],
        "written_nbytes": moved[1],
        "report": report(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", default=SYSTEMS, help="%(default)s")
    parser.add_argument("--size", default="large", choices=SIZES)
    parser.add_argument("--dtype", default="bf16", help="bf16, fp32, or both, separated by a comma")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk in question (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mib", type=int, default=1024, help="of the file that fio moves (%(default)s)")
    parser.add_argument("--block-kib", type=int, default=1024, help="of fio (%(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="of fio (%(default)s)")
    parser.add_argument("--deepspeed-python", default=sys.executable, help="an interpreter that has DeepSpeed")
    parser.add_argument("--name", default="offload")


class Disk:
    """GB/s of the disk with half read and half written: by fio, and by the file engine with its defaults."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        path, nbytes = str(Path(folder, "file")), args.mib << 20
        self._path, self._block, self._depth = path, args.block_kib << 10, args.depth
        self.absent = ""
        self._fio: Fio | None = None
        self._engine: Worker | None = None
        try:
            self._fio = Fio(path, nbytes, [])
            self._engine = Worker("zs", nbytes)
        except Unavailable as error:
            self.absent = str(error)
            return
        fresh(path, nbytes)
        self._engine.run("write", path, chunk=None, depth=None)  # now every block of it was written

    def rates(self) -> dict[str, list[float]]:
        """Three of each, in turn."""
        found: dict[str, list[float]] = {"fio": [], "engine": []}
        if self._fio is not None and self._engine is not None:
            for _ in range(3):
                found["fio"].append(self._fio.run("mixed", self._block, self._depth)["rate"])
                found["engine"].append(self._engine.run("mixed", self._path, chunk=None, depth=None)["rate"])
        return found

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def main(args: argparse.Namespace) -> int:
    systems = args.systems.split(",")
    pythons = {s: args.deepspeed_python if parse(s)[0].startswith("ds") else sys.executable for s in systems}
    needs = {s: {"ds": "deepspeed", "zs": "zs_zero"}.get(s[:2], "torch") for s in systems}
    absent = {s: needs[s] for s in systems if not _has(needs[s], pythons[s])}
    present = [system for system in systems if system not in absent]
    machine, sections, met = probes.hardware(), [], True
    with tempfile.TemporaryDirectory(prefix="zs-bench-", dir=args.folder) as folder:
        disk = Disk(folder, args)
        try:
            for dtype in args.dtype.split(","):
                rounds = Rounds(dtype, present, disk.absent)
                for round_ in range(args.rounds):
                    rounds.begin(disk.rates())
                    for system in present:
                        task = Task(system, args.size, dtype, args.micro_batch, args.steps, args.warmup, folder=folder)
                        outcome = launch("offload", task, ranks=1, threads=args.threads, python=pythons[system])
                        rounds.add(system, outcome)
                        middle = outcome.error or f"{median(outcome.records[0]['step_s']):.3f} s a step"
                        say(f"{dtype} round {round_ + 1}/{args.rounds}  {system:14} {middle}")
                text, all_met = offload_table.render(rounds)
                sections.append(text)
                met = met and all_met
        finally:
            disk.close()
    config = SIZES[args.size]
    missing = ", ".join(f"{system} ({package})" for system, package in absent.items())
    text = f"""# A step with the optimizer on the host or in files, one rank

{machine}, {args.threads} threads.

A GPT of {config.layers} layers, width {config.width}, vocabulary {config.vocab}; {args.micro_batch} x \
{config.context} tokens a step; AdamW; gradient_clipping 0.0 for all. Every system runs {args.rounds} times, in turn, \
each time in a fresh process: {args.warmup} steps to warm up, {args.steps} measured; before each turn fio and the file \
engine move a file of {args.mib} MiB, half read and half written ({args.block_kib} KiB x {args.depth}). Figures are \
medians (least-most), ratios within a round. "cpu" on a machine without another device moves nothing.{
        f" Not installed here: {missing}." if missing else ""
    }

"""
    text += "\n\n".join(sections)
    print(text)
    say(f"written: {tables.save(args.name, text)}")
    return 0 if met else 1


def _has(package: str, python: str) -> bool:
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", probe], check=False).returncode == 0
