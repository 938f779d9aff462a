"""Blocks on disk: exact bytes or a typed error, space taken when it is asked for, nothing left behind."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
from zs_offload_aio import AioError, Engine, NvmeStore


@pytest.fixture
def store(tmp_path):
    with NvmeStore(tmp_path) as made:
        yield made


def content(store, key, nbytes):
    target = bytearray(nbytes)
    assert store.read(key, target).wait() == nbytes
    return bytes(target)


@contextmanager
def file_size_limit(nbytes):
    """A full disk without root: the kernel ends files of this process there (SIGXFSZ is ignored by Python)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_child(body):
    """What `body` returns in a forked child, as its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads: the very subject
        pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = body()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


NAMES = ["../x", "/etc/passwd", "a/b", "nul\0byte", "", ".", "..", "key", "KEY", "k" * 300, "ключ", "\ud800", " "]


@pytest.mark.row(31)
def test_any_text_is_a_key_and_none_is_a_path(engine, tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    with NvmeStore(folder, engine=engine) as store:
        store.reserve({key: 100 + number for number, key in enumerate(NAMES)})
        for number, key in enumerate(NAMES):
            store.write(key, bytes([number]) * (100 + number)).wait()
        for number, key in enumerate(NAMES):
            assert content(store, key, 100 + number) == bytes([number]) * (100 + number)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["inside"]
        for key in NAMES:
            store.discard(key)
        assert store.stats()["blocks"] == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inside"]


@pytest.mark.parametrize("key", [b"bytes", 1, None, ("a",)])
def test_what_is_no_text_is_no_key(store, key):
    for call in (
        lambda: store.reserve({key: 1}),
        lambda: store.write(key, b"x"),
        lambda: store.read(key, bytearray(1)),
        lambda: store.discard(key),
    ):
        with pytest.raises(TypeError, match="a key is a str"):
            call()


def test_sizes_that_are_none(store):
    with pytest.raises(TypeError):
        store.reserve({"k": 1.5})
    with pytest.raises(OSError) as caught:
        store.reserve({"k": 2**63})
    assert caught.value.errno == errno.EFBIG and caught.value.filename == store.path
    with pytest.raises(ValueError, match="power of two"):
        NvmeStore(os.path.dirname(store.path), alignment=3000)
    assert os.listdir(os.path.dirname(store.path)) == []


def test_folders_that_are_none(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"mine")
    for path, kind in ((tmp_path / "missing", FileNotFoundError), (plain, NotADirectoryError)):
        with pytest.raises(kind) as caught:
            NvmeStore(path)
        assert caught.value.filename == str(path)
    assert plain.read_bytes() == b"mine"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)

    def refused():
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        try:
            NvmeStore(closed)
        except PermissionError as error:
            return 0 if error.filename.startswith(str(closed)) else 2
        return 3

    for folder in (tmp_path, *tmp_path.parents):  # the other user must be able to get there
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)
    assert in_child(refused) == 0


def test_the_file_has_no_name_unless_it_is_kept(tmp_path):
    with NvmeStore(tmp_path) as store:
        store.reserve({"k": 5000})
        assert os.listdir(tmp_path) == []
        assert os.path.dirname(store.path) == str(tmp_path)
    with NvmeStore(tmp_path, keep=True) as store, NvmeStore(tmp_path, keep=True) as other:
        assert store.path != other.path
        store.reserve({"k": 5000})
        store.write("k", b"x" * 5000).wait()
        assert os.stat(store.path).st_mode & 0o777 == 0o600
    assert len(os.listdir(tmp_path)) == 2
    with open(store.path, "rb") as file:
        assert file.read() == b"x" * 5000 + bytes(8192 - 5000)


def test_sizes_and_memory(engine, tmp_path):
    sizes = [0, 1, 511, 512, 4095, 4096, 4097, 100_001, 3_000_001]
    with NvmeStore(tmp_path, engine=engine) as store:
        store.reserve({str(n): n for n in sizes})
        for n in sizes:
            source = store.buffer(n)
            source[:] = random.Random(n).randbytes(n)
            assert store.write(str(n), source).wait() == n
        for n in sizes:
            guarded = bytearray(n + 2)
            assert store.read(str(n), memoryview(guarded)[1 : n + 1]).wait() == n
            assert guarded == b"\0" + random.Random(n).randbytes(n) + b"\0"
        assert store.stats()["backend"] == engine.backend
    with engine.open(tmp_path / "still open", "w") as file:
        file.write(b"x").wait()


@pytest.mark.row(2)
def test_a_full_disk_is_found_in_reserve_and_nothing_is_taken(engine, tmp_path):
    with NvmeStore(tmp_path, engine=engine, keep=True) as store:
        store.reserve({"k": 100_000})
        store.write("k", b"k" * 100_000).wait()
        before = os.stat(store.path)
        with file_size_limit(1 << 20), pytest.raises(OSError) as caught:
            store.reserve({"small": 10, "large": 2 << 20})
        assert caught.value.errno == errno.EFBIG and caught.value.filename == store.path
        after = os.stat(store.path)
        assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
        assert store.stats()["blocks"] == 1
        for key in ("small", "large"):
            with pytest.raises(KeyError):
                store.write(key, b"0123456789")
        store.reserve({"small": 10, "large": 2 << 20})
        store.write("large", b"l" * (2 << 20)).wait()
        assert content(store, "large", 2 << 20) == b"l" * (2 << 20)
        assert content(store, "k", 100_000) == b"k" * 100_000


@pytest.mark.parametrize("waited", [True, False])
def test_a_failed_write_is_never_read_as_if_it_were_one(engine, tmp_path, waited):
    n = 3 << 20
    with NvmeStore(tmp_path, engine=engine) as store:
        store.reserve({"before": 4096, "k": n})
        store.write("before", b"b" * 4096).wait()
        store.write("k", b"1" * n).wait()
        with file_size_limit(1 << 20):
            ticket = store.write("k", b"2" * n)
            if waited:
                for _ in range(2):
                    with pytest.raises(AioError) as caught:
                        ticket.wait()
                    assert caught.value.errno == errno.EFBIG and caught.value.filename == store.path
            del ticket
            read = store.read("k", bytearray(n))
            for _ in range(2):
                with pytest.raises(AioError, match="block 'k' was not written whole") as caught:
                    read.wait()
                assert caught.value.errno == errno.EFBIG and caught.value.nbytes == n
        with pytest.raises(AioError, match="not written whole"):
            store.read("k", bytearray(n)).wait()
        assert content(store, "before", 4096) == b"b" * 4096
        assert store.stats()["failed_writes"] == 1
        store.write("k", b"3" * n)
        assert content(store, "k", n) == b"3" * n


def test_a_block_that_is_reserved_again_is_nobodys(store):
    store.reserve({"k": 5000})
    store.write("k", b"secret" * 833 + b"..").wait()
    store.discard("k")
    store.reserve({"l": 5000})
    with pytest.raises(KeyError, match="never written"):
        store.read("l", bytearray(5000))


def test_churn_against_a_dict(engine, tmp_path):
    draw = random.Random(7)
    model, most = {}, 0
    with NvmeStore(tmp_path, engine=engine) as store:
        for step in range(1500):
            key = f"k{draw.randrange(300)}"
            choice = draw.random()
            if key not in model and choice < 0.8:
                nbytes = draw.choice((0, 1, 4096, draw.randrange(60_000)))
                store.reserve({key: nbytes})
                model[key] = (nbytes, None)
            elif key in model and choice < 0.25:
                store.discard(key)
                del model[key]
            elif key in model and choice < 0.7:
                written = draw.randbytes(model[key][0])
                store.write(key, written)  # not waited for: the read below is ordered behind it
                model[key] = (model[key][0], written)
            elif key in model and model[key][1] is not None:
                assert content(store, key, model[key][0]) == model[key][1], (step, key)
            most = max(most, sum(-(-nbytes // 4096) * 4096 for nbytes, _ in model.values()))
        for key, (nbytes, written) in model.items():
            if written is not None:
                assert content(store, key, nbytes) == written
        stats = store.stats()
        assert stats["blocks"] == len(model)
        assert stats["file_nbytes"] <= 1.5 * most
        for key in model:
            store.discard(key)
        stats = store.stats()
        assert stats["free_nbytes"] == stats["file_nbytes"] and stats["holes"] == 1 and stats["in_flight"] == 0


def test_buffers_outlive_the_store_and_are_used_again(tmp_path):
    with NvmeStore(tmp_path, alignment=64) as store:
        kept = store.buffer(100)
        with pytest.raises(ValueError):
            store.buffer(-1)
    kept[:] = b"x" * 100
    assert kept.tobytes() == b"x" * 100


def test_an_engine_that_was_closed_first(tmp_path):
    engine = Engine()
    store = NvmeStore(tmp_path, engine=engine)
    store.reserve({"k": 100_000})
    ticket = store.write("k", b"x" * 100_000)
    engine.close()
    assert ticket.wait() == 100_000
    with pytest.raises(ValueError, match="closed"):
        store.write("k", b"x" * 100_000)
    store.close()
    assert os.listdir(tmp_path) == []


def test_its_own_engine_is_tuned_by_keywords(tmp_path):
    with NvmeStore(tmp_path, backend="threads", threads=3, block_size=8192, queue_depth=4, direct=False) as store:
        assert (store.stats()["backend"], store.stats()["mode"]) == ("threads", "buffered")
        store.reserve({"k": 100_001})
        store.write("k", bytes(range(256)) * 390 + bytes(161)).wait()
        assert content(store, "k", 100_001) == bytes(range(256)) * 390 + bytes(161)
        found = store._engine.stats()
        assert {one["chunk_nbytes"] for one in found["calibration"]} == {8192}
        assert found["transfers"] >= 2 * 100_001 // 8192
        assert found["peak_depth"] <= 4
    with NvmeStore(tmp_path, block_size=None, queue_depth=None, threads=None, backend=None):
        pass


@pytest.mark.parametrize(
    ("option", "value"), [("block_size", 1000), ("queue_depth", 0), ("threads", 257), ("backend", "fast")]
)
def test_options_out_of_their_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=str(value)):
        NvmeStore(tmp_path, **{option: value})
    assert os.listdir(tmp_path) == []


def test_options_beside_an_engine(engine, tmp_path):
    for option in ("block_size", "queue_depth", "threads"):
        with pytest.raises(ValueError, match="give them, or an engine"):
            NvmeStore(tmp_path, engine=engine, **{option: 4096})
    with pytest.raises(ValueError, match="give them, or an engine"):
        NvmeStore(tmp_path, engine=engine, backend="threads")
    assert os.listdir(tmp_path) == []


def test_threads_share_a_store(engine, tmp_path):
    failures = []

    def use(number):
        try:
            for turn in range(10):
                key, n = f"{number}-{turn % 3}", 10_000 + turn % 3
                store.reserve({key: n})
                store.write(key, bytes([number, turn]) * (n // 2) + b"." * (n % 2))
                if content(store, key, n) != bytes([number, turn]) * (n // 2) + b"." * (n % 2):
                    failures.append((number, turn))
                if turn % 2:
                    store.discard(key)
        except Exception as error:
            failures.append((number, error))

    with NvmeStore(tmp_path, engine=engine) as store:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []


def test_a_file_system_that_cannot_preallocate(tmp_path):
    class File:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def preallocate(self, nbytes):
            self._file.truncate(nbytes)
            return False

    class Other(Engine):
        def open(self, *args, **options):
            return File(super().open(*args, **options))

    with Other() as engine, NvmeStore(tmp_path, engine=engine) as store:
        assert store.preallocated
        store.reserve({"k": 10_000})
        assert not store.preallocated and store.stats()["preallocated"] is False
        store.write("k", b"x" * 10_000).wait()
        assert content(store, "k", 10_000) == b"x" * 10_000


def test_killed_it_leaves_nothing(tmp_path):
    code = f"""
from zs_offload_aio import NvmeStore
store = NvmeStore({str(tmp_path)!r})
store.reserve({{"k": 1 << 20}})
tickets = [store.write("k", bytes(1 << 20)) for _ in range(4)]
print("ready", flush=True)
import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    assert os.listdir(tmp_path) == []


def test_a_forked_child_cannot_use_it_and_does_no_harm(tmp_path):
    with NvmeStore(tmp_path, keep=True) as store:
        store.reserve({"k": 200_000})
        flying = store.write("k", b"k" * 200_000)

        def child():
            calls = (
                lambda: store.write("k", b"c" * 200_000),
                lambda: store.read("k", bytearray(200_000)),
                lambda: store.reserve({"l": 1}),
                lambda: store.discard("k"),
                lambda: store.buffer(1),
                store.stats,
            )
            refused = 0
            for call in calls:
                try:
                    call()
                except RuntimeError as error:
                    refused += "after the fork" in str(error)
            store.close()
            return refused

        assert in_child(child) == 6
        assert flying.wait() == 200_000
        assert content(store, "k", 200_000) == b"k" * 200_000
        assert os.path.exists(store.path)
