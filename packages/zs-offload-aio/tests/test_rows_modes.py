"""Rows 8-10 and 29: what file systems say about direct I/O, what they do about it; files that cannot be opened."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from faults_memory import MIB, Guarded, aligned, pattern
from faults_mounts import loop_ext4, mounted
from faults_process import become_nobody, in_child
from zs_offload_aio import AioError, AioIsADirectory, AioNotFound, AioPermission, Engine

SIZES = ((0, 4096, 0), (0, MIB, 0), (512, 1024, 512), (4096, 700_001, 1), (1, 3 * MIB + 5, 3), (5000, 1, 0))


def moves(engine: Engine, path: Path, mode: str) -> None:
    """Aligned and unaligned transfers, in a file whose effective mode is `mode`."""
    with engine.open(path, "w") as file:
        assert file.mode == mode, file.reason
        assert bool(file.reason) == (mode == "buffered")
        for offset, nbytes, residue in SIZES:
            source, target = Guarded(nbytes, residue), Guarded(nbytes, residue)
            source.view[:] = pattern(nbytes, seed=nbytes)
            assert file.write(source.view, offset).wait() == nbytes
            assert file.read(target.view, offset).wait() == nbytes
            assert target.view == source.view and target.intact()
            with open(path, "rb") as plain:
                assert os.pread(plain.fileno(), nbytes, offset) == bytes(source.view)


def expected_mode(engine: Engine) -> str:
    return "buffered" if engine.backend == "plain" else "direct"


# ---- row 8 ----


@pytest.mark.root
@pytest.mark.row(8)
def test_ramfs_refuses_direct(engine: Engine, namespace: Path) -> None:
    with mounted("none", namespace / "ramfs", "ramfs") as folder:
        moves(engine, folder / "file", "buffered")
        stats = engine.stats()
        assert stats["buffered_nbytes"] == stats["read_nbytes"] + stats["written_nbytes"] > 0


@pytest.mark.row(8)
def test_dev_full(engine: Engine) -> None:
    """A device that refuses direct I/O and every write, for anybody to try."""
    with engine.open("/dev/full", "r+") as file:
        assert file.mode == "buffered" and file.reason and file.offset_alignment == file.memory_alignment == 1
        with pytest.raises(AioError) as caught:
            file.write(b"x" * 10_000, 512).wait()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")
        assert caught.value.offset == 512 and caught.value.done_nbytes == 0
        target = bytearray(b"x" * 10_000)
        assert file.read(target).wait() == 10_000 and target.count(0) == 10_000


@pytest.mark.row(8)
def test_direct_not_wanted(engine: Engine, tmp_path: Path) -> None:
    with engine.open(tmp_path / "file", "x", direct=False) as file:
        assert file.mode == "buffered" and file.reason.startswith("asked for")


# ---- row 9 ----


@pytest.mark.root
@pytest.mark.row(9)
def test_journalled_data_is_buffered(engine: Engine, namespace: Path) -> None:
    """ext4 with data=journal takes O_DIRECT at open, and any alignment: it goes through the page cache in silence."""
    with loop_ext4(namespace / f"row9-{engine.backend}", 48 * MIB, options="data=journal") as mount:
        moves(engine, mount / "file", "buffered")
        assert engine.stats()["buffered_nbytes"] > 0


@pytest.mark.root
@pytest.mark.row(9)
def test_tmpfs_is_buffered(engine: Engine, namespace: Path) -> None:
    with mounted("none", namespace / "tmpfs", "tmpfs", "size=32m") as folder:
        moves(engine, folder / "file", "buffered")


# ---- row 10 ----


@pytest.mark.root
@pytest.mark.row(10)
@pytest.mark.parametrize("sector_nbytes", [512, 4096])
def test_sector_size(engine: Engine, namespace: Path, sector_nbytes: int) -> None:
    """The alignment is asked of each file; on 4096-byte sectors, 512-byte direct I/O would be refused."""
    name = f"row10-{engine.backend}-{sector_nbytes}"
    with loop_ext4(namespace / name, 48 * MIB, sector_nbytes=sector_nbytes) as mount:
        moves(engine, mount / "file", expected_mode(engine))
        with engine.open(mount / "file", "r+") as file:
            if file.mode == "direct":
                assert file.offset_alignment == sector_nbytes and file.memory_alignment <= sector_nbytes
            size = file.size
            target = Guarded(size - 512, residue=512)
            assert file.read(target.view, 512).wait() == size - 512 and target.intact()
        assert engine.stats()["downgraded"] == 0  # nothing had to be refused to find out


@pytest.mark.root
@pytest.mark.row(10)
def test_direct_bypasses_the_page_cache(engine: Engine, small_ext4: Path) -> None:
    """Whole aligned requests are direct to the last byte; of others only the edges are not, or are bounced."""
    path = small_ext4 / "file"
    try:
        with engine.open(path, "x") as file:
            if file.mode == "buffered":
                assert engine.backend == "plain" and "plain" in file.reason
                return
            file.preallocate(8 * MIB)
            file.write(aligned(4 * MIB)).wait()
            file.read(aligned(4 * MIB)).wait()
            assert engine.stats()["buffered_nbytes"] == engine.stats()["bounced_nbytes"] == 0
            file.write(aligned(2 * MIB), 4 * MIB + 512).wait()
            assert engine.stats()["buffered_nbytes"] <= 2 * 4096
            file.read(aligned(2 * MIB), 4 * MIB + 512).wait()
            assert engine.stats()["buffered_nbytes"] <= 2 * 4096
    finally:
        path.unlink()


# ---- row 29 ----


@pytest.mark.row(29)
def test_missing_file_and_folder(engine: Engine, tmp_path: Path) -> None:
    for path, mode in ((tmp_path / "none", "r"), (tmp_path / "none", "r+"), (tmp_path / "no" / "folder", "w")):
        with pytest.raises(AioNotFound) as caught:
            engine.open(path, mode)
        assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, AioError)
        assert caught.value.errno == errno.ENOENT and caught.value.filename == os.fspath(path)
        assert os.fspath(path) in str(caught.value) and caught.value.backend == engine.backend
    with pytest.raises(AioNotFound):
        engine.read(tmp_path / "none", bytearray(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.row(29)
@pytest.mark.parametrize("mode", ["r", "r+", "w", "rw"])
def test_folder_is_no_file(engine: Engine, tmp_path: Path, mode: str) -> None:
    with pytest.raises(AioIsADirectory) as caught:
        engine.open(tmp_path, mode)
    assert isinstance(caught.value, IsADirectoryError) and caught.value.errno == errno.EISDIR
    assert caught.value.filename == os.fspath(tmp_path)


@pytest.mark.row(29)
def test_other_refusals_at_open(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"kept")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path, mode, number in (
        (file, "x", errno.EEXIST),
        (file / "below", "r", errno.ENOTDIR),
        (tmp_path / "pipe", "r", errno.ESPIPE),  # must not wait for a writer either
        (tmp_path / "loop", "r", errno.ELOOP),
        (tmp_path / ("n" * 300), "w", errno.ENAMETOOLONG),
    ):
        with pytest.raises(AioError) as caught:
            engine.open(path, mode)
        assert caught.value.errno == number and caught.value.filename == os.fspath(path)
    for wrong in ("a", "rb", ""):
        with pytest.raises(ValueError, match="mode"):
            engine.open(file, wrong)
    with pytest.raises(ValueError, match="null"):
        engine.open(f"{file}\0.txt")
    assert file.read_bytes() == b"kept"


@pytest.mark.row(29)
def test_written_though_opened_for_reading(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    with engine.open(path) as file:
        for use in (lambda: file.write(b"new!"), lambda: file.truncate(0), lambda: file.preallocate(10)):
            with pytest.raises((ValueError, AioError), match=re.escape(os.fspath(path))):
                use()
    assert path.read_bytes() == b"kept"


@pytest.mark.row(29)
def test_not_allowed(backend: str, public_folder: Path) -> None:
    """As an ordinary user: somebody's secret, a file to read only, a folder to look into only."""
    secret, readable, folder = public_folder / "secret", public_folder / "readable", public_folder / "folder"
    secret.write_bytes(b"secret")
    readable.write_bytes(b"kept")
    folder.mkdir()
    (folder / "inside").write_bytes(b"inside")
    secret.chmod(0o000)
    readable.chmod(0o444)
    folder.chmod(0o555)

    def work() -> None:
        become_nobody()
        with Engine(backend=backend) as engine:
            for path, mode in ((secret, "r"), (readable, "r+"), (readable, "w"), (folder / "new", "x")):
                with pytest.raises(AioPermission) as caught:
                    engine.open(path, mode)
                assert isinstance(caught.value, PermissionError) and caught.value.errno == errno.EACCES
                assert caught.value.filename == os.fspath(path)
            target = bytearray(4)
            with engine.open(readable) as file:
                assert file.read(target).wait() == 4 and target == b"kept"

    try:
        in_child(work)
    finally:
        folder.chmod(0o755)


@pytest.mark.root
@pytest.mark.row(29)
def test_read_only_file_system(engine: Engine, namespace: Path) -> None:
    read_only = 1
    with mounted("none", namespace / "read-only", "tmpfs", "size=1m", flags=read_only) as folder:
        with pytest.raises(AioError) as caught:
            engine.open(folder / "file", "w")
        assert caught.value.errno == errno.EROFS and caught.value.filename == os.fspath(folder / "file")
