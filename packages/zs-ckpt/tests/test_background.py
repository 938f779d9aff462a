"""Saving beside the training: one copy, one save at a time, and no failure that is lost."""

import errno
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from toys import Sharded
from zs_ckpt import Checkpointer, Pending, load, read, save, tags
from zs_ckpt import saving as module
from zs_comm.testing import run_ranks


def state(number):
    return {"x": torch.full((5000,), float(number)), "n": {"number": number}}


class Gate:
    """Holds the background back until it is opened."""

    def __init__(self, monkeypatch):
        self.event, true = threading.Event(), module.write

        def write(*args):
            assert self.event.wait(30)
            return true(*args)

        monkeypatch.setattr(module, "write", write)


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path, monkeypatch):
    gate, tensors = Gate(monkeypatch), state(1)
    checkpointer = Checkpointer(tmp_path)
    pending = checkpointer.save(tensors, asynchronous=True)
    assert isinstance(pending, Pending) and not pending.done and tags(tmp_path) == []
    tensors["x"].fill_(9)
    tensors["n"]["number"] = 9
    with pytest.raises(TimeoutError):
        pending.wait(0.01)
    gate.event.set()
    assert pending.wait().tag == "checkpoint" and pending.done and pending.error is None
    assert read(tmp_path)["x"][0] == 1
    target = state(0)
    load(tmp_path, target)
    assert target["n"]["number"] == 1
    checkpointer.close()


def test_host_memory_is_used_again(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state(1), asynchronous=True)
    checkpointer.wait()
    memory, nbytes = checkpointer._buffer._memory.data_ptr(), checkpointer.host_nbytes
    assert 20_000 <= nbytes < 20_200
    for number in (2, 3):
        checkpointer.save(state(number), asynchronous=True)
        assert checkpointer._buffer._memory.data_ptr() == memory and checkpointer.host_nbytes == nbytes
    assert checkpointer.wait().tag == "checkpoint" and read(tmp_path)["x"][0] == 3
    assert checkpointer.wait() is None
    checkpointer.close()
    assert checkpointer.host_nbytes == 0


def test_there_is_one_in_flight(tmp_path, monkeypatch):
    """The next save waits for the last; they come in their order."""
    gate, checkpointer = Gate(monkeypatch), Checkpointer(tmp_path)
    first = checkpointer.save(state(1), tag="one", asynchronous=True)
    threading.Timer(0.05, gate.event.set).start()
    second = checkpointer.save(state(2), tag="two", asynchronous=True)
    assert first.done
    second.wait()
    checkpointer.save(state(3), tag="three")
    assert tags(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("then", ["save", "asynchronous", "wait", "close"])
def test_a_failure_is_raised_by_the_next_call(then, tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path, io="threads")
    checkpointer.save(state(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "lost")))
        with caplog.at_level(logging.ERROR, "zs_ckpt"):
            pending = checkpointer.save(state(2), asynchronous=True)
            while not pending.done:
                threading.Event().wait(0.001)
    assert "lost" in caplog.text  # at once, where somebody looks
    with pytest.raises(OSError, match="lost"):
        if then == "wait":
            checkpointer.wait()
        elif then == "close":
            checkpointer.close()
        else:
            checkpointer.save(state(3), asynchronous=then == "asynchronous")
    with pytest.raises(OSError, match="lost"):
        pending.wait()
    assert read(tmp_path)["x"][0] == 1
    checkpointer.save(state(4))  # it was said once
    assert read(tmp_path)["x"][0] == 4
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_without_a_checkpointer(tmp_path):
    pending = save(tmp_path, state(1), asynchronous=True)
    assert pending.wait().path == tmp_path / "checkpoint" and read(tmp_path)["x"][0] == 1


def ranks_in_the_background(group, folder):
    checkpointer = Checkpointer(folder, group=group, keep=2)
    tensors = {"x": ((300, 70), torch.float32), "y": ((64,), torch.bfloat16)}
    for seed in range(4):
        toy = Sharded(group.rank, group.size, tensors, {"x": "flat", "y": "copy"}, own=3, seed=seed)
        checkpointer.save({"m": toy}, tag=f"t{seed}", asynchronous=seed != 2)
    checkpointer.close()
    for seed in (2, 3):
        toy = Sharded(group.rank, group.size, tensors, "rows", own=3, seed=seed)
        load(folder, {"m": toy}, tag=f"t{seed}", group=group)
        toy.check()
    return tags(folder)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks(world, tmp_path):
    assert run_ranks(ranks_in_the_background, world, str(tmp_path)) == [["t2", "t3"]] * world


def fails_on_one(group, folder):
    checkpointer = Checkpointer(folder, group=group, io="threads", stall_s=20)
    tensors = {"x": ((300, 70), torch.float32)}
    true = os.fdatasync
    if group.rank == 1:
        os.fdatasync = lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "lost"))
    checkpointer.save({"m": Sharded(group.rank, group.size, tensors)}, asynchronous=True)
    found = []
    try:
        checkpointer.save({"m": Sharded(group.rank, group.size, tensors)}, asynchronous=True)
    except Exception as error:
        found.append((type(error).__name__, str(error)))
    os.fdatasync = true
    checkpointer.save({"m": Sharded(group.rank, group.size, tensors)})
    return found


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path):
    found = run_ranks(fails_on_one, 3, str(tmp_path), timeout_s=50)
    assert [one[0][0] for one in found] == ["RankDisagreement", "OSError", "RankDisagreement"]
    assert all("lost" in one[0][1] for one in found) and tags(tmp_path) == ["checkpoint"]
    assert len(list((tmp_path / "checkpoint").iterdir())) == 4


def test_a_program_that_ends_finishes_its_save(tmp_path):
    """The interpreter waits for the thread, and what the thread needs still works by then."""
    code = f"""
import torch, zs_ckpt
zs_ckpt.save({str(tmp_path)!r}, {{"x": torch.arange(10 << 20)}}, asynchronous=True, io="threads")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert torch.equal(read(tmp_path)["x"], torch.arange(10 << 20))


def test_the_background_rests_until_somebody_waits(tmp_path, monkeypatch):
    """Three times as long as it worked; what it is told of the work is what the parts took."""
    rests = []

    def rest(self, seconds):
        rests.append((seconds, self._hurry.is_set()))

    monkeypatch.setattr("zs_ckpt.background.Pending._rest", rest)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state(1), asynchronous=True)
        checkpointer.wait()
        checkpointer.save(state(2))
    assert len(rests) == 1, "the one tensor, and none of the save that is waited for"
    assert 0 <= rests[0][0] < 10


def test_who_waits_ends_the_rest():
    resting = threading.Event()

    def work(rest):
        resting.set()
        rest(1000.0)
        return "saved"

    pending = Pending(work, "x")
    resting.wait(10)
    assert not pending.done
    assert pending.wait(10) == "saved"
