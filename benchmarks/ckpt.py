"""`ckpt`: saving and loading a checkpoint beside the disk itself, one copy of the memory, and the other ways to save.

The sides take turns in one run, and what is compared is the ratio within a turn. Raw and zs alternate with raw on both
sides of zs; a pair counts where those two agree.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import pairs
import probes
import tables
import torch
from ckpt_sides import Dcp, DeepSpeed, Raw, Safetensors, State, TorchSave, Unavailable, Zs, empty, make_state, nbytes_of
from ckpt_sides import sync as sync_folder
from launch import say

SAVE_GOAL, LOAD_GOAL, STALL_GOAL, STEP_GOAL = 0.90, 0.90, 1.2, 1.10
PEER_GOALS = {"torch.save + fsync": 2.0, "safetensors + fsync": None, "DCP": 3.0, "DeepSpeed": 3.0}
_SETTLE_S = 1.0  # after a folder was emptied, and the disk told: before each of the other ways
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass
class Row:
    """One comparison: the values of both sides, the ratio pair by pair, and what it has to be."""

    name: str
    beside: str
    unit: str
    there: list[float] = field(default_factory=list)
    zs: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    goal: float | None = None
    most: bool = False  # the goal is the most that the ratio may be; else the least
    discarded: int = 0
    absent: str = ""

    def met(self) -> bool | None:
        if self.goal is None:
            return None
        if self.absent or not self.ratios:
            return False
        return median(self.ratios) <= self.goal if self.most else median(self.ratios) >= self.goal

    def cells(self) -> list[str]:
        goal = "-" if self.goal is None else f"{'<=' if self.most else '>='} {self.goal:.2f}"
        if self.absent or not self.ratios:
            return [
                self.name,
                self.beside,
                "-",
                "-",
                "-",
                goal,
                f"not measured: {self.absent or 'the disk is not steady'}",
                "-",
            ]
        met = {True: "yes", False: "NO", None: "-"}[self.met()]
        sides = [f"{tables.spread(side)} {self.unit}" for side in (self.there, self.zs)]
        return [
            self.name,
            self.beside,
            *sides,
            tables.spread(self.ratios),
            goal,
            met,
            f"{len(self.ratios)} / {self.discarded}",
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk in question (%(default)s)")
    parser.add_argument("--mib", type=int, default=1240, help="size of the state (%(default)s)")
    parser.add_argument("--pairs", type=int, default=7, help="that count, for each comparison (%(default)s)")
    parser.add_argument("--most", type=int, default=28, help="pairs at the longest (%(default)s)")
    parser.add_argument("--peer-turns", type=int, default=5, help="of the other ways to save (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.10, help="between the two raw runs of a pair")
    parser.add_argument("--raw-threads", type=int, default=0, help="of the raw side; 0: the best of 1, 2, 4, 8")
    parser.add_argument("--io", default="auto", help="of zs: auto, aio or threads (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=50.0, help="of one step of the model beside a flush")
    parser.add_argument("--cases", default="", help="only these, of save,peers,async,load")
    parser.add_argument("--deepspeed-python", default="", help="an interpreter that has DeepSpeed")
    parser.add_argument("--name", default="ckpt")


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.state: State = make_state(args.mib << 20)
        self.nbytes = nbytes_of(self.state)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.zs = Zs(self.state, args.io)
        self.raw = self._best_raw()

    def wanted(self, case: str) -> bool:
        return not self.args.cases or case in self.args.cases.split(",")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        say(" | ".join(row.cells()))

    def _best_raw(self) -> Raw:
        counts = [self.args.raw_threads] if self.args.raw_threads else [1, 2, 4, 8]
        raw, best = Raw(self.state), {}
        for raw.threads in counts:
            best[raw.threads] = min(raw.save(self.folder / "raw") for _ in range(2))
        raw.threads = min(best, key=lambda count: best[count])
        self.notes.append(f"Raw: direct I/O in chunks of 8 MiB by {raw.threads} threads, the best of {counts}.")
        return raw

    def _rate(self, seconds: float) -> dict[str, float]:
        return {"rate": self.nbytes / 1e9 / seconds}

    # ---- the disk ----

    def save(self) -> None:
        """With checksums and syncs, beside a raw write of the same bytes."""
        a, b = partial(self.raw.save, self.folder / "raw"), partial(self.zs.save, self.folder / "zs")
        self._alternate(Row("save", "raw write + fsync", "GB/s", goal=SAVE_GOAL), a, b)

    def load(self) -> None:
        """Verified, into tensors that are there, beside a raw read; nothing of either file in memory before."""
        self.zs.save(self.folder / "zs")
        self.raw.save(self.folder / "raw")
        note = self._forget()
        self.notes.append(note)

        def cold(work: Callable[[Path], float], folder: Path) -> float:
            self._forget()
            return work(folder)

        a = partial(cold, self.raw.load, self.folder / "raw")
        b = partial(cold, self.zs.load, self.folder / "zs")
        self._alternate(Row("load", "raw read", "GB/s", goal=LOAD_GOAL), a, b)

    def _alternate(self, row: Row, a: Callable[[], float], b: Callable[[], float]) -> None:
        a(), b()  # both warm
        args = self.args
        found = pairs.alternate(
            lambda: self._rate(a()),
            lambda: self._rate(b()),
            wanted=args.pairs,
            most=args.most,
            tolerance=args.tolerance,
        )
        row.there, row.zs = ([run["rate"] for run in side] for side in (found.reference, found.subject))
        row.ratios, row.discarded = found.ratios(), found.discarded
        self.add(row)

    def _forget(self) -> str:
        """Drop what the kernel holds of files."""
        os.sync()
        try:
            DROP_CACHES.write_text("3")
            return "Before each load the page cache was dropped (drop_caches)."
        except OSError:
            for path in [*self.folder.rglob("*")]:
                if path.is_file():
                    fd = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(fd)
            return "drop_caches is not allowed here: before each load the files' pages were given up by posix_fadvise."

    # ---- the others ----

    def peers(self) -> None:
        makers: dict[str, Callable[[], Any]] = {
            "torch.save + fsync": lambda: TorchSave(self.state),
            "safetensors + fsync": lambda: Safetensors(self.state),
            "DCP": lambda: Dcp(self.state),
            "DeepSpeed": lambda: DeepSpeed(self.state, self.args.deepspeed_python),
        }
        rows = {name: Row("save", name, "s", goal=goal) for name, goal in PEER_GOALS.items()}
        sides: dict[str, Any] = {}
        for name, make in makers.items():
            try:
                sides[name] = make()
                sides[name].save(self.folder / "peer")
            except Unavailable as error:
                rows[name].absent = str(error)
                sides.pop(name, None)
        sides[""] = self.zs
        names = list(sides)
        for turn in range(self.args.peer_turns):
            took = {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
                empty(self.folder / "peer")
                sleep(_SETTLE_S)
                took[name] = sides[name].save(self.folder / "peer")
            for name in rows.keys() & took.keys():
                rows[name].there.append(took[name])
                rows[name].zs.append(took[""])
                rows[name].ratios.append(took[name] / took[""])  # times faster
        empty(self.folder / "peer")
        for name, row in rows.items():
            if hasattr(sides.get(name), "close"):
                sides[name].close()
            self.add(row)

    # ---- beside the training ----

    def asynchronous(self) -> None:
        from zs_ckpt import Checkpointer

        stall = Row("asynchronous: stall", "one copy of the state", "s", goal=STALL_GOAL, most=True)
        slower = Row("asynchronous: step during the flush", "step alone", "ms", goal=STEP_GOAL, most=True)
        copies = {part: {name: torch.empty_like(t) for name, t in found.items()} for part, found in self.state.items()}
        self._copy(copies)
        before = probes.resident_nbytes()
        with Checkpointer(self.folder / "async", io=self.args.io) as checkpointer:
            checkpointer.save(self.state, asynchronous=True)
            checkpointer.wait()
            extra = probes.resident_nbytes() - before
            step = Steps(self.args.step_ms)
            for _ in range(self.args.pairs):
                sync_folder(self.folder)
                copy = self._copy(copies)
                alone = step.run(partial(_past, perf_counter() + 2.0))
                began = perf_counter()
                pending = checkpointer.save(self.state, asynchronous=True)
                took = perf_counter() - began
                during = step.run(partial(getattr, pending, "done"))
                checkpointer.wait()
                stall.there.append(copy)
                stall.zs.append(took)
                stall.ratios.append(took / copy)
                if during:
                    slower.there.append(median(alone) * 1e3)
                    slower.zs.append(median(during) * 1e3)
                    slower.ratios.append(median(during) / median(alone))
        self.notes.append(
            f"Extra memory of asynchronous saves, held between them: {extra / 1e6:.0f} MB of resident memory "
            f"({extra / self.nbytes:.2f} of the state)."
        )
        self.add(stall)
        self.add(slower)

    def _copy(self, to: State) -> float:
        began = perf_counter()
        for part, found in self.state.items():
            for name, tensor in found.items():
                to[part][name].copy_(tensor)
        return perf_counter() - began


def _past(moment: float) -> bool:
    return perf_counter() > moment


class Steps:
    """Steps of a small model on the processor, each about `milliseconds` long."""

    def __init__(self, milliseconds: float) -> None:
        self._x, self._repeats = torch.randn(512, 512), 1
        for _ in range(3):
            took = self._once()
            self._repeats = max(int(self._repeats * milliseconds / 1e3 / took), 1)

    def run(self, stop: Callable[[], bool]) -> list[float]:
        """Seconds of each step until `stop`."""
        found = []
        while not stop():
            found.append(self._once())
        return found

    def _once(self) -> float:
        began = perf_counter()
        for _ in range(self._repeats):
            torch.mm(self._x, self._x)
        return perf_counter() - began


def main(args: argparse.Namespace) -> int:
    machine = probes.hardware()
    with tempfile.TemporaryDirectory(prefix="zs-bench-", dir=args.folder) as folder:
        bench = Bench(args, Path(folder))
        cases = {"save": bench.save, "peers": bench.peers, "async": bench.asynchronous, "load": bench.load}
        for case, work in cases.items():
            if bench.wanted(case):
                work()
    header = ["", "beside", "there", "zs", "ratio", "goal", "met", "pairs / discarded"]
    text = f"""# Checkpoints: zs-ckpt beside the disk, the memory and the other ways to save

{machine}.

{bench.nbytes / 1e9:.2f} GB of state: fp32 parameters and two moments in {sum(map(len, bench.state.values()))} \
tensors; io of zs: {args.io}; every save into an empty folder, its bytes on the disk at the end. `save`, `load`: raw \
and zs alternate, a pair is a run of zs and the two raw runs around it, and counts where those differ by at most \
{args.tolerance:.0%}; ratio: zs / raw. Beside the other ways to save: how many times longer they take, turn by turn. \
Medians (least-most). {" ".join(bench.notes)}

{tables.table(header, [row.cells() for row in bench.rows])}
"""
    print(text)
    say(f"written: {tables.save(args.name, text)}")
    return int(any(row.met() is False for row in bench.rows))
