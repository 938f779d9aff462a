"""Rows 4-6: files that end early, disks that fail to read, disks that fail after they said yes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from faults_memory import MIB, Guarded, aligned, pattern
from faults_mounts import loop_ext4, lying_disk
from faults_process import forbid, in_child
from zs_offload_aio import AioError, Engine, ShortRead


def numbers(error: Exception) -> set[int]:
    """Those of the error's text, but for the file's name."""
    text = str(error).replace(repr(getattr(error, "filename", "")), "")
    return {int(number) for number in re.findall(r"\d+", text)}


# ---- row 4 ----


@pytest.mark.row(4)
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("residue", [0, 3])
@pytest.mark.parametrize("size", [0, 1, 511, 4096, 70_000, 2 * MIB + 100])
@pytest.mark.parametrize("chunk", [None, 4096])
def test_file_ends_early(
    engines: Callable[..., Engine],
    backend: str,
    tmp_path: Path,
    size: int,
    residue: int,
    direct: bool,
    chunk: int | None,
) -> None:
    """A read beyond the end says where the file ends, what was wanted and what was found, in whatever order the
    transfers came to their ends."""
    engine = engines(backend, chunk_nbytes=chunk, depth=32)
    path = tmp_path / "short"
    path.write_bytes(pattern(size, seed=size))
    for offset, nbytes in ((0, size + 1), (0, 4 * MIB), (size // 2, size + 4096), (size + 8192, 4096)):
        target = Guarded(nbytes, residue)
        found = max(0, size - offset)
        with engine.open(path, direct=direct) as file:
            ticket = file.read(target.view, offset)
            with pytest.raises(ShortRead) as caught:
                ticket.wait()
        error = caught.value
        assert error.errno == errno.ENODATA and error.filename == os.fspath(path)
        assert (error.offset, error.nbytes, error.done_nbytes) == (offset, nbytes, found)
        assert numbers(error) >= {offset, nbytes, found}
        assert target.intact()
    with engine.open(path, direct=direct) as file:
        target = Guarded(size, residue)
        assert file.read(target.view).wait() == size
        assert bytes(target.view) == pattern(size, seed=size) and target.intact()


@pytest.mark.row(4)
def test_truncated_behind_the_engine(engine: Engine, tmp_path: Path) -> None:
    """The file loses its end after it was opened; its size is asked when it matters, not when it was opened."""
    path = tmp_path / "truncated"
    path.write_bytes(pattern(4 * MIB))
    buffer = aligned(4 * MIB)
    with engine.open(path) as file:
        assert file.read(buffer).wait() == 4 * MIB
        os.truncate(path, 3 * MIB - 700)
        assert file.size == 3 * MIB - 700
        with pytest.raises(ShortRead) as caught:
            file.read(buffer).wait()
        assert caught.value.done_nbytes == 3 * MIB - 700
        assert file.read(buffer[:MIB]).wait() == MIB
        os.truncate(path, 4 * MIB)
        assert file.read(buffer).wait() == 4 * MIB
        assert bytes(buffer[3 * MIB - 700 :]).count(0) == MIB + 700


# ---- row 5 ----


@pytest.mark.root
@pytest.mark.row(5)
@pytest.mark.parametrize("direct", [True, False])
def test_read_error(engine: Engine, namespace: Path, direct: bool) -> None:
    """The end of the device is gone: EIO with the offset, and the bytes before it can still be read."""
    name = f"row5-{engine.backend}-{direct}"
    with loop_ext4(namespace / name, 48 * MIB) as mount:
        path = mount / "file"
        with engine.open(path, "x") as file:
            file.preallocate(40 * MIB)  # in one piece: what is late in the file is late on the device
            for piece in range(10):
                file.write(pattern(4 * MIB, seed=piece), 4 * MIB * piece)
            file.flush("full")
        os.truncate(namespace / name / "image", 24 * MIB)
        with open(path, "rb") as cached:
            os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = aligned(40 * MIB)
        with engine.open(path, direct=direct) as file:
            with pytest.raises(AioError) as caught:
                file.read(buffer).wait()
            error = caught.value
            assert error.errno == errno.EIO and error.filename == os.fspath(path)
            assert 12 * MIB < error.offset < 40 * MIB and 0 < error.nbytes <= 40 * MIB - error.offset
            assert error.done_nbytes < 40 * MIB
            assert file.read(buffer[: 4 * MIB]).wait() == 4 * MIB
            assert bytes(buffer[: 4 * MIB]) == pattern(4 * MIB, seed=0)


# ---- row 6 ----


@pytest.mark.root
@pytest.mark.row(6)
def test_buffered_write_lost_later(engine: Engine, namespace: Path) -> None:
    """Every write said yes; only the sync knows. Its error stays: asked again, the kernel itself would say yes."""
    with lying_disk(namespace / f"row6-{engine.backend}") as mount:
        path = mount / "lost"
        file = engine.open(path, "x", direct=False)
        for piece in range(24):
            assert file.write(pattern(MIB, seed=piece), MIB * piece).wait() == MIB
        with pytest.raises(AioError) as first:
            file.flush("data")
        assert first.value.errno in (errno.EIO, errno.ENOSPC) and first.value.filename == os.fspath(path)
        for level in ("data", "full", "data"):
            with pytest.raises(AioError) as again:
                file.flush(level)
            assert again.value.errno == first.value.errno
        file.close()


@pytest.mark.root
@pytest.mark.row(6)
def test_direct_write_lost_at_once(engine: Engine, namespace: Path) -> None:
    """The same disk without the page cache in between: some transfer, or else the sync, says so."""
    with lying_disk(namespace / f"row6-direct-{engine.backend}") as mount:
        path = mount / "lost"
        with engine.open(path, "x") as file, pytest.raises(AioError) as caught:
            file.write([aligned(8 * MIB)] * 3).wait()
            file.flush("data")
        assert caught.value.errno in (errno.EIO, errno.ENOSPC) and caught.value.filename == os.fspath(path)


@pytest.mark.row(6)
@pytest.mark.parametrize("level", ["data", "full"])
def test_sync_is_refused(backend: str, tmp_path: Path, level: str) -> None:
    """fsync and fdatasync are answered by EIO: flush raises, and a flush that does not sync does not."""
    path = tmp_path / "file"

    def work() -> None:
        forbid(fsync=errno.EIO, fdatasync=errno.EIO)
        with Engine(backend=backend) as engine:
            file = engine.open(path, "x")
            file.write(pattern(10_000))
            file.flush("none")
            for _ in range(3):
                with pytest.raises(AioError) as caught:
                    file.flush(level)
                assert caught.value.errno == errno.EIO and caught.value.filename == os.fspath(path)
            file.close()

    in_child(work)
    assert path.read_bytes() == pattern(10_000)


@pytest.mark.row(6)
def test_flush_waits_for_the_writes(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with engine.open(path, "x") as file:
        tickets = [file.write(pattern(MIB, seed=piece), MIB * piece) for piece in range(16)]
        file.flush("full")
        assert all(ticket.done for ticket in tickets)
        for level in ("none", "data", "full"):
            file.flush(level)
        with pytest.raises(ValueError, match="level"):
            file.flush("everything")
    assert path.read_bytes() == b"".join(pattern(MIB, seed=piece) for piece in range(16))
