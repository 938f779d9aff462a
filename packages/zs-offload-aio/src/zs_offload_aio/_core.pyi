"""The extension module. What users meet of it is `zs_offload_aio.Engine`, `File`, `Ticket`, `Pool` and `optim`."""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self, final

from .arrays import Array

# ---- engine ----------------------------------------------------------------------------------------------------------

def probe(name: str, /) -> str:
    """Why a backend does not work here; empty where it does. It is tried with an I/O."""

class Engine:
    """The engine in C; see `zs_offload_aio.Engine`."""

    def __init__(self, backend: str, chunk_nbytes: int = 0, depth: int = 0, threads: int = 0) -> None: ...
    @property
    def backend(self) -> str:
        """What carries the transfers: io_uring, libaio, threads or plain."""
    @property
    def closed(self) -> bool: ...
    def open_file(self, path: str | os.PathLike[str], flags: int, permissions: int, direct: bool, /) -> File: ...
    def drain(self, timeout_s: float = 120.0) -> None:
        """Wait until nothing is in flight. `TimeoutError` where no transfer ended for `timeout_s` seconds."""
    def stats(self) -> dict[str, Any]: ...
    def close(self, timeout_s: float = 120.0) -> None:
        """Cancel the reads, finish the writes, give everything back. May be called again.

        `TimeoutError` where no transfer ended for `timeout_s` seconds: it can be called again.
        """

@final
class File:
    """A file of an engine; made by `Engine.open`."""

    @property
    def path(self) -> str:
        """As it was given."""
    @property
    def mode(self) -> Literal["direct", "buffered"]:
        """Whether what is aligned bypasses the page cache."""
    @property
    def reason(self) -> str:
        """Why it is not direct; empty where it is."""
    @property
    def offset_alignment(self) -> int:
        """Bytes: what direct transfers need of offset and length; 1 where there are none."""
    @property
    def memory_alignment(self) -> int:
        """Bytes: what direct transfers need of an address; others are copied on the way."""
    @property
    def size(self) -> int:
        """Bytes, now."""
    @property
    def closed(self) -> bool: ...
    def read(self, buffer: Any, offset: int = 0) -> Ticket:
        """Start filling `buffer` with the bytes from `offset` on.

        `buffer`: writable and contiguous (bytearray, memoryview, numpy, torch, DLPack), or a list or tuple of such,
        filled one after the other. Raises `TypeError` for what is read-only or not contiguous, `ValueError` for an
        offset below 0 or an end beyond 2**63 - 1. The ticket raises `ShortRead` where the file ends before.
        """
    def write(self, buffer: Any, offset: int = 0, *, snapshot: bool = False) -> Ticket:
        """Start writing the bytes of `buffer`, or of a list or tuple of buffers one after the other, at `offset`.

        They must not change until the ticket is done, unless `snapshot` copies them first. Raises as `read` does. The
        error of a ticket that was dropped before it was done is raised by the next `flush` or `close`.
        """
    def preallocate(self, nbytes: int, /) -> bool:
        """Take the space of the first `nbytes` bytes now: `AioError` (ENOSPC) where there is not enough.

        True: taken. False: the file system cannot, and only the size was set.
        """
    def truncate(self, nbytes: int, /) -> None:
        """Set the size, in bytes."""
    def flush(self, level: Literal["none", "data", "full"] = "data", *, timeout_s: float = 120.0) -> None:
        """Wait for this file's writes, then make them durable.

        "none": nothing more; "data": fdatasync; "full": fsync, of the folder too, as a new file needs. A sync that
        failed has lost data that no later one brings back: it is never tried again, and the same error is raised for
        ever. `timeout_s`: longest time, in seconds, in which no transfer ends.
        """
    def close(self) -> None:
        """Wait for this file's transfers and close it. May be called again."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

@final
class Ticket:
    """One transfer. It holds its buffers until it is done."""

    @property
    def done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
    @property
    def state(self) -> Literal["pending", "done", "failed", "cancelled"]: ...
    @property
    def nbytes(self) -> int:
        """Bytes asked for."""
    @property
    def done_nbytes(self) -> int:
        """Bytes transferred so far."""
    @property
    def chunks(self) -> int:
        """Parts begun so far."""
    def wait(self, timeout_s: float = 120.0) -> int:
        """Bytes transferred: all of them. May be called again, from any thread.

        Raises `AioError` where the transfer failed, `ShortRead` where the file ended before, `AioCancelled`, at every
        call; `TimeoutError` where it is not done after `timeout_s` seconds (it goes on).
        """
    def result(self) -> int:
        """`wait(0)`."""
    def cancel(self) -> bool:
        """Begin nothing more of it. True: it ends as cancelled, once what is in flight has ended; False: too late."""

# ---- memory -------------------------------------------------------------------------------------------------------

class Pool:
    """Aligned memory; see zs_offload_aio.Pool."""

    def __init__(self, alignment: int = 4096, arena_nbytes: int = 0, lock: bool = False) -> None: ...
    @property
    def alignment(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def buffer(self, nbytes: int, /) -> memoryview: ...
    def trim(self) -> int: ...
    def stats(self) -> dict[str, int | str | bool]: ...
    def close(self) -> None: ...

class View:
    """Memory that `owner` keeps alive, as a buffer of bytes; `owner` is held while any buffer of it lives.

    `finish` is an attribute only where one was given: what to call after a read into the memory.
    """

    finish: Callable[[], None]
    def __init__(
        self, address: int, nbytes: int, owner: object, readonly: bool, finish: Callable[[], None] | None = None
    ) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def from_dlpack(capsule: object, readonly_default: bool, /) -> View:
    """The memory of a capsule as a buffer of bytes; consumes it. TypeError: not contiguous, not on the host."""

# ---- optimizer kernels: positional only; numbers are checked by optim.py and torch.py --------------------------------
# An array is (address, numel, "float32" | "bfloat16" | "float16"), or an exporter of the buffer protocol whose elements
# are "f", "e" or "H" (bits of bfloat16). `threads`: how many; negative: at most so many; 0: at most as many as there
# are processors, and 8. `isa` None: $ZS_ISA, or the best. TypeError: dtypes, None; ValueError: sizes, contiguity,
# overlaps, an `isa` that this processor lacks.

def adamw(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    out: Array | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factor: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def adam(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    out: Array | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factor: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def adagrad(
    param: Array,
    grad: Array,
    total: Array,
    out: Array | None,
    step: int,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    factor: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def lion(
    param: Array,
    grad: Array,
    exp_avg: Array,
    out: Array | None,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    factor: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def sgd(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None,
    out: Array | None,
    first_step: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    factor: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def sum_of_squares(grad: Array, threads: int, isa: str | None, /) -> float: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def adam_many(steps: list[tuple[int, bool, tuple[object, ...]]], /) -> None:
    """Steps of (a number for messages, whether `adamw` or `adam`, its arguments): all are checked before the first."""
