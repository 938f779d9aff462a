"""Aligned host memory that is cheap to take again: what direct I/O wants, and what huge pages make fast."""

from __future__ import annotations

from types import TracebackType

from . import _core


class Pool:
    """Aligned buffers from arenas of `arena_nbytes` (0: 32 MiB) that start on huge pages.

    A buffer is a memoryview of bytes: `numpy.frombuffer(view, dtype)` and `torch.frombuffer(view, dtype=...)` make
    arrays of it without a copy. When the last view of it is gone its memory goes back to the pool, into the list of
    its size class (eight for each doubling), and the next buffer of that class is the same memory. Sizes above a
    quarter of an arena have a mapping of their own.

    `alignment`: of each buffer's first byte, a power of two from 64 to 2 MiB. `lock`: keep the memory from being
    swapped out; where the system refuses, the memory is used unlocked and `stats()["lock_failure"]` says why.

    Thread-safe. After a fork the child may use the buffers it inherited; `buffer()` raises `RuntimeError` there.
    """

    __slots__ = ("_core",)

    def __init__(self, *, alignment: int = 4096, arena_nbytes: int = 0, lock: bool = False) -> None:
        self._core = _core.Pool(alignment, arena_nbytes, lock)

    def buffer(self, nbytes: int) -> memoryview:
        """A writable view of `nbytes` aligned bytes, their contents undefined. It may outlive the pool.

        Raises `MemoryError`; `ValueError` if the pool is closed or `nbytes` negative.
        """
        return self._core.buffer(nbytes)

    def trim(self) -> int:
        """Give back to the system every arena that holds no buffer in use; the number of bytes."""
        return self._core.trim()

    def stats(self) -> dict[str, int | str | bool]:
        """What the pool holds, in bytes as rounded up to size classes.

        `in_use_nbytes`, `in_use_blocks`; `peak_nbytes`: the most that was in use at once; `mapped_nbytes`,
        `peak_mapped_nbytes`, `arenas`: taken from the system; `locked_nbytes`, `lock_failure`: "" or why the last
        arena could not be locked; `huge_pages`: whether the kernel took the advice to use them.
        """
        return self._core.stats()

    @property
    def alignment(self) -> int:
        """Of every buffer's first byte."""
        return self._core.alignment

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed

    def close(self) -> None:
        """Hand out nothing more. An arena is unmapped once its last view is gone; views stay valid until then."""
        self._core.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
