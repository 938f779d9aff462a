"""The order of the commit's steps, what a reader sees between them, and what an error leaves behind."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from toys import Sharded
from zs_ckpt import (
    CheckpointBusy,
    CheckpointCorrupt,
    Checkpointer,
    CheckpointIncomplete,
    Snapshot,
    load,
    read,
    save,
    tags,
    verify,
)
from zs_ckpt import commit as commits
from zs_ckpt.lock import TagLock
from zs_comm.testing import run_ranks

CALLS = ("open", "replace", "unlink", "fsync", "fdatasync", "mkdir", "rename", "ftruncate", "pwritev", "write", "rmdir")


def state(number):
    return {"x": torch.full((5000,), float(number)), "n": {"number": number}}


def loaded(folder, tag=None):
    target = {"x": torch.zeros(5000), "n": {"number": 0}}
    load(folder, target, tag=tag)
    number = target["n"]["number"]
    assert torch.equal(target["x"], torch.full((5000,), float(number)))
    return number


class Spy:
    """Logs the calls of `os` that change something, and stops at the n-th."""

    def __init__(self, monkeypatch, stop=None, error=None):
        self.log, self.stop, self.error = [], stop, error
        self.lock = threading.Lock()
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name, call):
        def wrapped(*args, **kwargs):
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return call(*args, **kwargs)
            with self.lock:
                number = len(self.log)
                self.log.append((name, self._what(args[0])))
            if number == self.stop and self.error is not None:
                raise self.error
            return call(*args, **kwargs)

        return wrapped

    @staticmethod
    def _what(what):
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        return Path(path).name


def test_the_order(tmp_path, monkeypatch):
    """Data durable, then its name; then the manifest; then `latest`; a folder is synced after what changed in it."""
    save(tmp_path, state(1), io="threads")
    spy = Spy(monkeypatch)
    saved = save(tmp_path, state(2), io="threads")
    log = [(name, what) for name, what in spy.log if what != "lock" and name not in ("open", "pwritev", "write")]
    monkeypatch.undo()
    data = f"{saved.save_id}-00000.safetensors"
    end = f".tmp-{saved.save_id}"
    assert log[:9] == [
        ("fdatasync", data + end),
        ("replace", data + end),
        ("fsync", "checkpoint"),
        ("fsync", f"manifest.json{end}"),
        ("replace", f"manifest.json{end}"),
        ("fsync", "checkpoint"),
        ("fsync", f"latest{end}"),
        ("replace", f"latest{end}"),
        ("fsync", tmp_path.name),
    ]
    assert all(name == "unlink" for name, _ in log[9:]) and len(log) == 10  # the data of the save before
    assert loaded(tmp_path) == 2


@pytest.mark.parametrize("tag", ["checkpoint", "other"])
def test_an_error_at_any_call_leaves_the_old_or_the_new(tag, tmp_path, monkeypatch):
    """A full disk, a lost write, no permission: wherever it comes, the folder is as it was or has the new one."""
    save(tmp_path / "0", state(1), io="threads")
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        save(tmp_path / "0", state(2), tag=tag, io="threads")
        calls = len(spy.log)
    assert calls > 15
    for stop in range(calls + 1):
        folder = tmp_path / f"s{stop}"
        save(folder, state(1), io="threads")
        before = {path: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
        failed = None
        with monkeypatch.context() as patch:
            spy = Spy(patch, stop, OSError(errno.ENOSPC, "no space"))
            try:
                save(folder, state(2), tag=tag, io="threads")
            except OSError as error:
                failed = error
        if failed is None:
            assert loaded(folder) == 2
        else:
            # an error after the manifest is in place cannot take the new checkpoint back
            assert failed.errno == errno.ENOSPC and loaded(folder) in (1, 2)
            if loaded(folder) == 1:
                assert {path: path.read_bytes() for path in before} == before
        assert all(verify(folder, one).ok for one in tags(folder))
        assert save(folder, state(3), tag=tag, io="threads") and loaded(folder) == 3
        assert leftovers(folder) == []


def leftovers(folder):
    """Files that no manifest names."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("manifest.json", "latest"):
            manifest = path.parent / "manifest.json"
            named = json.loads(manifest.read_bytes())["files"] if manifest.exists() else {}
            found += [] if path.name in named else [path.name]
    return found


def test_an_error_of_fsync_is_final(tmp_path, monkeypatch):
    """It is not tried again, and the file is gone: what the kernel says of it from then on means nothing."""
    save(tmp_path, state(1))
    synced = []

    def fails(fd):
        synced.append(fd)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(OSError, match="lost"):
        save(tmp_path, state(2), io="threads")
    monkeypatch.undo()
    assert len(synced) == 1 and leftovers(tmp_path) == [] and loaded(tmp_path) == 1


def test_the_same_tag_keeps_the_files_until_the_new_manifest(tmp_path, monkeypatch):
    save(tmp_path, state(1))
    seen = []
    publish = commits.publish

    def looking(path, raw, save_id):
        if path.name == "manifest.json":
            seen.append((loaded(tmp_path), len(list(path.parent.glob("*.safetensors")))))
        publish(path, raw, save_id)
        if path.name == "manifest.json":
            seen.append((loaded(tmp_path), len(list(path.parent.glob("*.safetensors")))))

    monkeypatch.setattr(commits, "publish", looking)
    save(tmp_path, state(2))
    assert seen == [(1, 2), (2, 2)]
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_a_reader_beside_a_writer_sees_one_or_the_other(tmp_path):
    save(tmp_path, state(0))
    stop, wrong, count = threading.Event(), [], [0]

    def reading():
        while not stop.is_set():
            try:
                loaded(tmp_path)
                count[0] += 1
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=reading) for _ in range(2)]
    for thread in threads:
        thread.start()
    number = 0
    while number < 20 or (count[0] < 20 and number < 500):
        number += 1
        save(tmp_path, state(number), io="threads")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and loaded(tmp_path) == number


def test_a_load_whose_files_vanish_takes_the_newer_save(tmp_path, monkeypatch):
    """Between reading the manifest and opening the files a newer save takes their place."""
    save(tmp_path, state(1))
    true, turns = Snapshot.open, []

    def late(self, files):
        if not turns:
            turns.append(1)
            save(tmp_path, state(2))
        return true(self, files)

    monkeypatch.setattr(Snapshot, "open", late)
    assert loaded(tmp_path) == 2
    turns.clear()
    assert read(tmp_path)["x"][0] == 2


def test_open_files_cannot_vanish(tmp_path):
    save(tmp_path, state(1))
    with Snapshot(tmp_path) as snapshot:
        snapshot.open(snapshot.manifest.files)
        save(tmp_path, state(2))
        assert snapshot.read("x")[0] == 1
    assert loaded(tmp_path) == 2


def test_what_is_not_committed(tmp_path):
    for path, tag in ((tmp_path, None), (tmp_path, "one"), (tmp_path / "none", None), (tmp_path / "none", "one")):
        with pytest.raises(CheckpointIncomplete) as caught:
            load(path, {"x": torch.zeros(1)}, tag=tag)
        assert str(path) in caught.value.file
    save(tmp_path, state(1), tag="one")
    (tmp_path / "one" / "manifest.json").unlink()
    with pytest.raises(CheckpointIncomplete):
        loaded(tmp_path)
    with pytest.raises(FileNotFoundError):
        verify(tmp_path, "one")


def test_links_are_refused(tmp_path):
    """A shard, a manifest or `latest` that is a link."""
    save(tmp_path / "a", state(1))
    for file in (
        "latest",
        "checkpoint/manifest.json",
        f"checkpoint/{next((tmp_path / 'a').rglob('*.safetensors')).name}",
    ):
        path, away = tmp_path / "a" / file, tmp_path / "away"
        path.rename(away)
        path.symlink_to(away)
        with pytest.raises(CheckpointCorrupt, match="link") as caught:
            loaded(tmp_path / "a")
        assert caught.value.file == str(path)
        path.unlink()
        away.rename(path)
    assert loaded(tmp_path / "a") == 1


def test_links_in_the_way_of_a_save_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "latest").symlink_to(victim)
    (tmp_path / "c" / "checkpoint").mkdir()
    (tmp_path / "c" / "checkpoint" / "manifest.json").symlink_to(victim)
    save(tmp_path / "c", state(1))
    assert victim.read_text() == "precious" and loaded(tmp_path / "c") == 1
    (tmp_path / "c" / "checkpoint" / "lock").symlink_to(victim)
    with pytest.raises(OSError):
        save(tmp_path / "c", state(2))
    assert victim.read_text() == "precious"


def test_hard_linked_copies_are_not_changed(tmp_path):
    save(tmp_path, state(1), tag="t")
    for path in (tmp_path / "t").iterdir():
        os.link(path, tmp_path / f"copy {path.name}")
    copies = {path: path.read_bytes() for path in tmp_path.glob("copy *")}
    save(tmp_path, state(2), tag="t")
    assert {path: path.read_bytes() for path in copies} == copies and loaded(tmp_path) == 2


def test_another_process_on_the_same_tag(tmp_path):
    """The lock is the kernel's: it goes with the process, however that ends."""
    (tmp_path / "checkpoint").mkdir()
    ready, gone = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        TagLock(tmp_path / "checkpoint", "89abcdef")
        os.write(ready[1], b"x")
        os.read(gone[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(CheckpointBusy, match=f"process {child} on .*89abcdef") as caught:
        save(tmp_path, state(1))
    assert caught.value.file == str(tmp_path / "checkpoint" / "lock")
    save(tmp_path, state(1), tag="other")
    os.write(gone[1], b"x")
    os.waitpid(child, 0)
    save(tmp_path, state(2))
    assert loaded(tmp_path) == 2 and not (tmp_path / "checkpoint" / "lock").exists()


def test_a_lock_that_was_taken_away_meanwhile_is_tried_again(tmp_path, monkeypatch):
    from zs_ckpt import lock as module

    true, turns = module._lock, []

    def late(fd):
        if not turns:
            turns.append(1)
            os.unlink(tmp_path / "lock")
        return true(fd)

    monkeypatch.setattr(module, "_lock", late)
    first = TagLock(tmp_path, "89abcdef")
    with pytest.raises(CheckpointBusy):
        TagLock(tmp_path, "01234567")
    first.release()
    first.release()
    TagLock(tmp_path, "01234567").release()


def one_fails(group, folder, how):
    """Rank 1 cannot write: every rank has an error, and what was there stays."""
    toy = Sharded(group.rank, group.size, {"x": ((64, 64), torch.float32)}, "rows", seed=how == "fine")
    if group.rank == 1 and how == "pieces":
        toy.pieces = lambda: iter([None])
    if group.rank == 1 and how == "write":
        os.fdatasync = lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "lost"))
    if group.rank == 1 and how == "commit":
        toy.tensors = {"x": ((64, 65), torch.float32)}
    try:
        save(folder, {"m": toy}, group=group, io="threads")
        return "saved"
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("how", "mine", "others"),
    [("pieces", "AttributeError", "RankDisagreement"), ("write", "OSError", "RankDisagreement"),
     ("commit", "RankDisagreement", "ConfigError")],
)  # fmt: skip
def test_an_error_on_one_rank_is_one_on_all(how, mine, others, tmp_path):
    assert run_ranks(one_fails, 3, str(tmp_path), "fine") == ["saved"] * 3
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = run_ranks(one_fails, 3, str(tmp_path), how, timeout_s=50)
    assert found[1][0] == mine
    assert found[0][0] == others and found[2][0] == "RankDisagreement"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def stalls(group, folder):
    toy = Sharded(group.rank, group.size, {"x": ((64, 64), torch.float32)})
    if group.rank == 1:
        commits.Commit.say_done = lambda self, index: time.sleep(3)
    with pytest.raises((CheckpointIncomplete, Exception)) as caught:
        Checkpointer(folder, group=group, stall_s=0.5).save({"m": toy})
    return type(caught.value).__name__


def test_a_rank_that_gives_no_sign_of_life(tmp_path):
    found = run_ranks(stalls, 2, str(tmp_path), comm_timeout_s=10.0, timeout_s=50)
    assert found == ["CheckpointIncomplete", "RankDisagreement"]
    assert tags(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    if os.getuid() == 0:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError):
            save(tmp_path / "file", state(1))
        with pytest.raises(OSError):
            save("/proc/zs", state(1))
        return
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        save(tmp_path, state(1))
