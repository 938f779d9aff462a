"""Blobs with nothing but the operating system: a thread for each file that is written, reads in the calling thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from typing_extensions import Buffer

from . import direct
from .durable import naming
from .names import open_file

_MOST_BUFFERS = 512  # of one call; the system's limit is 1024
_MOST_NBYTES = 1 << 28  # of one call; far below the 2 GiB where the system cuts short


class _Done:
    """A ticket of what has been done already."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    @property
    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float = 120.0) -> int:
        return self._nbytes


class _Started:
    """A ticket of what a thread does."""

    def __init__(self, future: Future[int]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout_s: float = 120.0) -> int:
        return self._future.result(timeout_s)


class _File:
    """A file that is written and not synced yet."""

    def __init__(self, fd: int, future: Future[int]) -> None:
        self.fd, self.future = fd, future


class FileWriter:
    """Writes whole files, each in a thread of its own. It keeps the Protocol `BlobWriter`, version 1.

    `buffers` may be an iterator: one buffer is asked for when those before it are written, so that a buffer can be
    filled again for what comes next (`streams`). With `past_cache` such a file goes past the page cache, where that is
    possible, as other large ones do.
    """

    PROTOCOL = 1
    streams = True

    def __init__(self, *, past_cache: bool = False) -> None:
        self._past_cache = past_cache
        self._lock = threading.Lock()
        self._open: dict[str, _File] = {}
        self._lost: dict[str, OSError] = {}
        self._closed = False

    def write(self, path: str, buffers: Iterable[Buffer], *, nbytes: int | None = None) -> _Started:
        """See `BlobWriter.write`. `nbytes`: the sum of an iterator's buffers, to take the space beforehand."""
        if isinstance(buffers, str | bytes | bytearray | memoryview):
            raise TypeError(f"buffers must be a sequence of buffers, not one {type(buffers).__name__}")
        views: list[memoryview] = []
        if nbytes is None:
            views = [_flat(one) for one in buffers]
            nbytes = sum(view.nbytes for view in views)
            source: Iterator[memoryview] = iter(views)
            batch = _MOST_BUFFERS
        else:
            source = (_flat(one) for one in buffers)
            batch = 1
        self._put_away(path)
        with self._lock:
            if self._closed:
                raise ValueError("this FileWriter is closed")
            self._lost.pop(path, None)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
        future: Future[int] = Future()
        with self._lock:
            self._open[path] = _File(fd, future)

        def run() -> None:
            try:
                with naming(path):
                    reserve(fd, nbytes)
                    if batch > 1 and nbytes >= direct.LEAST:
                        _write_large(fd, path, views)
                    elif self._past_cache and nbytes >= direct.LEAST:
                        _write_stream(fd, path, source)
                    else:
                        _write_all(fd, source, batch)
                future.set_result(nbytes)
            except BaseException as error:
                with suppress(OSError):
                    os.ftruncate(fd, 0)  # an empty file says that this failed; one of zeros would not
                future.set_exception(error)

        threading.Thread(target=run, name="zs-ckpt write", daemon=True).start()
        return _Started(future)

    def sync(self, path: str) -> None:
        """See `BlobWriter.sync`."""
        with self._lock:
            lost, file = self._lost.get(path), self._open.pop(path, None)
        if lost is not None:
            raise lost
        if file is None:
            fd = open_file(path)
        else:
            fd = file.fd
        try:
            if file is not None:
                file.future.result()
            with naming(path):
                getattr(os, "fdatasync", os.fsync)(fd)
        except OSError as error:
            with self._lock:
                self._lost[path] = error
            raise
        finally:
            os.close(fd)

    def close(self) -> None:
        """See `BlobWriter.close`."""
        with self._lock:
            self._closed = True
            paths = list(self._open)
        for path in paths:
            self._put_away(path)

    def _put_away(self, path: str) -> None:
        with self._lock:
            file = self._open.pop(path, None)
        if file is not None:
            with suppress(Exception):
                file.future.result()
            os.close(file.fd)


class FileReader:
    """Reads in the calling thread; several threads read at once. It keeps the Protocol `BlobReader`, version 1.

    A file that was opened stays the same file, whatever becomes of its name meanwhile.
    """

    PROTOCOL = 1

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._closed = False

    def open(self, path: str) -> int:
        """The file's descriptor; it stays open until `close`."""
        with self._lock:
            if self._closed:
                raise ValueError("this FileReader is closed")
            if path not in self._open:
                self._open[path] = open_file(path)
            return self._open[path]

    def read(self, path: str, offset: int, buf: Buffer) -> _Done:
        """See `BlobReader.read`."""
        view = _flat(buf)
        if view.readonly and view.nbytes:
            raise TypeError("the buffer to read into is read-only")
        try:
            return _Done(read_into(self.open(path), offset, view))
        except OSError as error:
            error.filename = error.filename or path
            raise

    def close(self) -> None:
        """See `BlobReader.close`."""
        with self._lock:
            self._closed = True
            while self._open:
                os.close(self._open.popitem()[1])


def read_into(fd: int, offset: int, view: memoryview) -> int:
    """Fill `view` from `offset` of an open file on. Raises OSError (ENODATA) where it ends before."""
    done = 0
    while done < view.nbytes:
        got = os.preadv(fd, [view[done : done + _MOST_NBYTES]], offset + done)
        if not got:
            raise OSError(errno.ENODATA, f"ends at byte {offset + done}, and {view.nbytes} from {offset} on are wanted")
        done += got
    return done


def reserve(fd: int, nbytes: int) -> None:
    """Take the space for `nbytes` where the file system can: a full disk is an error now, not halfway."""
    if not nbytes:
        return
    allocate = _fallocate()
    if allocate is not None:
        allocate(fd, nbytes)


def _fallocate() -> Any:
    """The system's own call. `posix_fallocate` of the C library would write every block where there is none."""
    import ctypes

    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError, TypeError):
        return None

    def allocate(fd: int, nbytes: int) -> None:
        if call(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(nbytes)):
            number = ctypes.get_errno()
            if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(number, os.strerror(number))

    return allocate


def _write_large(fd: int, path: str, views: list[memoryview]) -> None:
    """Whole blocks past the page cache where that is possible, and the rest of it all through it."""
    offset, other = 0, direct.open_direct(path)
    if other is not None:
        try:
            offset = direct.write_blocks(other, views)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            offset = 0  # blocks of another size: as any file is written
        finally:
            direct.close(other)
    rest, position = [], 0
    for view in views:
        rest.append(view[max(offset - position, 0) :])
        position += view.nbytes
    _write_all(fd, (view for view in rest if view.nbytes), _MOST_BUFFERS, offset)


def _write_stream(fd: int, path: str, source: Iterator[memoryview]) -> None:
    """`_write_large` of what comes one buffer after the other."""
    other = direct.open_direct(path)
    if other is None:
        _write_all(fd, source, 1)
        return
    try:
        direct.write_stream(other, fd, source)
    finally:
        direct.close(other)


def _write_all(fd: int, source: Iterator[memoryview], batch: int, offset: int = 0) -> int:
    """Gather writes of up to `batch` buffers from `offset` on; what a call leaves over is written by the next."""
    waiting, size = list[memoryview](), 0
    for view in source:
        for start in range(0, view.nbytes, _MOST_NBYTES):
            waiting.append(view[start : start + _MOST_NBYTES])
            size += waiting[-1].nbytes
            if len(waiting) >= batch or size >= _MOST_NBYTES:
                offset, size = _write(fd, waiting, offset), 0
    return _write(fd, waiting, offset)


def _write(fd: int, waiting: list[memoryview], offset: int) -> int:
    while waiting:
        done = os.pwritev(fd, waiting, offset)
        if done <= 0:
            raise OSError(f"a write at {offset} wrote nothing")
        offset += done
        while waiting and done >= waiting[0].nbytes:
            done -= waiting.pop(0).nbytes
        if done:
            waiting[0] = waiting[0][done:]
    return offset


def _flat(buf: Any) -> memoryview:
    view = memoryview(buf)
    if not view.c_contiguous:
        raise BufferError("a buffer that is not contiguous")
    return view if view.ndim == 1 and view.itemsize == 1 else view.cast("B")
