"""The stores pass the conformance check, the check catches broken stores, and files fail as they should."""

import ctypes
import errno
import itertools
import mmap
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from zs_zero.stores import BlockStore, FileStore, MemoryStore, Ticket, aligned_buffer
from zs_zero.testing import check_block_store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blocks"


@pytest.fixture
def store(path: Path) -> Iterator[FileStore]:
    store = FileStore(path)
    yield store
    store.close()


def test_memory_store_conforms() -> None:
    check_block_store(MemoryStore)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_file_store_conforms(tmp_path: Path, threads: int) -> None:
    number = itertools.count()
    before = threading.active_count()
    check_block_store(lambda: FileStore(tmp_path / str(next(number)), threads=threads))
    assert list(tmp_path.iterdir()) == [], "close leaves a file"
    assert threading.active_count() == before, "close leaves a thread"


def test_file_store_conforms_where_every_transfer_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, buf, offset: pwrite(fd, buf[: max(1, len(buf) // 2)], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][: max(1, len(bufs[0]) // 2)]], at))
    number = itertools.count()
    check_block_store(lambda: FileStore(tmp_path / str(next(number))))


# -- the check finds broken stores -----------------------------------------------------------------------------------


class Mutant(MemoryStore):
    """A store in memory, to be broken in one place."""


class FullTicket:
    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.done = nbytes, True

    def wait(self, timeout_s: float = 120.0) -> int:
        return self.nbytes


class Misaligned(Mutant):
    def buffer(self, nbytes: int) -> memoryview:
        return super().buffer(nbytes + 1)[1:]


class LongBuffer(Mutant):
    def buffer(self, nbytes: int) -> memoryview:
        return super().buffer(-(-nbytes // 512) * 512)


class SharedBuffer(Mutant):
    memory = aligned_buffer(1 << 20)

    def buffer(self, nbytes: int) -> memoryview:
        super().buffer(nbytes)
        return self.memory[:nbytes]


class LosesTheTail(Mutant):
    def write(self, key: str, buf: Any) -> Ticket:
        view = memoryview(buf).cast("B")
        whole = bytearray(view)
        whole[len(whole) // 512 * 512 :] = bytes(len(whole) % 512)
        return super().write(key, whole)


class ShortCount(Mutant):
    def read(self, key: str, buf: Any) -> Ticket:
        moved = super().read(key, buf).wait()
        return FullTicket(moved // 4096 * 4096)


class LateTicket:
    def __init__(self, start: Callable[[], Ticket]) -> None:
        self.start, self.done = start, False

    def wait(self, timeout_s: float = 120.0) -> int:
        self.done = True
        return self.start().wait(timeout_s)


class Unordered(Mutant):
    """A write takes effect when somebody waits for it."""

    def write(self, key: str, buf: Any) -> Ticket:
        self._find(key, buf, reading=False)
        return LateTicket(lambda: super(Unordered, self).write(key, buf))


class TakesShortBuffers(Mutant):
    def write(self, key: str, buf: Any) -> Ticket:
        view = memoryview(buf).cast("B") if memoryview(buf).contiguous else memoryview(buf)
        if key in self._content and view.nbytes < len(self._content[key]):
            self._content[key][: view.nbytes] = view
            return FullTicket(view.nbytes)
        return super().write(key, view)


class InventsKeys(Mutant):
    def write(self, key: str, buf: Any) -> Ticket:
        self.reserve({key: memoryview(buf).nbytes})
        return super().write(key, buf)


class ReadsTheUnwritten(Mutant):
    def reserve(self, blocks: Mapping[str, int]) -> None:
        new = {key for key in blocks if key not in self._blocks}
        super().reserve(blocks)
        for key in new:
            self.write(key, bytes(blocks[key]))


class ReserveLoses(Mutant):
    def reserve(self, blocks: Mapping[str, int]) -> None:
        for key, nbytes in blocks.items():
            if key in self._blocks and self._blocks[key].nbytes == nbytes:
                self.discard(key)
        super().reserve(blocks)


class ReserveHalf(Mutant):
    def reserve(self, blocks: Mapping[str, int]) -> None:
        for key, nbytes in blocks.items():
            super().reserve({key: nbytes})


class DiscardKeeps(Mutant):
    def discard(self, key: str) -> None:
        self._check_open()


class DiscardRaises(Mutant):
    def discard(self, key: str) -> None:
        self._check_open()
        del self._blocks[key], self._content[key]


class ClosesOnce(Mutant):
    def close(self) -> None:
        self._check_open()
        super().close()


class OpenAfterClose(Mutant):
    def close(self) -> None:
        pass


class OtherProtocol(Mutant):
    PROTOCOL = 0


class Racing(Mutant):
    """Two threads in the store at once spoil each other's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0

    def write(self, key: str, buf: Any) -> Ticket:
        self.inside += 1
        time.sleep(0.0005)
        spoiled = self.inside > 1
        self.inside -= 1
        if spoiled and memoryview(buf).contiguous and memoryview(buf).nbytes == self._blocks[key].nbytes:
            return super().write(key, bytes(self._blocks[key].nbytes))
        return super().write(key, buf)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (Misaligned, "a buffer is aligned"),
        (LongBuffer, "a buffer is aligned, writable and of the asked size"),
        (SharedBuffer, "a buffer is aligned"),
        (LosesTheTail, "what was written is read back"),
        (ShortCount, "what was written is read back"),
        (Unordered, "take effect in the order"),
        (TakesShortBuffers, "another size is a ValueError"),
        (InventsKeys, "without a block"),
        (ReadsTheUnwritten, "without a content"),
        (ReserveLoses, "reserve keeps"),
        (ReserveHalf, "all or nothing"),
        (DiscardKeeps, "discard forgets"),
        (DiscardRaises, "is a KeyError at once"),
        (ClosesOnce, "close finishes"),
        (OpenAfterClose, "close finishes"),
        (OtherProtocol, "PROTOCOL"),
        (Racing, "several threads"),
    ],
)
def test_check_finds(broken: Callable[[], BlockStore], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_block_store(broken)


# -- files -----------------------------------------------------------------------------------------------------------


def test_space_is_taken_at_reserve(store: FileStore, path: Path) -> None:
    store.reserve({"a": 1_000_000, "b": 3})
    status = path.stat()
    assert status.st_size == 245 * 4096 + 4096
    assert status.st_blocks * 512 >= 1_000_003, "the file is sparse: a full disk would be found while training"


def test_discarded_space_is_used_again(store: FileStore, path: Path) -> None:
    store.reserve({"a": 40_960, "b": 4096})
    store.discard("a")
    store.reserve({f"part {i}": 4000 for i in range(10)})
    assert path.stat().st_size == 45_056
    for i in range(10):
        store.write(f"part {i}", bytes([i]) * 4000)
    for i in range(10):
        target = bytearray(4000)
        store.read(f"part {i}", target).wait()
        assert target == bytes([i]) * 4000


def test_an_existing_file_is_refused(path: Path) -> None:
    path.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        FileStore(path)
    assert path.read_bytes() == b"somebody's"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FileStore(tmp_path / "nowhere" / "blocks")


@pytest.fixture
def one_mib_limit() -> Iterator[None]:
    """The kernel ends every file of this process at 1 MiB, with a short write first."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_no_space_is_found_at_reserve(store: FileStore, path: Path, one_mib_limit: None) -> None:
    store.reserve({"a": 1000})
    with pytest.raises(OSError, match="while reserving 4194304 bytes at offset 4096") as caught:
        store.reserve({"b": 4 << 20})
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.stat().st_size == 4096
    with pytest.raises(KeyError):
        store.write("b", bytes(4 << 20))
    store.write("a", bytes(1000)).wait()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failing_write_names_path_and_offset(
    store: FileStore, path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store.reserve({"a": 4096, "b": 3000})
    store.write("b", b"x" * 3000).wait()
    calls = itertools.count()
    pwrite = os.pwrite

    def failing(fd: int, buf: memoryview, offset: int) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, buf[:1000], offset)

    monkeypatch.setattr(os, "pwrite", failing)
    ticket, target = store.write("b", b"y" * 3000), bytearray(3000)
    reading = store.read("b", target)  # issued before anybody knows
    for _ in range(2):
        with pytest.raises(OSError, match=f"writing 3000 bytes at offset 4096 \\({after * 1000} done\\)") as caught:
            ticket.wait()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert ticket.done
    with pytest.raises(OSError, match=r"the block was not written: .*No space left"):
        reading.wait()
    assert target == bytes(3000), "neither the old content nor the new one may come back"
    monkeypatch.undo()
    store.write("b", b"z" * 3000)
    assert store.read("b", target).wait() == 3000
    assert target == b"z" * 3000


def test_a_truncated_file_is_an_error(store: FileStore, path: Path) -> None:
    store.reserve({"a": 10_000})
    store.write("a", b"x" * 10_000).wait()
    os.truncate(path, 6000)
    with pytest.raises(OSError, match=r"unexpected end of file while reading 10000 bytes at offset 0 \(6000 done\)"):
        store.read("a", bytearray(10_000)).wait()


def test_waits_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(path, threads=1, timeout_s=0.05)
    store.reserve({"a": 10})
    answer = threading.Event()
    pwrite = os.pwrite

    def slow(fd: int, buf: memoryview, offset: int) -> int:
        answer.wait(30)
        return pwrite(fd, buf, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    ticket = store.write("a", bytes(10))
    assert not ticket.done
    with pytest.raises(TimeoutError, match=r"10 bytes is not done after 0\.01 s \('.*blocks' at offset 0\)"):
        ticket.wait(0.01)
    with pytest.raises(TimeoutError, match=r"1 transfers are not done after 0\.05 s"):
        store.close()
    answer.set()
    assert ticket.wait(5) == 10


def test_a_folder_that_vanishes_does_not_stop_close(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    store = FileStore(folder / "blocks")
    store.reserve({"a": 10})
    (folder / "blocks").unlink()
    folder.rmdir()
    store.write("a", bytes(10)).wait()
    store.close()


def test_a_fork_does_not_touch_its_parents_file(store: FileStore, path: Path) -> None:
    store.reserve({"a": 10})
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.write("a", b"0123456789")
        except ValueError as error:
            code = 0 if "belongs to process" in str(error) else 2
        store.close()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert path.exists()
    store.write("a", b"0123456789").wait()


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 1 << 20])
def test_aligned_buffer(nbytes: int) -> None:
    assert bytes(aligned_buffer(nbytes, 512)) == bytes(nbytes)


@pytest.mark.parametrize("alignment", [0, 3, 1 << 30])
def test_aligned_buffer_refuses(alignment: int) -> None:
    with pytest.raises(ValueError, match="must divide the page size"):
        aligned_buffer(1, alignment)
    with pytest.raises(ValueError, match="must divide the page size"):
        MemoryStore(alignment=alignment)


def test_a_file_store_needs_a_thread(path: Path) -> None:
    with pytest.raises(ValueError, match="threads must be at least 1"):
        FileStore(path, threads=0)
    assert not path.exists()


# -- a bounded page cache --------------------------------------------------------------------------------------------

CACHE = 256 << 10


def cached_nbytes(path: Path) -> int:
    """How much of the file the page cache holds, by mincore over a mapping that is never touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    nbytes = path.stat().st_size
    with open(path, "rb") as file:
        address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    try:
        if libc.mincore(address, nbytes, pages) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(address, nbytes)
    return sum(byte & 1 for byte in pages.raw[: -(-nbytes // mmap.PAGESIZE)]) * mmap.PAGESIZE


def most_cached(store: FileStore, path: Path, nbytes: int) -> tuple[int, int]:
    """Writes and reads four blocks; the most that was cached meanwhile, and what is cached at the end, bytes."""
    keys = "abcd"
    store.reserve(dict.fromkeys(keys, nbytes))
    samples, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.0005):
            samples.append(cached_nbytes(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    content = {key: key.encode() * nbytes for key in keys}
    targets = {key: bytearray(nbytes) for key in keys}
    try:
        for ticket in [store.write(key, content[key]) for key in keys]:
            ticket.wait()
        for ticket in [store.read(key, targets[key]) for key in keys]:
            ticket.wait()
    finally:
        stop.set()
        watcher.join()
    assert targets == content
    assert len(samples) > 3
    return max(samples), cached_nbytes(path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder whose files are not the page cache itself, as tmpfs' are."""
    probe = tmp_path / "probe"
    with open(probe, "wb") as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_nbytes(probe):
        pytest.skip("files in the temporary folder live in memory")
    probe.unlink()
    return tmp_path


@pytest.mark.parametrize("nbytes", [4 << 20, (4 << 20) - 1234])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_page_cache_stays_small(disk: Path, threads: int, nbytes: int) -> None:
    store = FileStore(disk / "blocks", threads=threads, cache_nbytes=CACHE)
    most, left = most_cached(store, disk / "blocks", nbytes)
    store.close()
    assert most <= CACHE
    assert left == 0
    plain = FileStore(disk / "plain", threads=threads)
    most, left = most_cached(plain, disk / "plain", nbytes)
    plain.close()
    assert min(most, left) > 4 * 4_000_000, "without a bound all of it is cached: what was measured above is real"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("alignment", [64, 4096])
def test_a_store_with_a_small_cache_conforms(tmp_path: Path, threads: int, alignment: int) -> None:
    number = itertools.count()
    made = lambda: FileStore(  # noqa: E731
        tmp_path / str(next(number)), threads=threads, alignment=alignment, cache_nbytes=5 * mmap.PAGESIZE
    )
    check_block_store(made)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_no_size(path: Path) -> None:
    with pytest.raises(ValueError, match=f"cache_nbytes 8191: at least {2 * mmap.PAGESIZE}, a page per thread"):
        FileStore(path, cache_nbytes=2 * mmap.PAGESIZE - 1)
    assert not path.exists()


@pytest.mark.parametrize("has_sync_range", [True, False])
def test_a_device_that_fails_after_the_write_call(
    path: Path, monkeypatch: pytest.MonkeyPatch, has_sync_range: bool
) -> None:
    """Buffered writes succeed and the device fails later: a bounded cache finds out at once."""
    store = FileStore(path, cache_nbytes=CACHE)
    store.reserve({"a": 4096, "b": 3 * CACHE})

    def failing(*args: Any) -> int:
        if has_sync_range:
            ctypes.set_errno(errno.EIO)
            return -1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store._cache, "_sync_range", failing if has_sync_range else None)
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError, match=r"Input/output error while writing 786432 bytes at offset 4096") as caught:
        store.write("b", bytes(3 * CACHE)).wait()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    with pytest.raises(OSError, match="the block was not written"):
        store.read("b", bytearray(3 * CACHE)).wait()
    monkeypatch.undo()
    store.write("b", bytes(3 * CACHE)).wait()
    store.close()


def test_a_system_without_sync_file_range(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), fdatasync(fd)))
    store = FileStore(path, cache_nbytes=CACHE)
    monkeypatch.setattr(store._cache, "_sync_range", None)
    store.reserve({"a": CACHE})
    synced.clear()
    store.write("a", bytes(CACHE)).wait()
    assert len(synced) == 2, "two parts, one per thread of the store"
    store.close()
