"""Whole files: exactly the bytes that were given, whatever was there before, and durable when `sync` says so."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading

import pytest
from zs_offload_aio import AioError, AioReader, AioWriter, Engine, ShortRead


def pieces(seed, sizes):
    draw = random.Random(seed)
    return [draw.randbytes(n) for n in sizes]


SIZES = [
    [],
    [0],
    [1],
    [4096],
    [8, 100_000, 0, 1, 4095, 4096, 511],
    [3] * 3000,
    [1 << 20, 5, 1 << 20],
    [(2 << 20) + 1],
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
def test_the_file_is_the_buffers(engine, tmp_path, sizes):
    path, buffers = tmp_path / "blob", pieces(1, sizes)
    with AioWriter(engine) as writer:
        ticket = writer.write(path, buffers)
        assert ticket.wait() == sum(sizes)
        writer.sync(path)
        assert path.read_bytes() == b"".join(buffers)
    if sizes:
        target, start = bytearray(max(sizes)), sum(sizes[: sizes.index(max(sizes))])
        with AioReader(engine) as reader:
            assert reader.read(path, start, target).wait() == len(target)
        assert target == max(buffers, key=len)


def test_a_longer_file_leaves_no_tail(engine, tmp_path):
    path = tmp_path / "blob"
    with AioWriter(engine) as writer:
        for n in (3_000_001, 10_000, 4097, 4096, 1, 0, 700):
            writer.write(path, [bytes([n % 251]) * n])
            writer.sync(path)
            assert path.read_bytes() == bytes([n % 251]) * n
        first = writer.write(path, [b"1" * 2_000_001])  # in flight, or not, when the next begins
        second = writer.write(path, iter([b"2" * 100]))
        assert first.wait() == 2_000_001 and second.wait() == 100
        assert path.read_bytes() == b"2" * 100


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    before = os.umask(0o027)
    try:
        with AioWriter() as writer:
            writer.write(tmp_path / "open", [b"x"])
            writer.write(tmp_path / "mine", [b"x"], permissions=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600


def test_what_is_no_list_of_buffers(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(b"old")
    with AioWriter() as writer:
        for wrong in (b"bytes", "text", bytearray(3), memoryview(b"x"), ["text"], [1], [memoryview(b"abcd")[::2]]):
            with pytest.raises((TypeError, BufferError)):
                writer.write(path, wrong)
        with pytest.raises(TypeError):
            writer.write(b"bytes", [b"x"])
    assert path.read_bytes() == b"old"


def test_paths_that_cannot_be(tmp_path):
    with AioWriter() as writer, AioReader() as reader:
        for path, kind in ((tmp_path / "no" / "blob", FileNotFoundError), (tmp_path, IsADirectoryError)):
            with pytest.raises(kind) as caught:
                writer.write(path, [b"x"])
            assert caught.value.filename == str(path)
        for call in (lambda: writer.sync(tmp_path / "none"), lambda: reader.read(tmp_path / "none", 0, bytearray(1))):
            with pytest.raises(FileNotFoundError) as caught:
                call()
            assert caught.value.filename == str(tmp_path / "none")


def test_no_space_is_said_at_once_and_leaves_no_file_of_zeros(engine, tmp_path):
    path = tmp_path / "blob"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AioWriter(engine) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            with pytest.raises(AioError) as caught:
                writer.write(path, [b"x" * (2 << 20)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
        assert path.stat().st_size == 0
        writer.write(path, [b"x" * (2 << 20)])
        writer.sync(path)
    assert path.read_bytes() == b"x" * (2 << 20)


class FailingFile:
    """A file whose writes, or syncs, fail for as long as `failing` says so."""

    def __init__(self, file, failing):
        self._file, self._failing = file, failing

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.close()

    def flush(self, level):
        if self._failing.pop("sync", None):
            raise AioError(errno.EIO, "injected", self._file.path)
        self._file.flush(level)


def test_a_failed_sync_stays_failed_until_the_file_is_written_again(tmp_path):
    failing = {}

    class Failing(Engine):
        def open(self, *args, **options):
            return FailingFile(super().open(*args, **options), failing)

    path = tmp_path / "blob"
    with Failing() as engine, AioWriter(engine) as writer:
        writer.write(path, [b"lost"])
        failing["sync"] = True  # once, as the kernel reports it
        for _ in range(3):
            with pytest.raises(AioError, match="injected"):
                writer.sync(path)
        writer.write(path, [b"again"])
        writer.sync(path)
        writer.sync(path)
    assert path.read_bytes() == b"again"


def test_a_failed_write_fails_the_sync_every_time(tmp_path):
    path = tmp_path / "blob"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class NoPreallocation(FailingFile):
        def preallocate(self, nbytes):
            return False

    class Late(Engine):
        def open(self, *args, **options):
            return NoPreallocation(super().open(*args, **options), {})

    with Late() as engine, AioWriter(engine) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            ticket = writer.write(path, [b"x" * (3 << 20)])
            for call in (ticket.wait, lambda: writer.sync(path), lambda: writer.sync(path)):
                with pytest.raises(AioError) as caught:
                    call()
                assert caught.value.errno == errno.EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with pytest.raises(AioError):
            writer.sync(path)
        writer.write(path, [b"x" * (3 << 20)])
        writer.sync(path)


def test_short_files_say_where_they_end(engine, tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 10_000)
    with AioReader(engine) as reader:
        for offset, n, found in ((0, 10_001, 10_000), (9_999, 5000, 1), (20_000, 10, 0)):
            with pytest.raises(ShortRead) as caught:
                reader.read(path, offset, bytearray(n)).wait()
            assert (caught.value.offset, caught.value.nbytes) == (offset, n)
            assert caught.value.done_nbytes == found
        with pytest.raises(ValueError):
            reader.read(path, -1, bytearray(1))
        with pytest.raises(TypeError):
            reader.read(path, 0, b"xx")


def test_the_reader_follows_a_name_to_another_file(tmp_path):
    path, other = tmp_path / "blob", tmp_path / "other"
    with AioReader() as reader:
        for turn in range(3):
            other.write_bytes(bytes([turn]) * 5000)
            other.replace(path)
            target = bytearray(5000)
            reader.read(path, 0, target).wait()
            assert target == bytes([turn]) * 5000
        path.unlink()
        with pytest.raises(FileNotFoundError):
            reader.read(path, 0, bytearray(1))


def test_many_files_do_not_exhaust_descriptors(engine, tmp_path):
    def opened():
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.lexists(link))

    with AioWriter(engine) as writer, AioReader(engine) as reader:
        for number in range(200):
            writer.write(tmp_path / f"{number}", [bytes([number]) * 1000])
        for number in range(200):
            writer.sync(tmp_path / f"{number}")
        targets = [bytearray(1000) for _ in range(200)]
        tickets = [reader.read(tmp_path / f"{number}", 0, target) for number, target in enumerate(targets)]
        assert 0 < opened() < 200
        for ticket in tickets:
            ticket.wait()
    assert targets == [bytes([number]) * 1000 for number in range(200)]
    assert opened() == 0


def test_threads_write_and_sync(engine, tmp_path):
    failures = []

    def use(number):
        try:
            for turn in range(6):
                path = tmp_path / f"{(number + turn) % 3}"  # several threads, one path
                writer.write(path, [bytes([number]) * 5000, b"end"])
                writer.sync(path)
        except Exception as error:
            failures.append(error)

    with AioWriter(engine) as writer:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []
    for name in "012":
        found = (tmp_path / name).read_bytes()
        assert found[5000:] == b"end" and len(set(found[:5000])) == 1


def test_after_close(tmp_path):
    path = tmp_path / "blob"
    writer, reader = AioWriter(), AioReader()
    ticket = writer.write(path, [b"x" * 100_000])
    writer.close()
    writer.close()
    assert ticket.wait() == 100_000 and path.read_bytes() == b"x" * 100_000
    target = bytearray(100_000)
    reading = reader.read(path, 0, target)
    reader.close()
    reader.close()
    assert reading.wait() == 100_000 and target == b"x" * 100_000
    for call in (
        lambda: writer.write(path, []),
        lambda: writer.sync(path),
        lambda: reader.read(path, 0, bytearray(1)),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
