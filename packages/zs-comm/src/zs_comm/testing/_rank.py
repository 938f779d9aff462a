"""The rank's side of the harness: one process, from the fork to the report it sends back."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import FileStore

from zs_comm.testing import _transfer
from zs_comm.testing._transfer import FunctionRef


class WarningFilter(NamedTuple):
    """The arguments of `warnings.filterwarnings`."""

    action: Any
    message: str
    category: type[Warning]
    module: str
    lineno: int

    @classmethod
    def active(cls) -> tuple[WarningFilter, ...]:
        """This process's filters, the first to match first: what is an error in a test is one in its ranks."""
        return tuple(
            cls(action, _pattern(message), category, _pattern(module), line)
            for action, message, category, module, line in warnings.filters
            if isinstance(category, type)
        )


def _pattern(regex: Any) -> str:
    return str(getattr(regex, "pattern", regex) or "")


@dataclass(frozen=True)
class RankTask:
    """Everything a rank needs; plain values, so that it pickles before anything is imported."""

    fn: FunctionRef
    arguments: bytes  # pickled (args, kwargs)
    rank: int
    world: int
    folder: str  # of the run: the rendezvous file, and each rank's output and stacks
    cwd: str
    environ: dict[str, str]
    warnings: tuple[WarningFilter, ...]
    backend: str
    comm_timeout_s: float

    @property
    def rendezvous(self) -> str:
        return str(Path(self.folder) / "rendezvous")

    @property
    def output(self) -> Path:
        return Path(self.folder) / f"rank{self.rank}.out"

    @property
    def stacks(self) -> Path:
        return Path(self.folder) / f"rank{self.rank}.stacks"


@dataclass(frozen=True)
class Report:
    """What a rank sends back: a value (pickled), or an error as text that needs no unpickling."""

    value: bytes | None = None
    error_types: tuple[str, ...] = ()  # the exception's class and its bases, most derived first
    text: str = ""
    traceback: str = ""


def rank_main(task: RankTask, pipe: Connection) -> None:
    """Target of the rank's process. A rank that returned stays until its peers have finished too."""
    with _prepared(task):
        report = _run(task)
        failed = report.value is None
        pipe.send_bytes(_transfer.dumps(report))
        if not failed:
            _await_release(pipe)  # leaving now would close the connections that a slower peer still uses
            _shutdown()
    if failed:
        os._exit(1)  # at once, as a crashing script would leave: peers must cope with it


def _run(task: RankTask) -> Report:
    fn: Callable[..., Any] | None = None
    try:
        fn = task.fn.load()
        args, kwargs = _transfer.loads(task.arguments)
        group = _init(task)
        return Report(value=_transfer.dumps(fn(group, *args, **kwargs)))
    except (Exception, KeyboardInterrupt) as error:
        types = tuple(cls.__name__ for cls in type(error).__mro__ if cls is not object)
        return Report(error_types=types, text=str(error), traceback=_traceback(error, task.fn.path))


def _init(task: RankTask) -> Any:
    from zs_comm.launch import init_distributed  # here: the harness's other parts work without it

    store = FileStore(task.rendezvous, task.world)
    group = init_distributed(task.backend, store=store, rank=task.rank, world=task.world, timeout_s=task.comm_timeout_s)
    # A rank is connected before its slower peers are: one whose function leaves at once would break theirs off.
    store.set(f"connected/{task.rank}", "")
    store.wait([f"connected/{rank}" for rank in range(task.world)], timedelta(seconds=task.comm_timeout_s))
    return group


def _shutdown() -> None:
    from zs_comm.launch import shutdown

    shutdown()


@contextlib.contextmanager
def _prepared(task: RankTask) -> Iterator[None]:
    """The test's environment, folder and one thread; output and stack dumps into the run's folder."""
    os.environ.clear()
    os.environ.update(task.environ)
    os.chdir(task.cwd)
    with task.stacks.open("w") as stacks, task.output.open("w", buffering=1) as output:
        faulthandler.enable(stacks)
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        os.dup2(output.fileno(), 1)  # the descriptors, so that C++ logging is kept too
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        _die_with_parent()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        warnings.resetwarnings()
        for each in reversed(task.warnings):
            warnings.filterwarnings(*each)
        yield
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        faulthandler.disable()
        if hasattr(signal, "SIGUSR1"):
            faulthandler.unregister(signal.SIGUSR1)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="zs-parent-watch", daemon=True).start()


def _await_release(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()


def _traceback(error: BaseException, path: str) -> str:
    """The traceback without the harness's frames, and the locals of the test's own innermost frame.

    The locals stand in for pytest's rewritten asserts, which a rank does not have.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [index for index, (frame, _) in enumerate(frames) if frame.f_code.co_filename == path]
    tb = error.__traceback__
    for _ in range(own[0] if own else 0):
        tb = tb.tb_next if tb is not None else None
    lines = traceback.format_exception(type(error), error, tb)
    if own:
        frame = frames[own[-1]][0]
        lines.append(f"locals of {frame.f_code.co_name}, line {frames[own[-1]][1]}:\n")
        lines += [f"    {name} = {_short(value)}\n" for name, value in frame.f_locals.items()]
    return "".join(lines)


def _short(value: Any, limit: int = 200) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= limit else text[:limit] + " ..."
