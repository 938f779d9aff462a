"""Run a function on several ranks and bring back each rank's result, or everything known of its failure.

test                         server (forked once, torch imported)      ranks
----                         ------------------------------------      -----
run_ranks -- start x W ----> fork x W -------------------------------> rendezvous over a file
  wait: pipes and exits <-------------------------------- report ----- fn(group, ...)
  all reported: release ----------------------------------------->     shutdown, exit
  one failed: grace_s, then kill     deadline: dump stacks, then kill
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

from zs_comm.testing import _transfer
from zs_comm.testing._rank import RankTask, Report, WarningFilter, rank_main
from zs_comm.testing._transfer import FunctionRef

_DUMP_S = 0.5  # how long the ranks get to write their stacks before they are killed
_SOCKET_FOLDER_LENGTH = 72  # bytes: a socket's whole path holds 107 on Linux, 103 on macOS; its own names take 31


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended."""

    rank: int
    kind: Literal["returned", "raised", "died", "killed"]  # killed: by the harness, at the deadline or after grace
    value: Any = None
    error_types: tuple[str, ...] = ()  # raised: names of the exception's class and its bases, most derived first
    text: str = ""  # raised: str(exception)
    traceback: str = ""
    exit_code: int | None = None  # died: as the process left it, negative for a signal
    output: str = ""  # what the rank wrote to stdout and stderr
    stacks: str = ""  # of every thread: at the deadline, or at a crash
    seconds: float = 0.0  # from the start of the run to this rank's end

    @property
    def error_type(self) -> str:
        """The name of the exception's class; empty unless the rank raised."""
        return self.error_types[0] if self.error_types else ""

    def __str__(self) -> str:
        heads = {
            "returned": "returned",
            "raised": f"raised {self.error_type}",
            "died": f"died with exit code {self.exit_code}",
            "killed": "was killed by the harness",
        }
        parts = [f"--- rank {self.rank} {heads[self.kind]} after {self.seconds:.2f} s"]
        for title, body in (("", self.traceback), ("stacks", self.stacks), ("output", self.output)):
            if body.strip():
                parts.append((f"{title}:\n" if title else "") + body.rstrip())
        return "\n".join(parts)


@dataclass(frozen=True)
class RunResult:
    """What `run_ranks(..., expect_exit=True)` returns: one outcome per rank, in rank order."""

    outcomes: tuple[RankOutcome, ...]
    seconds: float

    @property
    def values(self) -> list[Any]:
        return [outcome.value for outcome in self.outcomes]

    def __str__(self) -> str:
        return "\n".join(str(outcome) for outcome in self.outcomes)


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; the text has each such rank's traceback, first failure first."""

    def __init__(self, result: RunResult, reason: str) -> None:
        self.result = result
        failed = sorted((o for o in result.outcomes if o.kind != "returned"), key=lambda o: o.seconds)
        fine = [str(o.rank) for o in result.outcomes if o.kind == "returned"]
        note = f"\n(rank {', '.join(fine)} returned)" if fine else ""
        super().__init__("\n".join([reason, *map(str, failed)]) + note)

    @property
    def outcomes(self) -> tuple[RankOutcome, ...]:
        return self.result.outcomes


@overload
def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout_s: float = ...,
    comm_timeout_s: float = ...,
    grace_s: float = ...,
    env: Mapping[str, str] | None = ...,
    backend: str = ...,
    expect_exit: Literal[False] = ...,
    **kwargs: Any,
) -> list[Any]: ...


@overload
def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout_s: float = ...,
    comm_timeout_s: float = ...,
    grace_s: float = ...,
    env: Mapping[str, str] | None = ...,
    backend: str = ...,
    expect_exit: Literal[True],
    **kwargs: Any,
) -> RunResult: ...


def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout_s: float = 60.0,
    comm_timeout_s: float = 5.0,
    grace_s: float = 3.0,
    env: Mapping[str, str] | None = None,
    backend: str = "gloo",
    expect_exit: bool = False,
    **kwargs: Any,
) -> list[Any] | RunResult:
    """Run `fn(group, *args, **kwargs)` on `world` ranks and return each rank's result, in rank order.

    `fn` is a module-level function of any file; `group` is the world's `zs_comm.Group`. Each rank is a
    fresh process with one thread, torch's seed 0, this process's working directory and environment plus
    `env`, and this process's warning filters. Arguments and results travel by pickle, tensors by value.

    timeout_s: hard limit for the whole run; stacks of all threads of all ranks are dumped, then the ranks killed.
    comm_timeout_s: the group's bound on every wait.
    grace_s: how long the others may go on after the first rank failed.
    expect_exit: for tests in which ranks raise or die: nothing is raised, every rank gets until `timeout_s`,
        and the result is a `RunResult` that says how each one ended.

    Raises:
        RankFailed: a rank raised, died, or was still running at the limit.
        ValueError: `fn` cannot be found by name from another process, or `world` < 1.
    """
    __tracebackhide__ = True  # pytest then shows the line that called, and the ranks' own tracebacks
    if world < 1:
        raise ValueError(f"run_ranks needs at least one rank, not {world}")
    filters = WarningFilter.active()
    ref, arguments = FunctionRef.of(fn), _transfer.dumps((args, kwargs))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if sys.platform == "linux":
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # never the host name's address: it may not resolve
    with tempfile.TemporaryDirectory(prefix="zs-ranks-") as folder:
        tasks = [
            RankTask(ref, arguments, rank, world, folder, os.getcwd(), environ, filters, backend, comm_timeout_s)
            for rank in range(world)
        ]
        run = _Run(tasks, timeout_s=timeout_s, grace_s=timeout_s if expect_exit else grace_s)
        try:
            reason = run.wait()
        finally:
            run.close()
        result = run.result()
    _echo(result)
    if expect_exit:
        return result
    if reason or any(outcome.kind != "returned" for outcome in result.outcomes):
        raise RankFailed(result, reason or f"{ref.qualname} failed on {world} ranks")
    return result.values


class _Run:
    """The processes of one `run_ranks` call and what has been heard of them."""

    def __init__(self, tasks: list[RankTask], *, timeout_s: float, grace_s: float) -> None:
        self.tasks, self.timeout_s, self.grace_s = tasks, timeout_s, grace_s
        self.reports: dict[int, Report] = {}
        self.ended: dict[int, float] = {}  # rank -> seconds
        self.killed: set[int] = set()
        self.pipes: dict[int, Connection] = {}
        self.processes: dict[int, BaseProcess] = {}
        with _rank_server() as context:
            self.started = time.monotonic()
            for task in tasks:
                ours, theirs = context.Pipe()
                process = context.Process(target=rank_main, args=(task, theirs), name=f"rank{task.rank}")
                process.start()
                theirs.close()
                self.pipes[task.rank], self.processes[task.rank] = ours, process

    def wait(self) -> str:
        """Until every rank has ended or reported a value; says why it stopped earlier, if it did."""
        deadline = self.started + self.timeout_s
        while running := [rank for rank in self.processes if rank not in self.ended]:
            limit = min(deadline, self._first_failure() + self.grace_s)
            left = limit - time.monotonic()
            if left <= 0:
                late = limit == deadline
                self._kill(running, dump=late)
                if late:
                    return f"rank {', '.join(map(str, running))} still running after timeout_s={self.timeout_s:g}"
                return ""
            handles: dict[Any, int] = {}
            for rank in running:
                handles[self.pipes[rank]] = rank
                handles[self.processes[rank].sentinel] = rank
            for rank in {handles[ready] for ready in connection.wait(list(handles), left)}:
                self._hear(rank)
        return ""

    def _hear(self, rank: int) -> None:
        with contextlib.suppress(EOFError, OSError):
            if self.pipes[rank].poll():
                self.reports[rank] = _transfer.loads(self.pipes[rank].recv_bytes())
        if rank not in self.reports:
            self.processes[rank].join(self.timeout_s)  # the pipe is closed: it is on its way out
        self.ended[rank] = time.monotonic() - self.started

    def _first_failure(self) -> float:
        failed = [at for rank, at in self.ended.items() if rank not in self.reports or not _fine(self.reports[rank])]
        return self.started + min(failed) if failed else float("inf")

    def _kill(self, ranks: list[int], *, dump: bool) -> None:
        if dump and hasattr(signal, "SIGUSR1"):
            for rank in ranks:
                self._signal(rank, signal.SIGUSR1)
            time.sleep(_DUMP_S)
        for rank in ranks:
            self.killed.add(rank)
            self.ended[rank] = time.monotonic() - self.started
            self._signal(rank, signal.SIGKILL)

    def _signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """Release the ranks that wait, then leave no process behind."""
        for pipe in self.pipes.values():
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        for rank, process in self.processes.items():
            process.join(0.0 if rank in self.killed or rank not in self.ended else 5.0)
            if process.exitcode is None:
                self._signal(rank, signal.SIGKILL)
                process.join()
        for pipe in self.pipes.values():
            pipe.close()

    def result(self) -> RunResult:
        outcomes = tuple(self._outcome(task) for task in self.tasks)
        return RunResult(outcomes, time.monotonic() - self.started)

    def _outcome(self, task: RankTask) -> RankOutcome:
        rank = task.rank
        report = self.reports.get(rank)
        seconds = self.ended.get(rank, 0.0)
        output, stacks = _read(task.output), _read(task.stacks)
        if report is None:
            kind: Literal["killed", "died"] = "killed" if rank in self.killed else "died"
            code = self.processes[rank].exitcode
            return RankOutcome(rank, kind, exit_code=code, output=output, stacks=stacks, seconds=seconds)
        if _fine(report):
            return RankOutcome(rank, "returned", _transfer.loads(report.value or b""), output=output, seconds=seconds)
        return RankOutcome(
            rank,
            "raised",
            error_types=report.error_types,
            text=report.text,
            traceback=report.traceback,
            output=output,
            seconds=seconds,
        )


def _fine(report: Report) -> bool:
    return report.value is not None


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _echo(result: RunResult) -> None:
    """Pass on what the ranks printed, so that pytest captures it with the test's own output."""
    for outcome in result.outcomes:
        for line in outcome.output.splitlines():
            print(f"[rank {outcome.rank}] {line}")


@contextlib.contextmanager
def _rank_server() -> Iterator[multiprocessing.context.ForkServerContext]:
    """The context whose server has imported torch; starts that server with the first process.

    Meanwhile `__main__` is an empty module: a rank finds its function by file, so running the test's main
    program (pytest, or a script without a guard) again in every rank would be waste, or worse.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zs_comm.testing._preload"])
    main, threads = sys.modules["__main__"], os.environ.get("OMP_NUM_THREADS")
    _shorten_socket_paths()
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP reads it when torch is imported, which is in the server
    try:
        yield context
    finally:
        sys.modules["__main__"] = main
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def _shorten_socket_paths() -> None:
    """Where TMPDIR is a long path (nox, build systems), multiprocessing's own folder lies in /tmp all the same.

    It is made once per process; the server listens on a socket in it, whose path the system bounds.
    """
    if os.name != "posix" or len(os.fsencode(tempfile.gettempdir())) <= _SOCKET_FOLDER_LENGTH:
        return
    usual, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual
