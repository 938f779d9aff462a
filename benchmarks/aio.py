"""`aio`: the file engine beside fio, beside itself at its best setting, and beside DeepSpeed's handle.

Every run moves one file by direct I/O, in the same place for both sides; the runs alternate, and what is compared is
the ratio within a pair.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

import pairs
import probes
import tables
from aio_sides import SMALL, Fio, Unavailable, Worker, fresh, on_fresh
from launch import say
from pairs import Pairs, Run

CASES = {  # op -> (name, least ratio)
    "read": ("read", 0.97),
    "write": ("overwrite", 0.97),
    "first": ("first write, preallocated, with fdatasync", 0.95),
    "mixed": ("half read, half written", 0.95),
    "small read": ("1,000 x 64 KiB in one batch, read", 0.85),
    "small write": ("1,000 x 64 KiB in one batch, written", 0.85),
}
CPU_GOAL = 1.25  # at most, of fio's seconds per GB
SWEEP = [(chunk << 10, depth) for chunk in (256, 512, 1024, 2048, 4096, 8192) for depth in (4, 8, 16, 32, 64)]
DEEPSPEED_SWEEP = [
    [block << 20, depth, False, True, threads]  # overlap_events: without it the queue drains at every batch
    for block in (1, 8)
    for depth in (8, 32, 128)
    for threads in (1, 2, 4)
]


@dataclass
class Row:
    """One comparison as it is shown."""

    name: str
    reference: str
    result: Pairs
    goal: float
    cpu: bool = False  # CPU time is compared as well
    absent: str = ""  # why there is nothing to show
    wanted: int = 1  # pairs; fewer decide nothing

    def rate_cells(self) -> list[str]:
        if self.absent or not self.result.subject:
            reason = self.absent or f"none of {self.result.discarded} pairs counts: the disk is not steady"
            return [self.name, self.reference, "-", "-", "-", f">= {self.goal:.2f}", f"not measured: {reason}", "-"]
        ratios = self.result.ratios()
        low, high = pairs.interval(ratios)
        kept = f"{len(ratios)} / {self.result.discarded}"
        sides = (self.result.reference, self.result.subject)
        rates = [tables.spread([run["rate"] for run in side], 2) for side in sides]
        ratio = f"{median(ratios):.3f} ({low:.3f}-{high:.3f})"
        return [self.name, self.reference, *rates, ratio, f">= {self.goal:.2f}", self._verdict(self.met()), kept]

    def met(self) -> bool:
        """Whether the goal is met, by the median of enough pairs."""
        ratios = self.result.ratios()
        return not self.absent and len(ratios) >= self.wanted and median(ratios) >= self.goal

    def cpu_cells(self) -> list[str]:
        ratios = self.result.ratios("cpu")
        if not ratios:
            return [self.name, "-", "-", "-", f"<= {CPU_GOAL:.2f}", "not measured"]
        low, high = pairs.interval(ratios)
        used = [tables.spread([run["cpu"] for run in side]) for side in (self.result.reference, self.result.subject)]
        ratio = f"{median(ratios):.2f} ({low:.2f}-{high:.2f})"
        return [self.name, *used, ratio, f"<= {CPU_GOAL:.2f}", self._verdict(self.cpu_met())]

    def cpu_met(self) -> bool:
        ratios = self.result.ratios("cpu")
        return len(ratios) >= self.wanted and median(ratios) <= CPU_GOAL

    def _verdict(self, met: bool) -> str:
        few = len(self.result.subject) < self.wanted
        return "yes" if met else f"NO: too few of {self.wanted} pairs" if few else "NO"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk in question (%(default)s)")
    parser.add_argument("--mib", type=int, default=1024, help="size of the file (%(default)s)")
    parser.add_argument("--block-kib", type=int, default=1024, help="of fio, and of the engine beside it (%(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="of fio, and of the engine beside it (%(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="that count, for each comparison (%(default)s)")
    parser.add_argument("--most", type=int, default=60, help="pairs at the longest (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="between the two runs of a pair's reference")
    parser.add_argument("--cases", default="", help="only these, of read,write,first,mixed,small,defaults,deepspeed")
    parser.add_argument("--fio-options", default="", help="more for fio: '--registerfiles --fixedbufs'")
    parser.add_argument("--deepspeed-python", default="", help="an interpreter that has DeepSpeed (this one)")
    parser.add_argument("--name", default="aio")


class Bench:
    """The file, the sides and the rows so far."""

    def __init__(self, args: argparse.Namespace, folder: str, stack: ExitStack) -> None:
        self.args, self.stack = args, stack
        self.nbytes = args.mib << 20
        self.path, self.new = os.path.join(folder, "file"), os.path.join(folder, "new")
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.zs = Worker("zs", self.nbytes)
        stack.callback(self.zs.close)
        fresh(self.path, self.nbytes)
        self.zs.run("write", self.path, chunk=None, depth=None)  # now every block of it was written

    def wanted(self, name: str) -> bool:
        return not self.args.cases or name.split()[0] in self.args.cases.split(",")

    def compare(self, row: Row, a: Callable[[], Run], b: Callable[[], Run]) -> None:
        args = self.args
        a(), b()  # both warm
        row.wanted = args.pairs
        row.result = pairs.alternate(a, b, wanted=args.pairs, most=args.most, tolerance=args.tolerance)
        self.rows.append(row)
        say(" | ".join(row.rate_cells()))

    def beside_fio(self) -> None:
        """The same block size and depth on both sides."""
        chosen = {op: case for op, case in CASES.items() if self.wanted(op)}
        try:
            fio, new = (Fio(path, self.nbytes, self.args.fio_options.split()) for path in (self.path, self.new))
        except Unavailable as error:
            self.rows += [Row(name, "fio", Pairs(), goal, True, str(error)) for name, goal in chosen.values()]
            return
        self.notes.append(f"{fio.version}, io_uring {self.args.fio_options}".strip() + ".")
        for op, (name, goal) in chosen.items():
            block, depth = (SMALL if op.startswith("small") else self.args.block_kib << 10), self.args.depth
            if op == "first":
                a = on_fresh(self.new, self.nbytes, partial(new.run, op, block, depth))
                b = on_fresh(self.new, self.nbytes, partial(self.zs.run, op, self.new, chunk=block, depth=depth))
            else:
                a = partial(fio.run, op, block, depth)
                b = partial(self.zs.run, op, self.path, chunk=block, depth=depth)
            self.compare(Row(name, f"fio {block >> 10}k qd {depth}", Pairs(), goal, True), a, b)

    def defaults(self) -> None:
        """No setting at all beside the best of a sweep that ran before."""
        for op in ("read", "write"):
            rates: dict[tuple[int, int], list[float]] = {setting: [] for setting in SWEEP}
            for _ in range(3):
                for chunk, depth in SWEEP:
                    rates[chunk, depth].append(self.zs.run(op, self.path, chunk=chunk, depth=depth)["rate"])
            middle = {setting: median(found) for setting, found in rates.items()}
            chunk, depth = max(SWEEP, key=middle.__getitem__)
            for _ in range(4):
                self.zs.run(op, self.path, chunk=None, depth=None)
            calibrations = self.zs.ask("calibration", chunk=None, depth=None)
            direction = "read" if op == "read" else "write"
            for found in calibrations:
                if found["direction"] == direction:
                    state = "settled" if found["settled"] else "not settled yet"
                    used = f"{found['chunk_nbytes'] >> 10} KiB x {found['depth']} ({state})"
                    self.notes.append(f"The default for {direction}s, calibrated on the traffic before: {used}.")
            self.compare(
                Row(f"defaults, {CASES[op][0]}", f"zs at {chunk >> 10} KiB x {depth}", Pairs(), 0.97),
                partial(self.zs.run, op, self.path, chunk=chunk, depth=depth),
                partial(self.zs.run, op, self.path, chunk=None, depth=None),
            )

    def deepspeed(self) -> None:
        """Its handle at the best setting of a sweep of its own; the engine at its defaults."""
        goals = {"pinned": 1.0, "ordinary": 2.0}
        operations = ("read", "write")
        try:
            python = self.args.deepspeed_python
            if not python and importlib.util.find_spec("deepspeed") is None:
                raise Unavailable("it is not installed, and there is no --deepspeed-python")
            worker = Worker("deepspeed", self.nbytes, python or sys.executable)
        except Unavailable as error:
            self.rows += [
                Row(f"{CASES[op][0]}, {memory} memory", "DeepSpeed", Pairs(), goal, absent=str(error))
                for memory, goal in goals.items()
                for op in operations
            ]
            return
        self.stack.callback(worker.close)
        for op in operations:
            for memory, goal in goals.items():
                rates: list[list[float]] = [[] for _ in DEEPSPEED_SWEEP]
                for _ in range(2):
                    for found, setting in zip(rates, DEEPSPEED_SWEEP, strict=True):
                        found.append(worker.run(op, self.path, memory, setting=setting)["rate"])
                middle = [median(found) for found in rates]
                best = DEEPSPEED_SWEEP[middle.index(max(middle))]
                reference = f"DeepSpeed {best[0] >> 20}M x {best[1]}, {best[4]} threads"
                self.compare(
                    Row(f"{CASES[op][0]}, {memory} memory", reference, Pairs(), goal),
                    partial(worker.run, op, self.path, memory, setting=best),
                    partial(self.zs.run, op, self.path, memory, chunk=None, depth=None),
                )


def main(args: argparse.Namespace) -> int:
    machine = probes.hardware()
    with tempfile.TemporaryDirectory(prefix="zs-bench-", dir=args.folder) as folder, ExitStack() as stack:
        bench = Bench(args, folder, stack)
        bench.beside_fio()
        if bench.wanted("defaults"):
            bench.defaults()
        if bench.wanted("deepspeed"):
            bench.deepspeed()
        backend = bench.zs.ask("stats", chunk=None, depth=None)["backend"]
    header = ["", "beside", "GB/s there", "GB/s of zs", "zs / there", "goal", "met", "pairs / discarded"]
    text = f"""# Files: zs-offload-aio beside fio, itself and DeepSpeed

{machine}.

One file of {args.mib} MiB, direct I/O, bytes that do not compress; backend {backend}. The sides alternate, A B A ... \
A; a pair is a run of zs and the two runs around it, and counts where those two differ by at most \
{args.tolerance:.0%}. Medians (least-most) of the pairs that count; ratios: median of the pairs' own, with its 95 % \
bootstrap interval. {" ".join(bench.notes)}

{tables.table(header, [row.rate_cells() for row in bench.rows])}
"""
    with_cpu = [row for row in bench.rows if row.cpu]
    if with_cpu:
        cpu_header = ["", "fio", "zs", "zs / fio", "goal", "met"]
        text += f"""
CPU seconds per GB, user and system, of the whole process with its io-wq threads; of fio less what a run of one block \
needs. What the kernel does elsewhere (interrupts, block layer workers) is in neither.

{tables.table(cpu_header, [row.cpu_cells() for row in with_cpu])}
"""
    print(text)
    say(f"written: {tables.save(args.name, text)}")
    met = all(row.met() for row in bench.rows) and all(row.cpu_met() for row in with_cpu)
    return 0 if met else 1
