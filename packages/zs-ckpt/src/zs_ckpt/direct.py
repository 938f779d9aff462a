"""Writing large files past the page cache: the disk works from the first byte on, and no memory is taken from others.

Several threads fill an aligned buffer each, from whatever the bytes lie in, and write it where it belongs. What is left
after the last whole block is written as any file is. Where the platform or the file system has no such writes, the
caller writes as usual.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate

from .threads import in_threads

BLOCK = 4096
CHUNK = 8 << 20
LEAST = 4 * CHUNK  # bytes of a file that is worth it
_THREADS = 4


def open_direct(path: str) -> int | None:
    """A descriptor whose writes go to the disk; None where there is no such thing."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None


def write_blocks(fd: int, views: Sequence[memoryview]) -> int:
    """Write the whole blocks of `views`, one after the other; how many bytes that is.

    Raises OSError: EINVAL where the file system wants other blocks than of 4 KiB.
    """
    starts = [0, *accumulate(view.nbytes for view in views)]
    total = starts[-1] // BLOCK * BLOCK
    chunks, lock = iter(range(0, total, CHUNK)), threading.Lock()
    failed = threading.Event()

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, CHUNK))  # aligned to a page; goes with the last view of it
        try:
            while not failed.is_set():
                with lock:
                    offset = next(chunks, None)
                if offset is None:
                    return
                nbytes = min(CHUNK, total - offset)
                _fill(buffer[:nbytes], views, starts, offset)
                _write(fd, buffer[:nbytes], offset)
        except BaseException:
            failed.set()
            raise

    in_threads(work, _THREADS, "zs-ckpt write")
    return total


def write_stream(fd: int, other: int, source: Iterator[memoryview]) -> None:
    """Write what `source` gives, one view after the other: whole blocks to `fd`, what is left at the end to `other`.

    `other` is the same file through the page cache, which takes all from where the file system wants other blocks.
    """
    buffer, filled, offset = memoryview(mmap.mmap(-1, CHUNK)), 0, 0
    whole = True  # whether `fd` takes blocks

    def put() -> None:
        nonlocal filled, offset, whole
        done = filled // BLOCK * BLOCK if whole else 0
        try:
            _write(fd, buffer[:done], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            whole, done = False, 0
        _write(other, buffer[done:filled], offset + done)
        offset, filled = offset + filled, 0

    for view in source:
        while view.nbytes:
            nbytes = min(CHUNK - filled, view.nbytes)
            copy(buffer[filled : filled + nbytes], view[:nbytes])
            view, filled = view[nbytes:], filled + nbytes
            if filled == CHUNK:
                put()
    put()


def _fill(buffer: memoryview, views: Sequence[memoryview], starts: Sequence[int], offset: int) -> None:
    """The bytes from `offset` on of all views in a row."""
    index, done = bisect_right(starts, offset) - 1, 0
    while done < buffer.nbytes:
        skip = offset + done - starts[index]
        part = views[index][skip : skip + buffer.nbytes - done]
        if part.nbytes:
            copy(buffer[done : done + part.nbytes], part)
        done += part.nbytes
        index += 1


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes, with other threads running meanwhile where the source can be addressed (it is writable)."""
    if source.readonly or source.nbytes < 1 << 16:
        target[:] = source.cast("B") if source.format == "B" else memoryview(bytes(source))
        return
    size = ctypes.c_ubyte * source.nbytes
    ctypes.memmove(size.from_buffer(target), size.from_buffer(source), source.nbytes)


def _write(fd: int, view: memoryview, offset: int) -> None:
    while view.nbytes:
        done = os.pwrite(fd, view, offset)
        if done <= 0:
            raise OSError(f"a write at {offset} wrote nothing")
        if done < view.nbytes and done % BLOCK:
            done -= done % BLOCK  # what follows has to begin at a block again
            if not done:
                raise OSError(f"a write at {offset} ended within a block")
        view, offset = view[done:], offset + done


def close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)
