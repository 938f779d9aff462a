"""The engine: asynchronous reads and writes of files.

    with Engine() as engine, engine.open("weights.bin") as file:
        ticket = file.read(buffer, offset=4096)    # at once
        ...                                        # meanwhile
        ticket.wait()                              # the exact bytes are in `buffer`, or an AioError says what happened

Requests that overlap, one of them a write, take effect in the order in which they were issued; all others run at the
same time, from one queue for all buffers and files. Buffers must not change until their ticket is done (`write(...,
snapshot=True)` copies them first), and are held until then.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import File, Ticket

if TYPE_CHECKING:
    from types import TracebackType

BACKENDS = ("io_uring", "libaio", "threads", "plain")
"""In order of preference."""

_MODES = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "rw": os.O_RDWR | os.O_CREAT,
    "w": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}


def backends() -> dict[str, str]:
    """Each backend and why it does not work here; an empty text where it does. Each is tried with an I/O."""
    return {name: _core.probe(name) for name in BACKENDS}


class Engine(_core.Engine):
    """Carries transfers between files and memory. Safe to use from several threads; not after a fork.

    `backend`: one of `BACKENDS`; by default that of `ZS_AIO_BACKEND`, or the first that works. `chunk_nbytes` (a
    multiple of 4096) and `depth` (transfers in flight, at most 256): by default calibrated, device by device, on the
    traffic itself (`stats()["calibration"]`). `threads`: of the thread backend.

    Raises `BackendUnavailable` where the backend that was asked for does not work, `ValueError` for an unknown one or
    an option out of its range.
    """

    def __new__(cls, **_options: Any) -> Engine:
        return super().__new__(cls)

    def __init__(
        self,
        *,
        backend: str | None = None,
        chunk_nbytes: int | None = None,
        depth: int | None = None,
        threads: int | None = None,
    ) -> None:
        asked = backend or os.environ.get("ZS_AIO_BACKEND")
        if asked and asked not in BACKENDS:
            source = "backend" if backend else "ZS_AIO_BACKEND"
            raise ValueError(f"{source} {asked!r}: one of {', '.join(BACKENDS)}")
        if chunk_nbytes is not None and not (4096 <= chunk_nbytes <= 2**30 and chunk_nbytes % 4096 == 0):
            raise ValueError(f"chunk_nbytes {chunk_nbytes}: a multiple of 4096 from 4096 to 2**30")
        if depth is not None and not 1 <= depth <= 256:
            raise ValueError(f"depth {depth}: from 1 to 256")
        if threads is not None and not 1 <= threads <= 256:
            raise ValueError(f"threads {threads}: from 1 to 256")
        self._why_not: dict[str, str] = {}
        name = asked or self._first_that_works()
        super().__init__(name, chunk_nbytes or 0, depth or 0, threads or 0)
        # before the interpreter tears down: transfers must end while there is someone to tell
        weakref.finalize(self, _close_at_exit, weakref.ref(self), os.getpid())

    def _first_that_works(self) -> str:
        for name in BACKENDS:
            reason = _core.probe(name)
            if not reason:
                return name
            self._why_not[name] = reason
        raise OSError(f"no backend works here: {self._why_not}")

    def open(
        self, path: str | os.PathLike[str], mode: str = "r", *, direct: bool = True, permissions: int = 0o600
    ) -> File:
        """Open a file.

        `mode`: "r" read, "r+" read and write, "rw" the same and created where it is missing, "w" created or
        truncated, "x" new. `direct`: bypass the page cache where the file allows it; `File.mode` says whether it
        does, `File.reason` why not. Raises `AioError`, also a `FileNotFoundError` and so on.
        """
        if mode not in _MODES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(_MODES)}")
        return self.open_file(path, _MODES[mode], permissions, direct)

    def read(self, file: File | str | os.PathLike[str], buffer: Any, offset: int = 0) -> Ticket:
        """`File.read`, also by path."""
        return (file if isinstance(file, File) else self.open(file)).read(buffer, offset)

    def write(
        self, file: File | str | os.PathLike[str], buffer: Any, offset: int = 0, *, snapshot: bool = False
    ) -> Ticket:
        """`File.write`, also by path: the file is created where it is missing and never truncated."""
        return (file if isinstance(file, File) else self.open(file, "rw")).write(buffer, offset, snapshot=snapshot)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, in bytes and numbers; the backend and why better ones were passed over; the
        calibration of each device and direction."""
        return {**super().stats(), "why_not": dict(self._why_not)}

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close_at_exit(reference: weakref.ref[Engine], pid: int) -> None:
    engine = reference()
    if engine is not None and os.getpid() == pid:
        engine.close()
