"""Rows 1-3: no space, and writes that are cut short. What is on the disk afterwards is looked at with os.pread."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from faults_memory import MIB, Guarded, aligned, pattern
from faults_mounts import fill, free_nbytes
from faults_process import in_child, limit_file_size
from zs_offload_aio import AioError, Engine

pytestmark = pytest.mark.usefixtures("backend")


def content(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# ---- row 1 ----


@pytest.mark.root
@pytest.mark.row(1)
@pytest.mark.parametrize("direct", [True, False])
def test_full_file_system(engine: Engine, small_ext4: Path, direct: bool) -> None:
    """A write larger than the disk raises ENOSPC with the bytes done; the file's earlier bytes are intact."""
    old = pattern(2 * MIB, seed=1)
    path = small_ext4 / "grows"
    path.write_bytes(old)
    nbytes = free_nbytes(small_ext4) + 4 * MIB
    data = memoryview(pattern(8 * MIB, seed=2))
    pieces = [data] * (nbytes // data.nbytes + 1)
    try:
        with engine.open(path, "r+", direct=direct) as file:
            ticket = file.write(pieces, offset=len(old))
            with pytest.raises(AioError) as caught:
                ticket.wait()
        error = caught.value
        assert error.errno == errno.ENOSPC and error.filename == os.fspath(path) and error.backend == engine.backend
        assert len(old) <= error.offset < len(old) + ticket.nbytes
        assert error.nbytes > 0
        assert 0 <= error.done_nbytes == ticket.done_nbytes < ticket.nbytes
        assert ticket.state == "failed"
        found = content(path)
        assert found[: len(old)] == old
        # the bytes before the first failed transfer cannot all be missing: the disk had room for most of them
        assert error.done_nbytes > 8 * MIB
    finally:
        path.unlink()


@pytest.mark.root
@pytest.mark.row(1)
def test_full_file_system_keeps_what_fits(engine: Engine, small_ext4: Path) -> None:
    """On a full disk, bytes that have their space are still written; the one that has none raises each time."""
    other, path = small_ext4 / "filler", small_ext4 / "file"
    try:
        with engine.open(path, "x") as file:
            assert file.preallocate(4 * MIB)
            fill(other, 0)
            data = pattern(4 * MIB, seed=3)
            assert file.write(data).wait() == len(data)
            for _ in range(2):
                with pytest.raises(AioError) as caught:
                    file.write(data, offset=8 * MIB).wait()
                assert caught.value.errno == errno.ENOSPC and caught.value.done_nbytes == 0
            file.flush()
        assert content(path)[: len(data)] == data
    finally:
        path.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


@pytest.mark.root
@pytest.mark.row(1)
def test_write_nobody_waits_for(engine: Engine, small_ext4: Path) -> None:
    """The error of a dropped ticket is raised by the next flush, or by close."""
    other, path = small_ext4 / "filler", small_ext4 / "file"
    try:
        fill(other, MIB)
        for finish in ("flush", "close"):
            file = engine.open(path, "w")
            file.write(pattern(4 * MIB))
            with pytest.raises(AioError) as caught:
                getattr(file, finish)()
            assert caught.value.errno == errno.ENOSPC and caught.value.filename == os.fspath(path)
            file.close()
    finally:
        path.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


# ---- row 2 ----


@pytest.mark.root
@pytest.mark.row(2)
def test_reserve_more_than_there_is(engine: Engine, small_ext4: Path) -> None:
    path = small_ext4 / "reserved"
    path.write_bytes(b"kept")
    try:
        with engine.open(path, "r+") as file:
            with pytest.raises(AioError) as caught:
                file.preallocate(free_nbytes(small_ext4) + 64 * MIB)
            assert caught.value.errno == errno.ENOSPC and caught.value.filename == os.fspath(path)
        assert content(path)[:4] == b"kept"
    finally:
        path.unlink()


@pytest.mark.row(2)
def test_reserved_space_is_there(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "reserved"
    with engine.open(path, "x") as file:
        if file.preallocate(3 * MIB + 7):
            assert os.stat(path).st_blocks * 512 >= 3 * MIB
        assert file.size == 3 * MIB + 7
        buffer = aligned(3 * MIB + 7)
        buffer[:] = b"x" * buffer.nbytes
        assert file.read(buffer).wait() == buffer.nbytes
        assert bytes(buffer).count(0) == buffer.nbytes


@pytest.mark.row(2)
def test_reserve_beyond_the_file_size_limit(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "limited"

    def work() -> None:
        limit_file_size(MIB)
        with Engine(backend=backend) as engine, engine.open(path, "x") as file:
            with pytest.raises(AioError) as caught:
                file.preallocate(2 * MIB)
            assert caught.value.errno == errno.EFBIG

    in_child(work)


# ---- row 3 ----


@pytest.mark.row(3)
@pytest.mark.parametrize("limit", [4 * MIB, 4 * MIB - 512, 4 * MIB + 1000, 1])
@pytest.mark.parametrize("residue", [0, 1])
def test_file_size_limit(backend: str, tmp_path: Path, limit: int, residue: int) -> None:
    """The kernel writes less than asked, then refuses: done bytes are on the disk, the rest is an error."""
    path = tmp_path / "limited"

    def work() -> None:
        source = Guarded(6 * MIB + 5, residue)
        source.view[:] = pattern(source.nbytes, seed=limit)
        limit_file_size(limit)
        with Engine(backend=backend) as engine, engine.open(path, "x") as file:
            ticket = file.write(source.view)
            with pytest.raises(AioError) as caught:
                ticket.wait()
            error = caught.value
            assert error.errno == errno.EFBIG, error
            assert error.filename == os.fspath(path)
            assert limit - 4096 <= error.offset < source.nbytes
            assert error.done_nbytes == ticket.done_nbytes == os.stat(path).st_size == limit
            assert content(path) == bytes(source.view[:limit])
            inside = min(limit, 4096)  # the engine goes on, and what fits is written
            assert file.write(source.view[:inside]).wait() == inside
            assert content(path)[:inside] == bytes(source.view[:inside])

    in_child(work)


@pytest.mark.row(3)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_short_writes_are_completed(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Every n-th transfer moves half of what it was asked for."""
    monkeypatch.setenv("ZS_AIO_FAULTS", f"short={every}")
    with Engine(backend=backend, chunk_nbytes=64 * 1024, depth=8) as engine:
        for residue, nbytes, offset in ((0, MIB, 0), (1, MIB + 3, 4096), (512, 700_001, 513)):
            path = tmp_path / f"{residue}"
            source = Guarded(nbytes, residue)
            source.view[:] = pattern(nbytes, seed=residue)
            with engine.open(path, "x") as file:
                assert file.write(source.view, offset).wait() == nbytes
            assert content(path) == bytes(offset) + bytes(source.view)
        assert engine.stats()["short_transfers"] > 0
