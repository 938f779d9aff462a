"""A folder of its own for every engine and rank: what lives is left alone, what is dead is collected."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from zs_comm import ConfigError, Group, RankDisagreement
from zs_comm.testing import run_ranks
from zs_zero.tiers.folder import FolderInUse, TierFolder

ALONE = Group.single()


def make(path: Path, job: str | None = "job", **more: float) -> TierFolder:
    return TierFolder(str(path), job=job, group=ALONE, **more)


def in_child(body: Callable[[], object]) -> int:
    """What `body` returns in a forked child, as its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = int(body() or 0)  # type: ignore[call-overload]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


HOLDER = """
import sys, time
from zs_comm import Group
from zs_zero.tiers.folder import TierFolder
folder = TierFolder(sys.argv[1], job=sys.argv[2], group=Group.single())
open(folder.path + "/content", "wb").write(b"x" * 100)
print(folder.path, flush=True)
time.sleep(60)
"""


def other_process(path: Path, job: str = "job") -> tuple[subprocess.Popen[str], Path]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), job], stdout=subprocess.PIPE, text=True, env=env
    )
    if process.stdout is None:
        raise RuntimeError("no pipe")
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


# -- one process -----------------------------------------------------------------------------------------------------


def test_layout_and_removal(tmp_path: Path) -> None:
    with make(tmp_path) as folder:
        assert folder.path == str(tmp_path / "zs-tiers" / "job" / "engine0" / "rank0")
        assert (folder.job, folder.engine, folder.rank) == ("job", 0, 0)
        assert os.listdir(folder.path) == ["lock"]
        (Path(folder.path) / "content").write_bytes(b"x")
        (Path(folder.path) / "deep").mkdir()
    assert list(tmp_path.iterdir()) == [], "something is left"
    folder.close()


def test_engines_of_one_process_number_themselves(tmp_path: Path) -> None:
    folders = [make(tmp_path) for _ in range(3)]
    assert [folder.engine for folder in folders] == [0, 1, 2]
    folders[1].close()
    again = make(tmp_path)
    assert again.engine == 1
    for folder in [*folders, again]:
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_jobs_without_a_name_get_one(tmp_path: Path) -> None:
    with make(tmp_path, None) as one, make(tmp_path, None) as two, make(tmp_path) as named:
        assert len({one.path, two.path, named.path}) == 3
        assert str(os.getpid()) in one.job
        assert one.engine == two.engine == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "job", ["", ".", "..", "a/b", "../x", "-x", ".hidden", "a b", "ключ", "nul\0", "x" * 129, "a\n"]
)
def test_names_that_are_none(tmp_path: Path, job: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        make(tmp_path, job)
    assert list(tmp_path.iterdir()) == []


def test_the_last_part_of_the_path_is_created(tmp_path: Path) -> None:
    make(tmp_path / "new").close()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither this folder nor the one above it exists") as caught:
        make(tmp_path / "not" / "mounted")
    assert caught.value.filename == str(tmp_path / "not" / "mounted")
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"somebody's")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError) as caught:
            make(path)
        assert str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"somebody's"


def test_a_dangling_link_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(NotADirectoryError, match="link"):
        make(tmp_path / "link")


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_may_not_be_written(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "theirs"
    path.mkdir(mode=0o755)

    def body() -> int:
        if os.geteuid() == 0:
            os.chmod(path, mode)
            for above in (tmp_path, *tmp_path.parents):
                if above.stat().st_uid == 0 and above != Path("/"):
                    os.chmod(above, os.stat(above).st_mode | 0o055)
            os.setuid(65534)
        else:
            os.chmod(path, mode)
        try:
            make(path)
        except PermissionError as error:
            return 0 if str(path) in str(error) else 2
        return 3

    above = {one: one.stat().st_mode for one in (tmp_path, *tmp_path.parents)}
    try:
        assert in_child(body) == 0
    finally:
        path.chmod(0o755)
        for one, kept in above.items():
            if one.stat().st_mode != kept:
                one.chmod(kept & 0o7777)


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, mode: int = 0o777) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(OSError, match="Read-only file system.*zs-tiers") as caught:
        make(tmp_path)
    assert caught.value.errno == errno.EROFS


def test_files_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OSError, match="files here cannot be locked: No locks available.*zs-tiers"):
        make(tmp_path)


def test_a_folder_that_vanished_does_not_stop_close(tmp_path: Path) -> None:
    for gone in ("disk", "disk/zs-tiers", "disk/zs-tiers/job/engine0/rank0"):
        (tmp_path / "disk").mkdir(exist_ok=True)
        folder = make(tmp_path / "disk")
        shutil.rmtree(tmp_path / gone)
        folder.close()
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)


def test_what_is_dropped_is_removed(tmp_path: Path) -> None:
    folder = make(tmp_path)
    del folder
    gc.collect()
    assert list(tmp_path.iterdir()) == []


# -- several processes -----------------------------------------------------------------------------------------------


def test_what_lives_is_refused_and_what_was_killed_is_collected(tmp_path: Path) -> None:
    process, path = other_process(tmp_path)
    try:
        with pytest.raises(FolderInUse, match=f"process {process.pid} on .* another name") as caught:
            make(tmp_path)
        error = caught.value
        assert isinstance(error, OSError)
        assert (error.errno, error.filename, error.pid) == (errno.EBUSY, str(path), process.pid)
        with make(tmp_path, "another"):
            assert (path / "content").read_bytes() == b"x" * 100, "a living process' folder was collected"
    finally:
        kill(process)
    assert (path / "content").exists()
    with make(tmp_path, "another"):
        assert not path.exists(), "what a killed process left is there"
        assert sorted(os.listdir(tmp_path / "zs-tiers")) == [".lock", "another"]
    process, path = other_process(tmp_path)
    kill(process)
    with make(tmp_path) as folder:
        assert folder.path == str(path)
        assert os.listdir(path) == ["lock"]


def test_an_ordinary_end_without_close_leaves_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = HOLDER.replace("time.sleep(60)", "")
    subprocess.run([sys.executable, "-c", script, str(tmp_path), "job"], check=True, env=env, capture_output=True)
    assert list(tmp_path.iterdir()) == []


def test_a_fork_removes_nothing_and_holds_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path)
    path = Path(folder.path)
    (path / "content").write_bytes(b"x")

    def body() -> int:
        folder.close()
        gc.collect()
        return 0 if (path / "content").exists() else 1

    assert in_child(body) == 0
    with pytest.raises(FolderInUse):
        raise_in_child(tmp_path)
    folder.close()
    assert list(tmp_path.iterdir()) == []

    # a worker that outlives its parent must not keep the lock
    process, _ = fork_and_die(tmp_path)
    try:
        with make(tmp_path) as again:
            assert os.listdir(again.path) == ["lock"]
    finally:
        os.kill(process, signal.SIGKILL)


def raise_in_child(path: Path) -> None:
    def body() -> int:
        try:
            make(path)
        except FolderInUse:
            return 7
        return 0

    if in_child(body) == 7:
        raise FolderInUse(errno.EBUSY, "as it should be", str(path))


def fork_and_die(path: Path) -> tuple[int, int]:
    """A process that made a folder, forked a worker and died; the worker's number."""
    reading, writing = os.pipe()

    def body() -> int:
        folder = make(path)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writing, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        return len(folder.path)

    code = in_child(body)
    worker = int(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    return worker, code


def test_only_what_was_made_here_is_collected(tmp_path: Path) -> None:
    tree, away = tmp_path / "zs-tiers", tmp_path / "away"
    (away / "rank0").mkdir(parents=True)
    (away / "rank0" / "precious").write_bytes(b"x")
    for name in ("dead/engine0/rank0", "dead/engine0/rank17/deep", "dead/notes", "dead/engine1/backup"):
        (tree / name).mkdir(parents=True)
    (tree / "dead/engine0/rank0/blocks").write_bytes(b"x")
    (tree / "dead/engine0/rank0/link").symlink_to(away)
    (tree / "dead/engine2").symlink_to(away)
    (tree / "dead/engine1/rank3").symlink_to(away / "rank0")
    (tree / "readme.txt").write_text("x")
    (tree / "linked").symlink_to(away)
    with make(tmp_path):
        pass
    assert (away / "rank0" / "precious").read_bytes() == b"x", "a link was followed"
    left = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    assert left == [
        ".lock",
        "dead",
        "dead/engine1",
        "dead/engine1/backup",
        "dead/engine1/rank3",
        "dead/engine2",
        "dead/notes",
        "linked",
        "readme.txt",
    ]


@pytest.mark.parametrize("place", ["zs-tiers", "zs-tiers/job", "zs-tiers/job/engine0", "zs-tiers/job/engine0/rank0"])
def test_links_in_the_way_are_refused(tmp_path: Path, place: str) -> None:
    disk, away = tmp_path / "disk", tmp_path / "away"
    (disk / place).parent.mkdir(parents=True)
    away.mkdir()
    (away / "precious").write_bytes(b"x")
    (disk / place).symlink_to(away)
    with pytest.raises(NotADirectoryError, match="links are not followed"):
        make(disk)
    assert [path.name for path in away.iterdir()] == ["precious"]


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    own = tmp_path / "zs-tiers/job/engine0/rank0"
    own.mkdir(parents=True)
    (tmp_path / "precious").write_bytes(b"x")
    (own / "lock").symlink_to(tmp_path / "precious")
    with make(tmp_path) as folder:
        assert folder.path == str(own)
        assert not (own / "lock").is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"x"


def test_what_cannot_be_collected_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "zs-tiers/dead/engine0/rank0").mkdir(parents=True)
    rmtree = shutil.rmtree

    def failing(path: str) -> None:
        if "dead" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", failing)
    with make(tmp_path):
        pass
    assert "a dead process left" in caplog.text and "dead/engine0/rank0" in caplog.text


def test_a_tree_that_somebody_keeps_locked(tmp_path: Path) -> None:
    (tmp_path / "zs-tiers").mkdir()
    with open(tmp_path / "zs-tiers" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"another process held this lock for 0\.05 s.*\.lock"):
            make(tmp_path, timeout_s=0.05)


def test_close_gives_the_space_back_though_the_tree_is_locked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path, timeout_s=0.05)
    (Path(folder.path) / "blocks").write_bytes(b"x" * 1000)
    with open(tmp_path / "zs-tiers" / ".lock", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder.close()
        assert os.listdir(folder.path) == ["lock"]
        assert "is not removed: " in caplog.text and "held this lock" in caplog.text
    make(tmp_path, "next").close()
    assert list(tmp_path.iterdir()) == [], "the next start collects it"


def race(path: str, start: float, job: str | None, turns: int) -> int:
    """Makes and closes folders as fast as it can; 1 where its own was not its own."""
    time.sleep(max(0.0, start - time.monotonic()))
    for turn in range(turns):
        try:
            folder = TierFolder(path, job=job, group=ALONE)
        except FolderInUse:
            if job is None:
                return 2
            continue
        own = Path(folder.path) / f"content-{os.getpid()}-{turn}"
        own.write_bytes(b"x")
        if sorted(os.listdir(folder.path)) != [own.name, "lock"]:
            return 1
        if turn % 3 == 2:
            folder._held.drop()  # as if it had died
            folder._finalizer.detach()
        else:
            folder.close()
            if own.exists():
                return 3
    return 0


@pytest.mark.parametrize("job", [None, "job"])
def test_many_processes_at_once(tmp_path: Path, job: str | None) -> None:
    start = time.monotonic() + 0.1
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(in_child(lambda: race(str(tmp_path), start, job, 30))))
        for _ in range(6)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert codes == [0] * 6
    make(tmp_path, "after").close()
    assert list(tmp_path.iterdir()) == []


# -- several ranks ---------------------------------------------------------------------------------------------------


def two_engines(group: Group, path: str, job: str | None) -> list[tuple[str, bool]]:
    first = TierFolder(path, job=job, group=group)
    second = TierFolder(path, job=job, group=group)
    found = [(os.path.relpath(one.path, path), one.first) for one in (first, second)]
    first.close()
    second.close()
    return found


def test_each_rank_has_a_folder(tmp_path: Path) -> None:
    found = run_ranks(two_engines, 2, str(tmp_path), "job")
    assert found == [
        [(f"zs-tiers/job/engine{engine}/rank{rank}", rank == 0) for engine in range(2)] for rank in range(2)
    ]
    assert list(tmp_path.iterdir()) == []
    (names,) = {
        tuple(path.split("/")[1] for path, _ in rank) for rank in run_ranks(two_engines, 2, str(tmp_path), None)
    }
    assert len(set(names)) == 2, "the ranks share a name, the engines do not"


def one_more(group: Group, path: str) -> int:
    """Rank 1 has an engine of its own already."""
    own = None
    if group.rank == 1:
        own = TierFolder(path, job="job", group=Group.single())
        os.rename(own.path, own.path.replace("rank0", "rank1"))
    with TierFolder(path, job="job", group=group) as shared:
        return shared.engine


def test_ranks_agree_on_the_engines_number(tmp_path: Path) -> None:
    assert run_ranks(one_more, 2, str(tmp_path)) == [1, 1]


def unlike(group: Group, paths: list[str], jobs: list[str]) -> tuple[str, str, int]:
    try:
        TierFolder(paths[group.rank], job=jobs[group.rank], group=group)
    except (OSError, ValueError, RankDisagreement) as error:
        gc.collect()
        return type(error).__name__, str(error), len(os.listdir(paths[0]))
    return "made", "", -1


def test_what_one_rank_finds_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    bad = str(tmp_path / "not" / "there")
    found = run_ranks(unlike, 2, [str(tmp_path / "good"), bad], ["job"] * 2)
    assert [kind for kind, _, _ in found] == ["RankDisagreement", "FileNotFoundError"]
    assert all(bad in text for _, text, _ in found)
    assert "rank 1 failed with FileNotFoundError" in found[0][1]
    assert list((tmp_path / "good").iterdir()) == []


def test_a_folder_in_use_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    process, _ = other_process(tmp_path / "busy")
    try:
        found = run_ranks(unlike, 2, [str(tmp_path / "busy"), str(tmp_path / "good")], ["job"] * 2)
    finally:
        kill(process)
    assert [kind for kind, _, _ in found] == ["FolderInUse", "RankDisagreement"]
    assert all(f"process {process.pid}" in text for _, text, _ in found)
    assert list((tmp_path / "good").iterdir()) == [], "the rank that had its folder keeps it"


def test_ranks_with_different_jobs(tmp_path: Path) -> None:
    found = run_ranks(unlike, 2, [str(tmp_path)] * 2, ["a", "b"])
    assert [kind for kind, _, _ in found] == ["RankDisagreement"] * 2
    assert "'a'" in found[0][1] and "'b'" in found[0][1]
