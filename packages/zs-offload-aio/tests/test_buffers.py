"""Pool: alignment, reuse, the high-water mark, locking that is refused, memory that lives with its last view."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import os
import random
import resource
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

import pytest
from zs_offload_aio import _core
from zs_offload_aio.buffers import Pool

MIB = 1 << 20


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def in_child(work: Callable[[], None]) -> int:
    """Exit code of a forked child that runs `work`: 0, or 1 where it raised."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("alignment", [64, 512, 4096, 2 * MIB])
def test_every_size_is_aligned_and_its_own(alignment: int) -> None:
    generator = random.Random(alignment)
    sizes = [1, alignment - 1, alignment, alignment + 1, *(generator.randrange(1, 300_000) for _ in range(60)), 9 * MIB]
    with Pool(alignment=alignment) as pool:
        views = [pool.buffer(nbytes) for nbytes in sizes]
        assert [len(view) for view in views] == sizes
        assert all(not view.readonly and view.format == "B" and view.contiguous for view in views)
        assert all(address(view) % alignment == 0 for view in views)
        spans = sorted((address(view), address(view) + len(view)) for view in views)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        for number, view in enumerate(views):
            view[:] = bytes([number % 251]) * len(view)
        assert all(view[0] == view[-1] == number % 251 for number, view in enumerate(views))


def test_what_is_given_back_is_handed_out_again() -> None:
    pool = Pool()
    first = pool.buffer(5000)
    where = address(first)
    part = first[10:20]
    del first
    assert address(pool.buffer(5000)) != where  # `part` is still there
    del part
    assert address(pool.buffer(8192)) == where  # 5000 bytes are of the class of 8192
    assert pool.stats()["arenas"] == 1


def test_a_class_wastes_an_eighth_at_most() -> None:
    pool = Pool(alignment=4096)
    for nbytes in [1, 4096, 70_000, MIB, MIB + 1, 3 * MIB - 5, 17 * MIB + 1, 100 * MIB]:
        view = pool.buffer(nbytes)
        used = pool.stats()["in_use_nbytes"]
        assert isinstance(used, int)
        assert nbytes <= used <= max(4096, nbytes * 9 // 8 + 4096)
        del view


def test_high_water_mark() -> None:
    pool = Pool()
    views = [pool.buffer(MIB) for _ in range(5)]
    del views[2:]
    stats = pool.stats()
    assert (stats["in_use_nbytes"], stats["in_use_blocks"], stats["peak_nbytes"]) == (2 * MIB, 2, 5 * MIB)
    assert stats["mapped_nbytes"] == stats["peak_mapped_nbytes"] == 32 * MIB


def test_arenas_are_as_big_as_asked_for_and_trim_unmaps_the_empty_ones() -> None:
    pool = Pool(arena_nbytes=3 * MIB)  # rounded to huge pages
    small, big = pool.buffer(1000), pool.buffer(48 * MIB)
    assert pool.stats()["mapped_nbytes"] == (4 + 48) * MIB
    assert pool.trim() == 0
    del big
    assert pool.stats()["mapped_nbytes"] == 52 * MIB  # kept, to be handed out again
    assert pool.trim() == 48 * MIB
    small[:] = b"x" * 1000
    del small
    assert pool.trim() == 4 * MIB
    assert pool.stats()["mapped_nbytes"] == 0
    assert len(pool.buffer(1000)) == 1000


def test_views_outlive_the_pool() -> None:
    pool = Pool()
    kept, other = pool.buffer(3 * MIB), pool.buffer(40 * MIB)
    kept[:4] = b"kept"
    pool.close()
    pool.close()
    assert pool.closed
    with pytest.raises(ValueError, match="closed"):
        pool.buffer(1)
    for use in (pool.stats, pool.trim):
        with pytest.raises(ValueError, match="closed"):
            use()
    other[:5] = b"other"
    del pool, use, other
    gc.collect()
    kept[-4:] = b"last"
    assert (bytes(kept[:4]), bytes(kept[-4:])) == (b"kept", b"last")


def is_mapped(where: int) -> bool:
    with open("/proc/self/maps") as file:
        spans = (line.split(maxsplit=1)[0].split("-") for line in file)
        return any(int(start, 16) <= where < int(end, 16) for start, end in spans)


def test_closing_unmaps_with_the_last_view() -> None:
    pool = Pool()
    view, other = pool.buffer(700 * MIB), pool.buffer(1000)
    where, small = address(view), address(other)
    del other
    pool.close()
    assert is_mapped(where) and not is_mapped(small)
    del view
    assert not is_mapped(where)  # the kernel puts what is new at the gap's other end


@pytest.mark.repeats
def test_ten_thousand_buffers_leave_nothing_behind() -> None:
    generator = random.Random(1)
    held: list[memoryview] = []

    def churn(count: int, pool: Pool) -> None:
        for _ in range(count):
            held.append(pool.buffer(generator.randrange(1, 100_000)))
            held[-1][0] = held[-1][-1] = 1
            if len(held) > 20:
                del held[generator.randrange(20)]

    pool = Pool()
    churn(2_000, pool)
    resident, mapped = resident_nbytes(), pool.stats()["mapped_nbytes"]
    churn(10_000, pool)
    assert pool.stats()["mapped_nbytes"] == mapped
    for _ in range(50):  # whole pools too
        with Pool() as short:
            short.buffer(5 * MIB)[0] = 1
    gc.collect()
    assert resident_nbytes() - resident < 8 * MIB


def test_sizes_that_cannot_be() -> None:
    pool = Pool()
    assert len(pool.buffer(0)) == 0
    with pytest.raises(ValueError, match="negative"):
        pool.buffer(-1)
    with pytest.raises(MemoryError, match="aligned memory"):
        pool.buffer(1 << 62)
    with pytest.raises(OverflowError):
        pool.buffer(1 << 64)
    for wrong in [0, 32, 100, 4 * MIB, -4096]:
        with pytest.raises(ValueError, match="power of two"):
            Pool(alignment=wrong)
    with pytest.raises(ValueError, match="arena_nbytes"):
        Pool(arena_nbytes=-1)


def test_a_size_that_closes_the_pool_on_the_way() -> None:
    class Evil:
        def __index__(self) -> int:
            pool.close()
            return 4096

    pool = Pool()
    with pytest.raises(ValueError, match="closed"):
        pool.buffer(Evil())  # type: ignore[arg-type]


def test_threads_get_memory_of_their_own() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        generator = random.Random(number)
        for _ in range(300):
            view = pool.buffer(generator.randrange(1, 20_000))
            view[:] = bytes([number]) * len(view)
            copy = bytes(view)
            if set(copy) != {number}:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.stats()["in_use_blocks"] == 0


def test_a_pool_closed_by_another_thread() -> None:
    for _ in range(20):
        pool = Pool()
        views: list[memoryview] = []

        def take(pool: Pool = pool, views: list[memoryview] = views) -> None:
            with contextlib.suppress(ValueError):
                views.extend(pool.buffer(9 * MIB) for _ in range(20))

        thread = threading.Thread(target=take)
        thread.start()
        pool.close()
        thread.join()
        for view in views:
            view[0] = 1


def test_locking() -> None:
    with Pool(lock=True, arena_nbytes=2 * MIB) as pool:
        pool.buffer(1)[0] = 1
        stats = pool.stats()
    assert (stats["locked_nbytes"] == 2 * MIB) != bool(stats["lock_failure"])


@pytest.mark.address_space  # under a sanitizer mlock does nothing
def test_locking_that_is_refused_degrades_and_says_so() -> None:
    """As nobody, where privileges do not lift the limit; as who we are, where we are nobody special."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (3 * MIB, 3 * MIB))
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        pool = Pool(lock=True, arena_nbytes=2 * MIB)
        first = pool.buffer(MIB // 2)
        if (pool.stats()["locked_nbytes"], pool.stats()["lock_failure"]) != (2 * MIB, ""):
            raise SystemExit(pool.stats())
        second = pool.buffer(8 * MIB)
        second[:1] = first[:1] = b"x"
        if pool.stats()["locked_nbytes"] != 2 * MIB or "memory" not in str(pool.stats()["lock_failure"]):
            raise SystemExit(pool.stats())

    assert in_child(work) == 0


def test_after_a_fork() -> None:
    pool = Pool()
    view = pool.buffer(100)
    view[:6] = b"before"

    def work() -> None:
        if bytes(view[:6]) != b"before":
            raise SystemExit
        view[:5] = b"child"
        with pytest.raises(RuntimeError, match="create a new Pool after fork"):
            pool.buffer(1)
        with pytest.raises(RuntimeError, match="create a new Pool after fork"):
            pool.trim()
        pool.stats()
        pool.close()
        Pool().buffer(MIB)[0] = 1

    assert in_child(work) == 0
    assert bytes(view[:6]) == b"before"
    assert len(pool.buffer(1)) == 1


def test_interpreter_exit_with_views_alive() -> None:
    code = "from zs_offload_aio.buffers import Pool; pool = Pool(); views = [pool.buffer(n) for n in (1, 10**7)]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- view: memory that somebody else owns ----


def test_a_view_keeps_its_owner() -> None:
    class Owner:
        pass

    memory, ended = ctypes.create_string_buffer(b"12345678", 8), []
    owner = Owner()
    weakref.finalize(owner, ended.append, 1)
    shown = memoryview(_core.View(ctypes.addressof(memory) + 2, 4, owner, False))
    del owner
    assert bytes(shown) == b"3456" and not ended
    shown[0] = ord("x")
    assert memory.raw == b"12x45678"
    part = shown[1:]
    shown.release()
    assert not ended
    del part
    assert ended == [1]


def test_a_view_refuses_what_is_no_memory() -> None:
    for where, nbytes in [(0, 1), (4096, -1), ((1 << 64) - 1, 2)]:
        with pytest.raises(ValueError, match="no memory"):
            _core.View(where, nbytes, None, False)
    for negative in (-1, 1 << 65):
        with pytest.raises((OverflowError, TypeError)):
            _core.View(negative, 1, None, False)
    assert len(memoryview(_core.View(0, 0, None, True))) == 0
    assert memoryview(_core.View(0, 0, None, True)).readonly


def test_finish_is_there_only_where_it_was_given() -> None:
    assert not hasattr(_core.View(0, 0, None, True), "finish")
    calls: list[int] = []
    _core.View(0, 0, None, False, lambda: calls.append(1)).finish()
    assert calls == [1]


def test_a_view_in_a_cycle_is_collected() -> None:
    class Owner:
        view: object

    owner = Owner()
    owner.view = _core.View(0, 0, owner, False, functools.partial(id, owner))
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None
