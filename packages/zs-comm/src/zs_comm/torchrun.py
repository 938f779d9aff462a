"""Run a script on several ranks with torchrun, in this process, and find out which rank failed first."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .nodes import Node
from .record import FOLDER


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, its exit code (128 + n for signal n), and its traceback where there was one."""

    rank: int | None
    code: int
    traceback: str = ""

    def __str__(self) -> str:
        who = "the launch" if self.rank is None else f"rank {self.rank}"
        death = f" (signal {signal.Signals(self.code - 128).name})" if 128 < self.code < 160 else ""
        return f"{who} failed first, with exit code {self.code}{death}" + (
            f":\n{self.traceback}" if self.traceback else ""
        )


def arguments(command: Sequence[str], *, ranks: int, node: Node | None = None) -> list[str]:
    """torchrun's arguments for `command` (a script, or -m and a module, and its arguments) on this node."""
    where = ["--standalone"]
    if node is not None and node.count > 1:
        where = [f"--nnodes={node.count}", f"--node-rank={node.index}"]
        where += [f"--master-addr={node.master_addr}", f"--master-port={node.master_port}"]
    return [*where, f"--nproc-per-node={ranks}", "-m", "zs_comm.record", *command]


def run(argv: Sequence[str]) -> Failure | None:
    """torchrun with `argv`; None when all ranks ended well.

    Each rank gets its share of the processors as OMP_NUM_THREADS, unless that is set.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = torchrun.parse_args(list(argv))
    ranks = torchrun.determine_local_world_size(options.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    with tempfile.TemporaryDirectory(prefix="zs-run-") as folder:
        os.environ[FOLDER] = folder
        try:
            torchrun.run(options)
        except ChildFailedError as error:
            return first_failure({rank: failure.exitcode for rank, failure in error.failures.items()}, folder)
        except SignalException as error:
            return Failure(None, 128 + int(error.sigval))
        finally:
            del os.environ[FOLDER]
    return None


def first_failure(codes: Mapping[int, int], folder: str | os.PathLike[str]) -> Failure:
    """Which of the ranks that left these exit codes (negative: by signal) is the cause.

    The earliest that left word of an error of its own; else one that died without a word; else the earliest that
    complained about its peers.
    """
    reports = {}
    for file in Path(folder).glob("rank*.json"):
        reports[int(file.stem.removeprefix("rank"))] = json.loads(file.read_text())
    order = sorted(reports, key=lambda rank: (reports[rank]["consequence"], reports[rank]["time"]))
    silent = [rank for rank, code in codes.items() if rank not in reports and code not in (0, -signal.SIGTERM)]
    if silent and (not order or reports[order[0]]["consequence"]):
        code = codes[silent[0]]
        return Failure(silent[0], 128 - code if code < 0 else code)
    if order:
        return Failure(order[0], reports[order[0]]["code"], reports[order[0]]["traceback"])
    rank, code = min(codes.items())
    return Failure(rank, 128 - code if code < 0 else code)


def backends() -> list[str]:
    """The process-group backends that this torch was built with."""
    from torch import distributed as dist

    return [name for name in ("gloo", "nccl", "mpi", "ucc") if getattr(dist, f"is_{name}_available")()]
