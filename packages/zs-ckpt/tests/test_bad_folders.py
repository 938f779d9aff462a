"""Folders, disks and neighbours that fail: an error that says so, and the checkpoint before it is intact."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zs_ckpt

sys.path.insert(0, str(Path(__file__).parent))

from damage import TAG, folder_with_step_2, intact, load_one, refused, save_long, save_one
from rigs import become_nobody, in_child, limit_file_size, own_mounts, small_disk
from torture.ours import Zs

KIB = 1 << 10

folder = pytest.fixture(folder_with_step_2)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that any user reaches."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


# ---- no room, no permission ----


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("limit", [1, 1000, 4 * KIB, 100 * KIB + 7, 2048 * KIB])
def test_a_file_that_cannot_grow(folder: Path, limit: int, asynchronous: bool) -> None:
    def work() -> tuple[int | None, str]:
        limit_file_size(limit)
        error = refused(lambda: save_long(folder, 4, asynchronous=asynchronous))
        return getattr(error, "errno", None), str(error)

    number, text = in_child(work)
    assert number in (errno.EFBIG, errno.ENOSPC), text
    assert str(folder) in text
    intact(folder)


def fill_up(path: Path, leave_nbytes: int) -> None:
    """Take the disk's space but for `leave_nbytes`, or nearly: the file system needs some itself."""

    def wanted() -> int:
        found = os.statvfs(path.parent)
        return found.f_bavail * found.f_frsize - leave_nbytes

    with open(path, "wb") as file:
        piece = wanted()
        while piece > 0:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece)
            piece = min(piece // 2, wanted())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk: root only")
def test_a_full_disk(tmp_path: Path) -> None:
    def work() -> list[str]:
        own_mounts()
        said = []
        with small_disk(tmp_path / "disk", 8 << 20) as disk:
            root = disk / "checkpoints"
            save_one(root, 2)
            for leave in (0, 4, 8, 20, 100, 500, 1500, 2500):
                fill = disk / "fill"
                fill_up(fill, leave * KIB)
                error = refused(lambda: save_long(root, 4))
                assert getattr(error, "errno", None) == errno.ENOSPC, error
                said.append(str(error))
                assert load_one(root) == 2
                fill.unlink()
                assert load_one(root) == 2
            intact(root)
        return said

    assert all("checkpoints" in text for text in in_child(work))


def test_a_read_only_folder(public: Path) -> None:
    folder = public / "folder"
    save_one(folder, 2)
    for path in [folder, folder / TAG]:
        path.chmod(0o555)

    def work() -> str:
        become_nobody()
        assert load_one(folder) == 2  # reading needs no more than reading
        error = refused(lambda: save_one(folder, 4))
        assert isinstance(error, PermissionError), error
        assert isinstance(refused(lambda: save_one(folder, 4, "other")), PermissionError)
        return str(error)

    assert str(folder) in in_child(work)
    for path in [folder, folder / TAG]:
        path.chmod(0o755)
    intact(folder)


def test_a_shard_that_may_not_be_read(public: Path) -> None:
    save_one(public / "folder", 2)
    (shard,) = (public / "folder" / TAG).glob("*.safetensors")
    shard.chmod(0)

    def work() -> str:
        become_nobody()
        return str(refused(lambda: load_one(public / "folder")))

    assert shard.name in in_child(work)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "file" in str(refused(lambda: save_one(tmp_path / "file", 2)))
    assert "file" in str(refused(lambda: save_one(tmp_path / "file" / "below", 2)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / TAG).write_text("mine")
    assert TAG in str(refused(lambda: save_one(tmp_path / "folder", 2)))
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / TAG).read_text() == "mine"


def test_nothing_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(zs_ckpt.CheckpointIncomplete):
            load_one(folder)
        with pytest.raises(zs_ckpt.CheckpointIncomplete):
            load_one(folder, TAG)
    assert not (tmp_path / "nowhere").exists()


# ---- others at work ----


def test_another_process_saves_to_the_same_tag(folder: Path) -> None:
    holder = os.open(folder / TAG / "lock", os.O_RDWR | os.O_CREAT)
    pid = os.fork()
    if pid == 0:
        fcntl.flock(holder, fcntl.LOCK_EX)
        os.write(holder, b"{")  # a word that is not finished
        while True:
            time.sleep(10)
    os.close(holder)
    try:
        deadline = time.monotonic() + 30
        while (folder / TAG / "lock").stat().st_size == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        for asynchronous in (False, True):
            with pytest.raises(zs_ckpt.CheckpointBusy) as caught:
                save_long(folder, 4, asynchronous=asynchronous)
            assert TAG in str(caught.value)
        assert load_one(folder) == 2
        save_one(folder, 6, "another")  # other tags are not its business
        assert load_one(folder, "another") == 6
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    shutil.rmtree(folder / "another")
    (folder / "latest").unlink()
    intact(folder)


def _many(folder: Path, tag: str, first: int, keep: int | None) -> dict[str, int]:
    done = {"saved": 0, "busy": 0}
    for step in range(first, first + 40, 2):
        try:
            save_one(folder, step, tag.format(step=step), keep=keep)
            done["saved"] += 1
        except zs_ckpt.CheckpointBusy:
            done["busy"] += 1
    return done


@pytest.mark.parametrize(("tag", "keep"), [(TAG, None), ("step{step}", 2)])
def test_two_processes_save_at_once(tmp_path: Path, tag: str, keep: int | None) -> None:
    """To one tag: each save is committed, or refused as busy. To tags of their own: no one collects the other's."""
    firsts, answers = (1000, 2000), []
    threads = [
        threading.Thread(target=lambda first=first: answers.append(in_child(_many, tmp_path, tag, first, keep)))
        for first in firsts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 2
    assert all(answer["saved"] + answer["busy"] == 20 for answer in answers)
    if keep:
        assert all(answer["busy"] == 0 for answer in answers)
    assert any(answer["saved"] > 0 for answer in answers)  # who comes while the other saves may be refused each time
    load_one(tmp_path)
    save_one(tmp_path, 4000, tag.format(step=4000), keep=keep)
    assert load_one(tmp_path) == 4000
    assert Zs().leftovers(tmp_path) == []


@pytest.mark.parametrize(("tag", "keep"), [(TAG, None), ("step{step}", 1)])
def test_a_reader_beside_a_writer(tmp_path: Path, tag: str, keep: int | None) -> None:
    """Every load gives a committed step, whole, and never an older one than the load before."""
    save_one(tmp_path, 2, tag.format(step=2), keep=keep)
    stop = tmp_path / "stop"

    def read() -> int:
        loads, last = 0, 0
        while not stop.exists():
            step = load_one(tmp_path)
            assert step >= last
            last, loads = step, loads + 1
        return loads

    answers: list[int] = []
    reader = threading.Thread(target=lambda: answers.append(in_child(read)))
    reader.start()
    try:
        for step in range(4, 84, 2):
            save_one(tmp_path, step, tag.format(step=step), keep=keep)
    finally:
        stop.touch()
        reader.join()
    assert answers and answers[0] > 0
