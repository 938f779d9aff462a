"""The plain implementations of `BlockStore`: in memory, and in one ordinary file.

Both are complete and portable; they are also what a faster store is tested against.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING

from .block_store import PROTOCOL, BlockStore, Ticket
from .page_cache import PageCache

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["BlockStore", "FileStore", "MemoryStore", "Ticket", "aligned_buffer"]

_MAX_TRANSFER = 1 << 30  # bytes per system call; Linux moves at most 0x7ffff000


def aligned_buffer(nbytes: int, alignment: int = mmap.PAGESIZE) -> memoryview:
    """Private zeroed memory of `nbytes` bytes, its address a multiple of `alignment` (at most the page size)."""
    if nbytes < 0:
        raise ValueError(f"nbytes must not be negative: {nbytes}")
    if alignment < 1 or mmap.PAGESIZE % alignment:
        raise ValueError(f"alignment {alignment} must divide the page size, {mmap.PAGESIZE}")
    # MAP_PRIVATE: Python's default is shared, so that a forked child would write into its parent's block.
    pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(pages)[:nbytes]


def _as_bytes(buf: Buffer, *, writable: bool) -> memoryview:
    view = memoryview(buf)
    if not view.c_contiguous:
        raise BufferError("a block is moved from and to contiguous memory only")
    if writable and view.readonly:
        raise TypeError("cannot read a block into read-only memory")
    return view.cast("B") if view.nbytes else memoryview(bytearray())  # cast refuses a zero in the shape


class _Block:
    """One reserved block: where it is, whether anything is in it, and what is still to be done with it, in order."""

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.promised = False  # a write was issued: a read issued from now on finds a content
        self.failure: OSError | None = None  # the latest write's
        self.queue: deque[_Transfer] = deque()


class _Transfer:
    """The ticket of both stores: `move` runs on one of the store's threads (or at once, in memory)."""

    def __init__(self, view: memoryview, move: Callable[[memoryview], None], where: str = "in memory") -> None:
        self._view: memoryview | None = view
        self._nbytes = view.nbytes
        self._move = move
        self._where = where
        self._finished = threading.Event()
        self._failure: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._finished.is_set()

    def wait(self, timeout_s: float = 120.0) -> int:
        if not self._finished.wait(timeout_s):
            raise TimeoutError(f"a transfer of {self._nbytes} bytes is not done after {timeout_s} s ({self._where})")
        if self._failure is not None:
            raise self._failure
        return self._nbytes

    def run(self) -> None:
        try:
            if self._view is not None:
                self._move(self._view)
        except BaseException as error:  # it belongs to whoever waits, on another thread
            self._failure = error
        finally:
            self._view = None
            self._finished.set()


class _Blocks:
    """What both stores share: the table of blocks and the checks that are made before anything moves."""

    PROTOCOL = PROTOCOL

    def __init__(self, alignment: int) -> None:
        aligned_buffer(0, alignment)  # raises where no buffer could be aligned so
        self.alignment = alignment
        self._blocks: dict[str, _Block] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._owner = os.getpid()

    def buffer(self, nbytes: int) -> memoryview:
        self._check_open()
        return aligned_buffer(nbytes, self.alignment)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"this {type(self).__name__} is closed")
        if os.getpid() != self._owner:  # its threads and its file are the parent's
            raise ValueError(f"this {type(self).__name__} belongs to process {self._owner}: make one after the fork")

    def _new_blocks(self, blocks: Mapping[str, int]) -> dict[str, int]:
        """Those of `blocks` that are not there yet, checked."""
        for key, nbytes in blocks.items():
            have = self._blocks.get(key)
            if nbytes < 0:
                raise ValueError(f"block {key!r}: nbytes must not be negative: {nbytes}")
            if have is not None and have.nbytes != nbytes:
                raise ValueError(f"block {key!r} has {have.nbytes} bytes, not {nbytes}: discard it first")
        return {key: nbytes for key, nbytes in blocks.items() if key not in self._blocks}

    def _find(self, key: str, buf: Buffer, *, reading: bool) -> tuple[_Block, memoryview]:
        self._check_open()
        view = _as_bytes(buf, writable=reading)
        block = self._blocks.get(key)
        if block is None:
            raise KeyError(f"block {key!r} is not reserved")
        if view.nbytes != block.nbytes:
            raise ValueError(f"block {key!r} has {block.nbytes} bytes, the buffer has {view.nbytes}")
        if reading and not block.promised:
            raise KeyError(f"block {key!r} was never written")
        return block, view


class MemoryStore(_Blocks):
    """Blocks in this process's memory. A transfer is a copy made at once: each ticket is done when it is returned."""

    def __init__(self, *, alignment: int = 64) -> None:
        super().__init__(alignment)
        self._content: dict[str, memoryview] = {}

    def reserve(self, blocks: Mapping[str, int]) -> None:
        with self._lock:
            self._check_open()
            content = {key: aligned_buffer(nbytes) for key, nbytes in self._new_blocks(blocks).items()}
            self._content |= content
            self._blocks |= {key: _Block(0, view.nbytes) for key, view in content.items()}

    def write(self, key: str, buf: Buffer) -> Ticket:
        with self._lock:
            block, view = self._find(key, buf, reading=False)
            block.promised = True
            content = self._content[key]

            def move(source: memoryview) -> None:
                content[:] = source

            return self._at_once(view, move)

    def read(self, key: str, buf: Buffer) -> Ticket:
        with self._lock:
            _, view = self._find(key, buf, reading=True)
            content = self._content[key]

            def move(target: memoryview) -> None:
                target[:] = content

            return self._at_once(view, move)

    def discard(self, key: str) -> None:
        with self._lock:
            self._check_open()
            self._blocks.pop(key, None)
            self._content.pop(key, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._blocks.clear()
            self._content.clear()

    @staticmethod
    def _at_once(view: memoryview, move: Callable[[memoryview], None]) -> Ticket:
        transfer = _Transfer(view, move)
        transfer.run()
        return transfer


class FileStore(_Blocks):
    """Blocks in one preallocated file, moved by `threads` threads with ordinary (buffered) reads and writes.

    The file must not exist (`FileExistsError`); `close` removes it. `timeout_s` bounds the waits of `discard`
    and `close`. Writes are not synced: the content is scratch, it need not survive the machine.

    `cache_nbytes` (at least a page per thread; None: no bound) is how much of the file the page cache may hold at a
    time: each transfer then goes in parts, each part written to the device and dropped from the cache at once. For
    use under a memory limit that page cache counts against.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 2,
        alignment: int = 4096,
        timeout_s: float = 120.0,
        cache_nbytes: int | None = None,
    ) -> None:
        super().__init__(alignment)
        if threads < 1:
            raise ValueError(f"threads must be at least 1: {threads}")
        self._part_nbytes = _MAX_TRANSFER
        if cache_nbytes is not None:
            pages = cache_nbytes // threads // mmap.PAGESIZE
            if pages < 1:
                raise ValueError(f"cache_nbytes {cache_nbytes}: at least {threads * mmap.PAGESIZE}, a page per thread")
            self._part_nbytes = min(pages * mmap.PAGESIZE, _MAX_TRANSFER)
        self.cache_nbytes = cache_nbytes
        # a page of the cache belongs to one block, so that dropping it takes nothing of another one's transfer
        self._extent = alignment if cache_nbytes is None else max(alignment, mmap.PAGESIZE)
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._cache = None if cache_nbytes is None else PageCache(self._fd)
        self._nbytes = 0  # length of the file
        self._free: list[tuple[int, int]] = []  # (offset, nbytes) of discarded blocks
        self._idle = threading.Condition(self._lock)
        self._ready: SimpleQueue[_Block | None] = SimpleQueue()
        # daemons: a device that never answers must not keep the interpreter from ending
        self._threads = [
            threading.Thread(target=self._serve, name=f"{self.path}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def reserve(self, blocks: Mapping[str, int]) -> None:
        with self._lock:
            self._check_open()
            free, end, placed = list(self._free), self._nbytes, {}
            for key, nbytes in self._new_blocks(blocks).items():
                extent = self._padded(nbytes)
                fit = next((hole for hole in free if hole[1] >= extent), None)
                if fit is None:
                    offset, end = end, end + extent
                else:
                    free.remove(fit)
                    offset = fit[0]
                    if fit[1] > extent:
                        free.append((offset + extent, fit[1] - extent))
                placed[key] = _Block(offset, nbytes)
            self._grow(end)
            self._free = free
            self._blocks |= placed

    def _padded(self, nbytes: int) -> int:
        return -(-nbytes // self._extent) * self._extent

    def _grow(self, nbytes: int) -> None:
        if nbytes <= self._nbytes:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, self._nbytes, nbytes - self._nbytes)
            else:  # macOS: the length at least
                os.ftruncate(self._fd, nbytes)
            if self._cache is not None:  # where a file system cannot allocate, libc writes
                self._cache.drop(self._nbytes, nbytes - self._nbytes, dirty=True)
        except OSError as error:
            os.ftruncate(self._fd, self._nbytes)  # a failed allocation keeps the part it found
            raise self._error(error, "reserving", self._nbytes, nbytes - self._nbytes, 0) from error
        self._nbytes = nbytes

    def write(self, key: str, buf: Buffer) -> Ticket:
        with self._lock:
            block, view = self._find(key, buf, reading=False)
            block.promised = True
            return self._issue(block, view, lambda source: self._write(block, source))

    def read(self, key: str, buf: Buffer) -> Ticket:
        with self._lock:
            block, view = self._find(key, buf, reading=True)
            return self._issue(block, view, lambda target: self._read(block, target))

    def discard(self, key: str) -> None:
        with self._lock:
            self._check_open()
            block = self._blocks.pop(key, None)
            if block is None:
                return
            self._drain([block])
            if block.nbytes:
                self._free.append((block.offset, self._padded(block.nbytes)))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if os.getpid() != self._owner:  # a forked child: the file and the transfers are its parent's
                os.close(self._fd)
                return
            with contextlib.suppress(FileNotFoundError):  # its folder may have gone
                os.unlink(self.path)
            self._drain(list(self._blocks.values()))  # raises where a thread is stuck; the descriptor then stays open
        for _ in self._threads:
            self._ready.put(None)
        deadline = time.monotonic() + self.timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        os.close(self._fd)

    # -- the order of transfers: a block is handed to a thread while it has any, one at a time ------------------------

    def _issue(self, block: _Block, view: memoryview, move: Callable[[memoryview], None]) -> Ticket:
        transfer = _Transfer(view, move, f"{self.path!r} at offset {block.offset}")
        block.queue.append(transfer)
        if len(block.queue) == 1:
            self._ready.put(block)
        return transfer

    def _serve(self) -> None:
        while (block := self._ready.get()) is not None:
            block.queue[0].run()
            with self._idle:
                block.queue.popleft()
                if block.queue:
                    self._ready.put(block)
                else:
                    self._idle.notify_all()

    def _drain(self, blocks: list[_Block]) -> None:
        if not self._idle.wait_for(lambda: not any(block.queue for block in blocks), self.timeout_s):
            waiting = sum(len(block.queue) for block in blocks)
            raise TimeoutError(f"{self.path}: {waiting} transfers are not done after {self.timeout_s} s")

    # -- one transfer, on one of the threads --------------------------------------------------------------------------

    def _write(self, block: _Block, source: memoryview) -> None:
        done = 0
        try:
            while done < block.nbytes:
                moved = os.pwrite(self._fd, source[done : done + self._part_nbytes], block.offset + done)
                if moved == 0:
                    raise OSError(errno.EIO, "nothing was written")
                if self._cache is not None:
                    self._cache.drop(block.offset + done, moved, dirty=True)
                done += moved
        except OSError as error:
            block.failure = self._error(error, "writing", block.offset, block.nbytes, done)
            raise block.failure from error
        block.failure = None

    def _read(self, block: _Block, target: memoryview) -> None:
        if block.failure is not None:  # neither the old content nor the new one
            raise OSError(block.failure.errno, f"the block was not written: {block.failure.strerror}", self.path)
        done = 0
        try:
            while done < block.nbytes:
                moved = os.preadv(self._fd, [target[done : done + self._part_nbytes]], block.offset + done)
                if moved == 0:
                    raise OSError(errno.EIO, "unexpected end of file")
                if self._cache is not None:
                    self._cache.drop(block.offset + done, moved, dirty=False)
                done += moved
        except OSError as error:
            raise self._error(error, "reading", block.offset, block.nbytes, done) from error

    def _error(self, error: OSError, doing: str, offset: int, nbytes: int, done: int) -> OSError:
        """`error` with what it lacks; `OSError` picks its subclass by the number."""
        text = f"{error.strerror} while {doing} {nbytes} bytes at offset {offset} ({done} done)"
        return OSError(error.errno, text, self.path)
