"""How fast an engine moves a file, and how fast fio does: the measuring behind `bench` and `tune`."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter

from ._core import File, Ticket
from .buffers import Pool
from .engine import Engine

OPERATIONS = ("write", "read", "mixed")
_PIECE = 16 << 20  # bytes of one request: several chunks of any size that is tried
_MEMORY = 256 << 20  # bytes of buffers at most

Report = Callable[[int], None]  # called with bytes done


class FioFailedError(Exception):
    """fio is there and did not measure; the text is its last line."""


@dataclass(frozen=True)
class Rate:
    """One measurement."""

    nbytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """In 10^9 bytes per second."""
        return self.nbytes / max(self.seconds, 1e-9) / 1e9


class Buffers:
    """Aligned memory that requests of `_PIECE` bytes go through in turn, filled with bytes that do not compress."""

    def __init__(self, nbytes: int) -> None:
        self._pool = Pool()
        self.piece = min(_PIECE, nbytes)
        self.views = [self._pool.buffer(self.piece) for _ in range(max(1, min(_MEMORY, nbytes) // self.piece))]
        for number, view in enumerate(self.views):
            view[:] = random.Random(number).randbytes(self.piece)


@contextmanager
def scratch_file(folder: str) -> Iterator[str]:
    """The path of a new empty file in the folder, which is gone afterwards."""
    path = os.path.join(folder, f"zs-bench-{os.getpid()}-{secrets.token_hex(6)}.tmp")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield path
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def fill(engine: Engine, path: str, nbytes: int, buffers: Buffers, report: Report) -> Rate:
    """First write of a new file: its space is taken (`OSError` where there is too little), not timed, then written."""
    with engine.open(path, "r+") as file:
        file.preallocate(nbytes)
        return run(file, "write", nbytes, buffers, report)


def run(file: File, operation: str, nbytes: int, buffers: Buffers, report: Report) -> Rate:
    """Move the first `nbytes` bytes of the file: `read`; `write`, with a data sync at the end; `mixed`: every other
    piece is read and the others are written."""
    views, flying = buffers.views, deque[Ticket]()
    began = perf_counter()
    for number, offset in enumerate(range(0, nbytes, buffers.piece)):
        if len(flying) == len(views):
            report(flying.popleft().wait())
        view = views[number % len(views)][: nbytes - offset]
        reads = operation == "read" or (operation == "mixed" and number % 2 == 0)
        flying.append(file.read(view, offset) if reads else file.write(view, offset))
    while flying:
        report(flying.popleft().wait())
    if operation == "write":
        file.flush("data")
    return Rate(nbytes, perf_counter() - began)


# -- beside it ------------------------------------------------------------------------------------------------------

_FIO_ENGINES = {"io_uring": "io_uring", "libaio": "libaio", "threads": "psync", "plain": "psync"}


def fio_path() -> str | None:
    """Where fio is; None where it is not installed."""
    return shutil.which("fio")


def fio(path: str, operation: str, nbytes: int, *, backend: str, chunk_nbytes: int, depth: int, direct: bool) -> Rate:
    """The same by fio, over the file as it is; threads are so many jobs of psync. Raises `FioFailedError`."""
    command = [
        fio_path() or "fio",
        "--name=zs",
        "--output-format=json",
        "--thread",
        "--allow_file_create=0",
        f"--filename={path.replace(':', chr(92) + ':')}",  # a colon separates files
        f"--ioengine={_FIO_ENGINES[backend]}",
        f"--rw={'rw' if operation == 'mixed' else operation}",
        f"--bs={min(chunk_nbytes, nbytes)}",
        f"--iodepth={depth}",
        f"--size={nbytes}",
        f"--direct={int(direct)}",
        f"--invalidate={int(direct)}",
    ]
    if operation == "read":
        command.append("--readonly")
    else:
        command += ["--overwrite=1", "--refill_buffers=0", "--scramble_buffers=1"]
    if operation == "write":
        command.append("--end_fsync=1")
    jobs = max(1, min(depth, nbytes // chunk_nbytes)) if backend == "threads" else 1
    if jobs > 1:  # each its own part of the file
        share = nbytes // jobs // 4096 * 4096
        command += [f"--numjobs={jobs}", f"--size={share}", f"--offset_increment={share}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        if any(job["error"] for job in found):
            raise ValueError
        moved = [job[side] for job in found for side in ("read", "write") if job[side]["io_bytes"]]
        return Rate(sum(side["io_bytes"] for side in moved), max(side["runtime"] for side in moved) / 1e3)
    except (ValueError, KeyError, IndexError):
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FioFailedError(said[-1] if said else f"exit code {done.returncode}") from None
