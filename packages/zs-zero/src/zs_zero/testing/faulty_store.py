"""A store that fails where a test says: the n-th read, write or reservation of chosen keys."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..block_store import PROTOCOL, BlockStore, Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer

Operation: TypeAlias = Literal["read", "write", "reserve"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Fail one operation, or with `count` several in a row.

    `number`: which of the operations `op` whose key `keys` accepts, from 0 and counted since the store was made.
    `error`: the `errno`, or "hang" for a transfer that does not end before `FaultyStore.release`. `early`: raise from
    the call itself instead of from its ticket, as a full queue or a closed file does.
    """

    op: Operation
    number: int = 0
    count: int = 1
    error: int | Literal["hang"] = errno.EIO
    keys: Callable[[str], bool] | None = None
    early: bool = False

    def meets(self, op: str, key: str) -> bool:
        """Whether the operation is one of those that are counted."""
        return op == self.op and (self.keys is None or self.keys(key))


class FaultyStore:
    """`store`, but for `faults`. Keeps the Protocol `BlockStore`; deterministic as far as its calls are.

    A failed write leaves neither the old content nor the new one: half of the new bytes and rubbish, which no read
    returns (it raises, as the real stores do) until the block is written again. A failed read leaves rubbish in the
    target. Errors carry errno, `path` and the block's offset, as a file's do.

    `operations`: every call so far, `(op, key)`, so that a run without faults tells how many there are to fail:
    `store.count("write")`.
    """

    PROTOCOL = PROTOCOL

    def __init__(self, store: BlockStore, faults: Iterable[Fault] = (), *, path: str = "/faulty/blocks") -> None:
        self.store = store
        self.faults = list(faults)
        self.path = path
        self.operations: list[tuple[str, str]] = []
        self.alignment = store.alignment
        self._counts: dict[str, int] = {}
        self._offsets: dict[str, tuple[int, int]] = {}  # (offset, nbytes)
        self._lost: dict[str, OSError] = {}
        self._hanging: list[_Hanging] = []
        self._lock = threading.RLock()

    def count(self, op: Operation, keys: Callable[[str], bool] | None = None) -> int:
        """How many operations `op`, on keys that `keys` accepts, were called so far."""
        if keys is None:
            return self._counts.get(op, 0)
        return sum(Fault(op=op, keys=keys).meets(*call) for call in self.operations)

    def fail_next(self, op: Operation, *, error: int | Literal["hang"] = errno.EIO, early: bool = False) -> None:
        """Fail the next operation `op`, whatever was before."""
        self.faults.append(Fault(op=op, number=self.count(op), error=error, early=early))

    def release(self) -> None:
        """Let what hangs go on, as if nothing had been; no fault applies to it any more."""
        with self._lock:
            hanging, self._hanging = self._hanging, []
            for ticket in hanging:
                ticket.go_on()

    def buffer(self, nbytes: int) -> memoryview:
        """See `BlockStore.buffer`."""
        return self.store.buffer(nbytes)

    def reserve(self, blocks: Mapping[str, int]) -> None:
        """See `BlockStore.reserve`; counted once for each key."""
        with self._lock:
            faults = [fault for key in blocks if (fault := self._meet("reserve", key)) is not None]
            end = sum(nbytes for _, nbytes in self._offsets.values())
            if faults:
                raise self._error(faults[0], "reserving", end, sum(blocks.values()))
            self.store.reserve(blocks)
            for key, nbytes in blocks.items():
                self._offsets.setdefault(key, (end, nbytes))
                end += nbytes

    def write(self, key: str, buf: Buffer) -> Ticket:
        """See `BlockStore.write`."""
        with self._lock:
            fault = self._meet("write", key)
            if fault is None:
                return self._write(key, buf)
            at, nbytes = self._where(key)
            error = self._error(fault, "writing", at, nbytes)
            if fault.early:
                raise error
            if fault.error == "hang":
                return self._hang(lambda: self._write(key, buf), nbytes, at)
            rubbish = bytearray(memoryview(buf).cast("B"))
            rubbish[nbytes // 2 :] = b"\xa5" * (nbytes - nbytes // 2)
            inner = self.store.write(key, rubbish)
            self._lost[key] = error
            return _Failing(inner, error)

    def read(self, key: str, buf: Buffer) -> Ticket:
        """See `BlockStore.read`."""
        with self._lock:
            fault = self._meet("read", key)
            lost = self._lost.get(key)
            if fault is None and lost is None:
                return self.store.read(key, buf)
            at, nbytes = self._where(key)
            error = lost if fault is None else self._error(fault, "reading", at, nbytes)
            if fault is not None and fault.early and error is not None:
                raise error
            if fault is not None and fault.error == "hang":
                return self._hang(lambda: self.store.read(key, buf), nbytes, at)
            inner = self.store.read(key, bytearray(nbytes))
            view = memoryview(buf).cast("B")
            view[: nbytes // 2] = b"\xa5" * (nbytes // 2)
            return _Failing(inner, error)

    def discard(self, key: str) -> None:
        """See `BlockStore.discard`."""
        with self._lock:
            self.store.discard(key)
            self._offsets.pop(key, None)
            self._lost.pop(key, None)

    def close(self) -> None:
        """See `BlockStore.close`; lets go of what hangs."""
        self.release()
        self.store.close()

    def _write(self, key: str, buf: Buffer) -> Ticket:
        ticket = self.store.write(key, buf)
        self._lost.pop(key, None)
        return ticket

    def _meet(self, op: Operation, key: str) -> Fault | None:
        found = None
        for fault in self.faults:
            if fault.meets(op, key) and fault.number <= self.count(op, fault.keys) < fault.number + fault.count:
                found = found or fault
        self.operations.append((op, key))
        self._counts[op] = self._counts.get(op, 0) + 1
        return found

    def _where(self, key: str) -> tuple[int, int]:
        if key not in self._offsets:
            raise KeyError(f"block {key!r} is not reserved")
        return self._offsets[key]

    def _error(self, fault: Fault, doing: str, offset: int, nbytes: int) -> OSError:
        number = errno.EIO if fault.error == "hang" else fault.error
        return OSError(number, f"{os.strerror(number)} while {doing} {nbytes} bytes at offset {offset}", self.path)

    def _hang(self, start: Callable[[], Ticket], nbytes: int, offset: int) -> Ticket:
        ticket = _Hanging(start, f"{nbytes} bytes at offset {offset} of {self.path}")
        self._hanging.append(ticket)
        return ticket


class _Failing:
    """A transfer that ends with `error`."""

    def __init__(self, inner: Ticket, error: OSError | None) -> None:
        self._inner = inner
        self._error = error

    @property
    def done(self) -> bool:
        return self._inner.done

    def wait(self, timeout_s: float = 120.0) -> int:
        moved = self._inner.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return moved


class _Hanging:
    """A transfer that begins when it is let go; a wait before that ends at once, so that tests need no time."""

    def __init__(self, start: Callable[[], Ticket], what: str) -> None:
        self._start = start
        self._what = what
        self._inner: Ticket | None = None

    def go_on(self) -> None:
        self._inner = self._start()

    @property
    def done(self) -> bool:
        return self._inner is not None and self._inner.done

    def wait(self, timeout_s: float = 120.0) -> int:
        if self._inner is None:
            raise TimeoutError(f"a transfer of {self._what} is not done after {timeout_s} s")
        return self._inner.wait(timeout_s)
