"""Keyed blocks of bytes in one preallocated file: what an offloaded optimizer state lives in.

    reserve   space in the file, taken now: a full disk is found before training
    write     padded to whole 4096 bytes, so that every transfer can be direct
    read      ordered behind the write by the engine: the ranges overlap

A key is a name and nothing else; no path is ever made from one. The file has no name either (it is unlinked as soon as
it is open), so that nothing is left behind however the process ends.
"""

from __future__ import annotations

import errno
import operator
import os
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from .blocks import Block, BlockTicket
from .buffers import Pool
from .engine import Engine
from .errors import AioError
from .extents import Extents
from .views import nbytes_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK = 4096  # bytes: a direct write of part of a file system's block makes it read the rest
_MAX_OFFSET = 2**63 - 1


class NvmeStore:
    """Blocks in a file of the folder, moved by an `Engine`; safe to call from several threads.

    It keeps the Protocol `BlockStore` of zs-zero, version 1. `folder` must exist. `engine` is left open by `close`; by
    default the store has one of its own. `alignment` (bytes, a power of two, at least 64) is that of `buffer`'s
    memory, which is locked in RAM with `lock` as far as the limit allows. `keep` leaves the file in the folder.
    `direct=False` goes through the page cache. `timeout_s` bounds the waits of `discard` and `close`.

    `block_size` (bytes of one transfer, a multiple of 4096), `queue_depth` (transfers in flight), `threads` and
    `backend` are `chunk_nbytes`, `depth`, `threads` and `backend` of the `Engine` that the store makes for itself.

    Raises `OSError` with the path where the folder is missing, is no folder, or takes no file, `ValueError` for an
    option out of its range, or beside an `engine`. In a forked child every call but `close` raises `RuntimeError`.
    """

    PROTOCOL = 1

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        engine: Engine | None = None,
        alignment: int = _BLOCK,
        lock: bool = False,
        keep: bool = False,
        direct: bool = True,
        timeout_s: float = 120.0,
        block_size: int | None = None,
        queue_depth: int | None = None,
        threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        if engine is not None and (block_size, queue_depth, threads, backend) != (None,) * 4:
            raise ValueError("block_size, queue_depth, threads and backend are the engine's: give them, or an engine")
        self.alignment = alignment
        self.timeout_s = timeout_s
        self.path = _new_path(folder)
        self._pool = Pool(alignment=alignment, lock=lock)  # ValueError where alignment is none
        self._own_engine = engine is None
        self._engine = engine or Engine(backend=backend, chunk_nbytes=block_size, depth=queue_depth, threads=threads)
        try:
            self._file = self._engine.open(self.path, "x", direct=direct, permissions=0o600)
            if not keep:
                os.unlink(self.path)  # its space goes back to the disk with this process, even on kill -9
        except BaseException:
            if self._own_engine:
                self._engine.close()
            raise
        self._extents = Extents(max(_BLOCK, self._file.offset_alignment))
        self._blocks: dict[str, Block] = {}
        self._flying: deque[BlockTicket] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._released = False
        self._owner = os.getpid()
        self._failed_writes = 0
        self.preallocated = True

    preallocated: bool
    """Whether the space of every block is taken; False where the file system cannot: a full disk is then found late."""

    def buffer(self, nbytes: int) -> memoryview:
        """Writable memory of `nbytes` bytes (format `B`), aligned: what this store moves without a copy.

        It returns to the store's pool when nothing refers to it any more. Raises `ValueError` where `nbytes` is
        negative.
        """
        self._check_open()
        if nbytes < 0:
            raise ValueError(f"nbytes must not be negative: {nbytes}")
        return self._pool.buffer(nbytes) if nbytes else memoryview(bytearray())

    def reserve(self, blocks: Mapping[str, int]) -> None:
        """Take space for new blocks, `{key: nbytes}`; all of them or, on an error, none.

        A key that has a block of the same size keeps it with its content; another size is a `ValueError`, and so is a
        negative one. Raises `OSError` where there is no space.
        """
        self._check_process()
        with self._lock:
            self._check_open()
            new = self._new_blocks(blocks)
            placement = self._extents.place(new.values())
            self._grow(placement.end)
            self._extents.take(placement)
            for (key, nbytes), offset in zip(new.items(), placement.offsets, strict=True):
                self._blocks[key] = Block(key, offset, nbytes)

    def write(self, key: str, buf: Buffer) -> BlockTicket:
        """Start replacing the whole block; `buf` must not change before the ticket is done.

        Raises at once: `KeyError` (no such block), `ValueError` (not the block's size), `TypeError` or `BufferError`
        (no contiguous buffer).
        """
        self._check_process()
        with self._lock:
            block = self._find(key, nbytes_of(buf))
            inner = None
            if block.nbytes:
                padding = bytes(self._extents.padded(block.nbytes) - block.nbytes)
                inner = self._file.write([buf, padding] if padding else buf, block.offset)
            block.written = ticket = BlockTicket(block, inner)
            self._flying.append(ticket)
            return ticket

    def read(self, key: str, buf: Buffer) -> BlockTicket:
        """Start filling `buf` with the whole block, as the writes issued before leave it.

        Raises as `write` does, `TypeError` where `buf` is read-only, and `KeyError` where the block was never written.
        """
        self._check_process()
        with self._lock:
            block = self._find(key, nbytes_of(buf, writable=True))
            if block.written is None:
                raise KeyError(f"block {key!r} was never written")
            inner = None
            if block.nbytes:
                inner = self._file.read(buf, block.offset)
            ticket = BlockTicket(block, inner, after=block.written)
            self._flying.append(ticket)
            return ticket

    def discard(self, key: str) -> None:
        """Give up a block, after its transfers in flight; nothing happens where there is none.

        Raises `TimeoutError` where they are not done after `timeout_s`; the block is gone all the same.
        """
        self._check_process()
        _check_key(key)
        with self._lock:
            self._check_open()
            block = self._blocks.pop(key, None)
            if block is None:
                return
            flying = [ticket for ticket in self._flying if ticket.block is block]
        try:
            self._settle(flying)
        finally:
            with self._lock:  # whoever gets the space next is ordered behind what may still be in flight
                self._extents.give(block.offset, block.nbytes)

    def close(self) -> None:
        """Finish what is in flight and give everything back. May be called again; every other call then raises
        `ValueError`. Tickets given out before still answer, and buffers stay valid.

        Raises `TimeoutError` where a transfer is not done after `timeout_s`; the file then stays open until `close` is
        called again. In a forked child nothing happens to the parent's file.
        """
        if os.getpid() != self._owner:
            self._closed = True
            return
        with self._lock:
            if self._released:
                return
            self._closed = True
            flying = list(self._flying)
        self._settle(flying)
        self._released = True
        self._flying.clear()
        self._blocks.clear()
        try:
            with suppress(AioError):  # a write that failed says so by its ticket; the content is nobody's from now on
                self._file.close()
        finally:
            if self._own_engine:
                self._engine.close()

    def stats(self) -> dict[str, int | str | bool]:
        """How the space is used (bytes), whether it is taken, how transfers go, and what failed."""
        self._check_process()
        with self._lock:
            self._check_open()
            self._forget_done()
            return {
                "path": self.path,
                "backend": self._engine.backend,
                "mode": self._file.mode,  # "direct" or "buffered"
                "reason": self._file.reason,  # why not direct
                "preallocated": self.preallocated,
                "blocks": len(self._blocks),
                "block_nbytes": sum(block.nbytes for block in self._blocks.values()),
                "file_nbytes": self._extents.end,
                "free_nbytes": self._extents.free_nbytes,
                "holes": self._extents.holes,
                "in_flight": len(self._flying),
                "failed_writes": self._failed_writes,
            }

    def __enter__(self) -> NvmeStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:  # before the lock: in a child it may be held for ever
        if os.getpid() != self._owner:
            raise RuntimeError(f"this NvmeStore belongs to process {self._owner}: make one after the fork")

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise ValueError("this NvmeStore is closed")

    def _new_blocks(self, blocks: Mapping[str, int]) -> dict[str, int]:
        """Those of `blocks` that are not there yet, checked."""
        new = {}
        for key, size in blocks.items():
            nbytes = operator.index(size)
            _check_key(key)
            if nbytes < 0:
                raise ValueError(f"block {key!r}: nbytes must not be negative: {nbytes}")
            have = self._blocks.get(key)
            if have is None:
                new[key] = nbytes
            elif have.nbytes != nbytes:
                raise ValueError(f"block {key!r} has {have.nbytes} bytes, not {nbytes}: discard it first")
        return new

    def _find(self, key: str, nbytes: int) -> Block:
        self._check_open()
        _check_key(key)
        block = self._blocks.get(key)
        if block is None:
            raise KeyError(f"block {key!r} is not reserved")
        if nbytes != block.nbytes:
            raise ValueError(f"block {key!r} has {block.nbytes} bytes, the buffer has {nbytes}")
        self._forget_done()
        return block

    # -- space and transfers ------------------------------------------------------------------------------------------

    def _grow(self, end: int) -> None:
        if end <= self._extents.end:
            return
        if end > _MAX_OFFSET:
            raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}: a file of {end} bytes", self.path)
        try:
            if not self._file.preallocate(end):
                self.preallocated = False
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._extents.end)  # a failed allocation keeps the part that it found
            raise

    def _settle(self, tickets: list[BlockTicket]) -> None:
        """Wait for them, however they end, `timeout_s` in all."""
        deadline = monotonic() + self.timeout_s
        for ticket in tickets:
            ticket.outcome(max(0.0, deadline - monotonic()))

    def _forget_done(self) -> None:
        """Let go of the buffers of what is done, waited for or not. Oldest first: the others are newer."""
        while self._flying and self._flying[0].done:
            ticket = self._flying.popleft()
            self._failed_writes += ticket.outcome(0.0) is not None and ticket.writes


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise TypeError(f"a key is a str, not {type(key).__name__}")


def _new_path(folder: str | os.PathLike[str]) -> str:
    """A path in the folder that no other process, nor this one, makes up again."""
    where = os.fspath(folder)
    if not isinstance(where, str):
        raise TypeError(f"folder must be a str path, not {type(where).__name__}")
    if not os.path.isdir(where):
        number = errno.ENOTDIR if os.path.exists(where) else errno.ENOENT
        raise OSError(number, f"{os.strerror(number)}: NvmeStore needs a folder", where)
    return os.path.join(os.path.abspath(where), f"zs-{os.getpid()}-{secrets.token_hex(8)}.swap")
