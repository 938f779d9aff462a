"""Blocks with two slots each: what is current, and what the step is writing.

    write("a", new)       -> the slot that is not current        read("a") still gives the old content
    write("b", new)       -> the slot that is not current
    commit()              both switch, by a change of a table    read("a") gives the new content
    rollback()            or neither does                        read("a") gives the old content, bit for bit

So a step that streams through files either happened or did not, at twice the space and no more traffic.

What an error leaves behind: a failed `write` leaves the current content as it was. A failed `overwrite` has no other
slot to fall back to: the block's content is lost, and every `read` raises the same error until it is written anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..block_store import BlockStore, Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer


class TierFiles:
    """Keyed blocks of one kind ("optimizer", "parameters", ...) over a `BlockStore`; used from one thread at a time.

    `name`: how errors call the store, its path by preference. Its tickets raise `OSError` of the store's own class with
    kind, key, path, offset and bytes in the text, and `TimeoutError` likewise. `close` closes the store.
    """

    def __init__(self, store: BlockStore, *, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        self.nbytes_read = 0  # bytes of the blocks, without padding, of every transfer that was issued
        self.nbytes_written = 0
        self.stall_s = 0.0  # seconds spent in `wait` of its tickets
        self._store = store
        self._blocks: dict[str, _Block] = {}
        self._pending: dict[str, _Transfer] = {}  # the latest write of each key since the last commit
        self._flying: deque[_Transfer] = deque()
        self._io_s = 0.0
        self._since = 0.0  # when the oldest of what is in flight was issued

    @property
    def io_s(self) -> float:
        """Seconds with at least one transfer in flight, from its issue until it was seen done."""
        self._look()
        return self._io_s + (time.perf_counter() - self._since if self._flying else 0.0)

    def reserve(self, blocks: Mapping[str, int], *, slots: int = 2) -> None:
        """Take space now for `{key: nbytes}`, all of it or none; with `slots=1` a block takes `overwrite` only.

        A key that is there keeps its content. Raises `OSError` where there is no space, `ValueError` for another size.
        """
        if slots not in (1, 2):
            raise ValueError(f"a block has 1 or 2 slots, not {slots}")
        wanted = {_slot(key, slot): nbytes for key, nbytes in blocks.items() for slot in range(slots)}
        with self._named(f"{sum(wanted.values()):,} bytes for {len(blocks):,} blocks of {self.kind}"):
            self._store.reserve(wanted)
        for key, nbytes in blocks.items():
            block = self._blocks.setdefault(key, _Block(key, nbytes))
            block.slots = max(block.slots, slots)

    def buffer(self, nbytes: int) -> memoryview:
        """Writable memory (format `B`) that the store moves fastest."""
        return self._store.buffer(nbytes)

    def has(self, key: str) -> bool:
        """Whether `read` finds a content."""
        block = self._blocks.get(key)
        return block is not None and block.current is not None

    def read(self, key: str, buf: Buffer) -> Ticket:
        """Start filling `buf` with the current content; `KeyError` where there is none."""
        block = self._find(key)
        if block.current is None:
            raise KeyError(f"{self.kind} block {key!r} was never written")
        if (lost := block.lost.get(block.current)) is not None:
            with self._named(f"{self.kind} block {key!r} is lost, its last write failed"):
                raise lost
        ticket = self._issue(block, block.current, buf, reading=True)
        self.nbytes_read += block.nbytes
        return ticket

    def write(self, key: str, buf: Buffer) -> Ticket:
        """Start writing what `commit` makes current. `buf` must not change before the ticket is done."""
        block = self._find(key)
        if block.slots < 2:
            raise ValueError(f"{self.kind} block {key!r} has one slot: overwrite it")
        ticket = self._pending[key] = self._issue(block, block.other, buf, reading=False)
        self.nbytes_written += block.nbytes
        return ticket

    def overwrite(self, key: str, buf: Buffer) -> Ticket:
        """Start replacing the current content where it is: what is read from now on is the new one.

        What `write` has pending for the key stays pending.
        """
        block = self._find(key)
        slot = block.current
        if slot is None:  # not where a pending write goes
            slot = 1 - block.other if key in self._pending else 0
        ticket = self._issue(block, slot, buf, reading=False)
        block.current = slot
        self.nbytes_written += block.nbytes
        return ticket

    def commit(self) -> None:
        """Make current what was written since the last commit: a change of a table, without I/O.

        It cannot fail once every ticket of `write` was waited for and returned. `RuntimeError`, and nothing is
        switched, where one was not, or raised.
        """
        for key, transfer in self._pending.items():
            if not transfer.succeeded:
                state = "failed" if transfer.failed else "was not waited for"
                raise RuntimeError(f"commit of {self.kind}: the write of block {key!r} {state}")
        for key, transfer in self._pending.items():
            self._blocks[key].current = transfer.slot
        self._pending.clear()

    def rollback(self) -> None:
        """Forget what was written since the last commit, in flight or done."""
        self._pending.clear()

    def close(self) -> None:
        """Close the store, after what is in flight; may be called again. `TimeoutError` where that does not end."""
        try:
            with self._named(f"closing the {self.kind} files"):
                self._store.close()
        finally:
            self._look()

    # -- one transfer -------------------------------------------------------------------------------------------------

    def _find(self, key: str) -> _Block:
        block = self._blocks.get(key)
        if block is None:
            raise KeyError(f"{self.kind} block {key!r} is not reserved")
        return block

    def _issue(self, block: _Block, slot: int, buf: Buffer, *, reading: bool) -> _Transfer:
        self._look()
        with self._named(f"{self.kind} block {block.key!r}"):
            start = self._store.read if reading else self._store.write
            inner = start(_slot(block.key, slot), buf)
        if not reading:
            block.lost.pop(slot, None)  # reads are ordered behind this write, which tells how it ended
        if not self._flying:
            self._since = time.perf_counter()
        transfer = _Transfer(self, block, slot, inner, reading=reading)
        self._flying.append(transfer)
        return transfer

    def _look(self) -> None:
        """Let go of what is done, and stop the clock where that was all."""
        if not self._flying:
            return
        self._flying = deque(one for one in self._flying if not one.done)
        if not self._flying:
            self._io_s += time.perf_counter() - self._since

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """An `OSError` of the body, again, with `what` in its text and a path in any case."""
        try:
            yield
        except OSError as error:
            raise _told(error, what, self.name) from error


class _Block:
    """Which of a block's slots is current, and which lost its content."""

    def __init__(self, key: str, nbytes: int) -> None:
        self.key = key
        self.nbytes = nbytes
        self.slots = 1
        self.current: int | None = None
        self.lost: dict[int, OSError] = {}

    @property
    def other(self) -> int:
        """The slot that the next `write` goes to."""
        return 0 if self.current is None else 1 - self.current


class _Transfer:
    """A ticket of the store, with the clock and the names of its `TierFiles`."""

    def __init__(self, files: TierFiles, block: _Block, slot: int, inner: Ticket, *, reading: bool) -> None:
        self.slot = slot
        self.succeeded = False
        self.failed = False
        self._files = files
        self._block = block
        self._inner = inner
        self._reading = reading

    @property
    def done(self) -> bool:
        return self._inner.done

    def wait(self, timeout_s: float = 120.0) -> int:
        files, block = self._files, self._block
        doing = "reading" if self._reading else "writing"
        began = time.perf_counter()
        try:
            with files._named(f"{doing} {files.kind} block {block.key!r} of {block.nbytes} bytes"):
                moved = self._inner.wait(timeout_s)
        except OSError as error:
            if not _goes_on(error):
                self.failed = True
                if not self._reading:
                    block.lost[self.slot] = error
            raise
        finally:
            files.stall_s += time.perf_counter() - began
            files._look()
        self.succeeded = True
        return moved


def _slot(key: str, slot: int) -> str:
    return f"{key}\0{'ab'[slot]}"


def _goes_on(error: OSError) -> bool:
    """Whether it is the wait that ended, not the transfer (a device's own ETIMEDOUT has a number)."""
    return isinstance(error, TimeoutError) and error.errno is None


def _told(error: OSError, what: str, name: str) -> OSError:
    """`error` with `what` and a path in its text, of the same class where that class shows the text it is given."""
    if _goes_on(error):
        text = f"{what}: {error}"
        return TimeoutError(text if name in text else f"{text} ({name})")
    path = name if error.filename is None else error.filename
    if type(error).__module__ == "builtins":
        return OSError(error.errno, f"{what}: {error.strerror or error}", path)  # its class follows from the number
    try:
        told = type(error)(error.errno, f"{what}: {error.strerror}", path)
    except TypeError:  # its constructor takes something else
        told = None
    if told is None or what not in str(told):
        told = OSError(error.errno, f"{what}: {error}", path)
    told.__dict__.update(error.__dict__)  # offset, nbytes
    return told
