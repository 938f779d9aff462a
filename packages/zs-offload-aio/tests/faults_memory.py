"""Memory and bytes for the tests: known contents, chosen addresses, guard bytes, buffers larger than the machine."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
GUARD = 0xA5

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_RW, _MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 3, 1, 2, 0x10, 0x20, 0x4000


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """The same bytes for the same seed, no two blocks alike."""
    return random.Random(seed).randbytes(nbytes)


def address_of(view: memoryview | bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * 0).from_buffer(view))


class Guarded:
    """`nbytes` of writable memory at an address with a given residue, between guard bytes."""

    def __init__(self, nbytes: int, residue: int = 0, alignment: int = 4096, guard: int = 600) -> None:
        self._memory = bytearray(bytes([GUARD]) * (nbytes + 2 * guard + 2 * alignment))
        first = address_of(self._memory) + guard
        self._start = guard + (residue - first) % alignment
        self.nbytes = nbytes
        self.view = memoryview(self._memory)[self._start : self._start + nbytes]

    def intact(self) -> bool:
        """Whether nothing outside the view was written."""
        before, after = self._memory[: self._start], self._memory[self._start + self.nbytes :]
        return before.count(GUARD) == len(before) and after.count(GUARD) == len(after)


def aligned(nbytes: int) -> memoryview:
    """Page-aligned memory, zero."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]


@contextlib.contextmanager
def huge_buffer(
    nbytes: int, own: tuple[int, ...] = (), window: int = 64 * MIB
) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """One contiguous writable buffer of many GiB in `window` bytes of RAM: the same pages over and over.

    Only the page-aligned 1 MiB at each offset of `own` is memory of its own, whose bytes stay what was read there.
    """
    fd = os.memfd_create("window")
    os.ftruncate(fd, window)
    base = _LIBC.mmap(None, nbytes, 0, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        for start in range(0, nbytes, window):
            length = min(window, nbytes - start)
            _fixed(base + start, length, _MAP_SHARED, fd)
        for start in own:
            _fixed(base + start, min(MIB, nbytes - start), _MAP_PRIVATE | _MAP_ANONYMOUS, -1)
        yield (ctypes.c_char * nbytes).from_address(base)
    finally:
        _LIBC.munmap(base, nbytes)
        os.close(fd)


def _fixed(address: int, nbytes: int, kind: int, fd: int) -> None:
    if _LIBC.mmap(address, nbytes, _PROT_RW, kind | _MAP_FIXED, fd, 0) != address:
        raise OSError(ctypes.get_errno(), "mmap(MAP_FIXED)")


def sparse_file(path: Path, nbytes: int, content: dict[int, bytes] | None = None) -> Path:
    """A file of `nbytes` bytes that takes next to no space: zeros, but for `content` at its offsets."""
    with open(path, "wb") as file:
        file.truncate(nbytes)
        for offset, piece in (content or {}).items():
            os.pwrite(file.fileno(), piece, offset)
    return path


@contextlib.contextmanager
def sparse_memory(nbytes: int, content: dict[int, bytes]) -> Iterator[str]:
    """The same as a file in memory, by a name that lasts as long as the block: reading its holes takes none."""
    fd = os.memfd_create("sparse")
    try:
        os.ftruncate(fd, nbytes)
        for offset, piece in content.items():
            os.pwrite(fd, piece, offset)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


class Endless:
    """A read that takes seconds and no memory: a file that is all hole, into one window over and over."""

    def __init__(self, folder: Path, nbytes: int = 256 * GIB, window: int = 64 * MIB) -> None:
        self.nbytes = nbytes
        self.window = aligned(window)
        self.segments = [self.window] * (nbytes // window)
        self._on_disk = sparse_file(folder / "endless", nbytes)
        self._memory = os.memfd_create("endless")
        os.ftruncate(self._memory, nbytes)

    def path(self, backend: str) -> str:
        """In memory for the plain backend: on a disk the holes would fill its page cache."""
        return f"/proc/self/fd/{self._memory}" if backend == "plain" else os.fspath(self._on_disk)

    def close(self) -> None:
        os.close(self._memory)
