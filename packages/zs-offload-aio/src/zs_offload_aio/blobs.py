"""Whole files for checkpoints: write these buffers to this path, make it durable, read from there.

    writer.write(path, [header, tensor, ...])    the file holds exactly these bytes, whatever was there before
    writer.sync(path)                            on the disk now: content, length and the folder's entry

Renaming a finished file into place, checksums and manifests are the caller's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ._core import File, Ticket
from .adapters import as_buffer
from .engine import Engine
from .errors import AioError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MOST_OPEN = 64  # files; each takes two descriptors


class _Files:
    """What both share: an engine, and files kept open by path."""

    PROTOCOL = 1

    def __init__(self, engine: Engine | None) -> None:
        self._own_engine = engine is None
        self._engine = Engine() if engine is None else engine
        self._lock = threading.RLock()
        self._closed = False
        self._owner = os.getpid()

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(f"this {type(self).__name__} belongs to process {self._owner}: make one after the fork")
        if self._closed:
            raise ValueError(f"this {type(self).__name__} is closed")

    def _close(self, files: list[File]) -> None:
        """Every file, then the engine; the first error is raised at the end."""
        failure: BaseException | None = None
        for file in files:
            try:
                file.close()
            except OSError as error:
                failure = failure or error
        if self._own_engine:
            self._engine.close()
        if failure is not None:
            raise failure


class _Blob:
    """A file that was written and not synced yet."""

    def __init__(self, file: File, ticket: Ticket) -> None:
        self.file = file
        self.ticket = ticket
        self.lock = threading.Lock()  # taken after the writer's own
        self.away = False  # the file is closed


class AioWriter(_Files):
    """Writes whole files through an `Engine` (its own, or `engine`, which `close` then leaves open).

    Safe to call from several threads. It keeps the Protocol `BlobWriter`, version 1.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        super().__init__(engine)
        self._open: dict[str, _Blob] = {}  # written and not synced yet, oldest first
        self._lost: dict[str, OSError] = {}  # by path: what no later sync may hide
        self._untold: set[str] = set()  # of those, what nobody has been told yet

    def write(self, path: str | os.PathLike[str], buffers: Iterable[Buffer], *, permissions: int = 0o666) -> Ticket:
        """Start making the file at `path` hold exactly the bytes of `buffers`, one after the other.

        A file that is there is emptied first, after the writes to this path that are in flight; a new one gets
        `permissions` less the umask. The space is taken before the first byte is written. The buffers must not change
        before the ticket is done. Raises at once: `TypeError` or `BufferError` (no contiguous buffer), `OSError` (no
        such folder, no permission, no space).
        """
        name = os.path.abspath(_text(path))
        parts, nbytes = _measured(buffers)
        self._check_open()  # before the lock too: in a forked child it may be held for ever
        with self._lock:
            self._check_open()
            self._put_away(name)
            while len(self._open) >= _MOST_OPEN:
                self._put_away(next(iter(self._open)))
            file = self._engine.open(name, "w", permissions=permissions)
            try:
                file.preallocate(nbytes)
                ticket = file.write(parts, 0)
            except BaseException:
                with suppress(OSError):
                    file.truncate(0)  # what was there is gone: an empty file says so, one of zeros would not
                with suppress(OSError):
                    file.close()
                raise
            self._open[name] = _Blob(file, ticket)
            self._lost.pop(name, None)  # what was lost is written anew
            self._untold.discard(name)
            return ticket

    def sync(self, path: str | os.PathLike[str], timeout_s: float = 120.0) -> None:
        """Return when the writes to `path` and its folder's entry are on the disk; a path that this writer has not
        written to is synced as well.

        Raises `AioError` where a write or the sync failed: at every call until the path is written again, because the
        kernel reports a loss once and then forgets. `TimeoutError` where the writes are not done after `timeout_s`.
        """
        name = os.path.abspath(_text(path))
        while True:
            self._check_open()
            with self._lock:
                self._check_open()
                if name in self._lost:
                    self._untold.discard(name)
                    raise self._lost[name]
                blob = self._open.get(name)
            if blob is None:
                with self._engine.open(name, "r") as file:
                    self._flush(name, file)
                return
            with blob.lock:
                if blob.away:  # replaced by another thread meanwhile
                    continue
                try:
                    blob.ticket.wait(timeout_s)
                except AioError as error:
                    self._lost[name] = error
                    raise
                self._flush(name, blob.file)
            with self._lock:
                if self._open.get(name) is blob:
                    self._put_away(name)
            return

    def close(self) -> None:
        """Finish what is in flight. Raises the first error of a write that nobody waited for; may be called again."""
        if os.getpid() != self._owner:
            self._closed = True
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            files = [blob.file for blob in self._open.values()]
            self._open.clear()
            untold = [self._lost[name] for name in sorted(self._untold)]
        self._close(files)
        if untold:
            raise untold[0]

    def __enter__(self) -> AioWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _flush(self, name: str, file: File) -> None:
        try:
            file.flush("full")
        except OSError as error:
            self._lost[name] = error
            raise

    def _put_away(self, name: str) -> None:
        """Wait for the write to this path, if there is one, and close the file; `sync` opens it again."""
        blob = self._open.get(name)
        if blob is None:
            return
        with blob.lock:
            try:
                blob.ticket.wait()
            except AioError as error:
                self._lost[name] = error
                self._untold.add(name)
            blob.away = True
            del self._open[name]
            blob.file.close()


class AioReader(_Files):
    """Reads parts of files through an `Engine` (its own, or `engine`, which `close` then leaves open).

    Safe to call from several threads. It keeps the Protocol `BlobReader`, version 1.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        super().__init__(engine)
        self._open: dict[str, tuple[tuple[int, int], File]] = {}  # least recently used first

    def read(self, path: str | os.PathLike[str], offset: int, buf: Buffer) -> Ticket:
        """Start filling `buf` with the file's bytes from `offset` on.

        Raises at once: `TypeError` or `BufferError` (no contiguous writable buffer), `ValueError` (a negative offset),
        `OSError` (no such file). The ticket's `wait` raises `ShortRead` where the file ends before the buffer does.
        """
        name = os.path.abspath(_text(path))
        self._check_open()
        with self._lock:
            self._check_open()
            return self._file(name).read(buf, offset)

    def close(self) -> None:
        """Finish what is in flight and close the files. May be called again."""
        if os.getpid() != self._owner:
            self._closed = True
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            files = [file for _, file in self._open.values()]
            self._open.clear()
        self._close(files)

    def __enter__(self) -> AioReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _file(self, name: str) -> File:
        """The open file that `name` means now: after a rename or a replacement, the new one."""
        known, found = self._open.pop(name, None), _identity(name)
        if known is not None:
            if known[0] == found:
                self._open[name] = known
                return known[1]
            known[1].close()
        while len(self._open) >= _MOST_OPEN:
            self._open.pop(next(iter(self._open)))[1].close()
        file = self._engine.open(name, "r")
        if found is not None and found == _identity(name):  # else it was replaced just now: looked up again next time
            self._open[name] = (found, file)
        return file


def writer() -> AioWriter:
    """A writer with an engine of its own."""
    return AioWriter()


def reader() -> AioReader:
    """A reader with an engine of its own."""
    return AioReader()


def _identity(name: str) -> tuple[int, int] | None:
    """Device and inode. An open file keeps its inode's number from being used again."""
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _text(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path must be a str, not {type(name).__name__}")
    return name


def _measured(buffers: Iterable[Any]) -> tuple[list[Any], int]:
    if isinstance(buffers, str | bytes | bytearray | memoryview):
        raise TypeError(f"buffers must be a sequence of buffers, not one {type(buffers).__name__}")
    parts = [memoryview(as_buffer(part, writable=False)) for part in buffers]  # all checked before anything is touched
    return parts, sum(part.nbytes for part in parts)
