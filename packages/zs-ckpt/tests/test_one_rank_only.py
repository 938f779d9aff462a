"""Ranks that do not make the same call: a typed error on all of them, within the bound of the group."""

import time

import pytest
import torch
from toys import Sharded
from zs_ckpt import load, save, tags
from zs_ckpt import ranks as module
from zs_ckpt.lock import TagLock
from zs_comm import all_reduce, barrier
from zs_comm.testing import run_ranks

TENSORS = {"x": ((64, 64), torch.float32)}


def one_only(group, folder, call, caller, then):
    began = time.monotonic()
    toy = Sharded(group.rank, group.size, TENSORS)
    try:
        if group.rank == caller:
            (save if call == "save" else load)(folder, {"m": toy}, group=group)
        elif then == "train":
            all_reduce(torch.ones(4), group)
        elif then == "barrier":
            barrier(group)
        else:
            return "ended", 0.0  # the program goes on without another collective, and ends
    except Exception as error:
        return type(error).__name__, time.monotonic() - began
    return "fine", time.monotonic() - began


@pytest.mark.parametrize(
    ("call", "caller", "then"),
    [("save", 0, "train"), ("save", 1, "barrier"), ("save", 0, "end"), ("save", 1, "end"), ("load", 1, "train"),
     ("load", 0, "end")],
)  # fmt: skip
def test_a_call_on_one_rank_only(call, caller, then, tmp_path):
    save(tmp_path, {"m": Sharded(0, 1, TENSORS)}, tag="before")
    found = run_ranks(one_only, 2, str(tmp_path), call, caller, then, comm_timeout_s=1.0, timeout_s=50)
    assert found[caller][0] in ("CommTimeout", "PeerLost")
    if then != "end":
        assert found[1 - caller][0] in ("CommTimeout", "PeerLost", "RankDisagreement")
    assert max(seconds for _, seconds in found) < 30
    assert tags(tmp_path) == ["before"]


def test_the_bound_is_below_thirty_seconds_whatever_the_groups_is():
    assert module.MOST_WAIT_S < 30


def differing(group, folder, what):
    toy = Sharded(group.rank, group.size, TENSORS)
    mine = {"tag": "t0"}
    state = {"m": toy}
    if group.rank == 1:
        if what == "tag":
            mine["tag"] = "t1"
        elif what == "keys":
            state = {"n": toy}
        elif what == "path":
            folder = f"{folder}/other"
        elif what == "asynchronous":
            mine["asynchronous"] = True
    try:
        save(folder, state, group=group, **mine)
    except Exception as error:
        return type(error).__name__, str(error)
    return "saved", ""


@pytest.mark.parametrize("what", ["tag", "keys", "path", "asynchronous"])
def test_ranks_that_come_with_different_arguments(what, tmp_path):
    found = run_ranks(differing, 3, str(tmp_path), what)
    assert [name for name, _ in found] == ["RankDisagreement"] * 3
    assert all("rank 0" in text and "rank 1" in text for _, text in found)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "other"])


def busy(group, folder):
    try:
        save(folder, {"m": Sharded(group.rank, group.size, TENSORS)}, group=group)
    except Exception as error:
        return type(error).__name__, str(error)
    return "saved", ""


def test_another_process_on_the_same_tag_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    lock = TagLock(tmp_path / "checkpoint", "01234567")
    found = run_ranks(busy, 3, str(tmp_path))
    assert [name for name, _ in found] == ["CheckpointBusy", "RankDisagreement", "RankDisagreement"]
    assert all("another process is saving" in text for _, text in found)
    lock.release()
    assert [name for name, _ in run_ranks(busy, 3, str(tmp_path))] == ["saved"] * 3


def tags_of_a_load(group, folder):
    try:
        load(folder, {"m": Sharded(group.rank, group.size, TENSORS)}, group=group, tag=f"t{group.rank}")
    except Exception as error:
        return type(error).__name__
    return "loaded"


def test_tags_of_a_load_that_differ(tmp_path):
    for tag in ("t0", "t1"):
        save(tmp_path, {"m": Sharded(0, 1, TENSORS)}, tag=tag)
    assert run_ranks(tags_of_a_load, 2, str(tmp_path)) == ["RankDisagreement"] * 2
    (tmp_path / "t1" / "manifest.json").unlink()
    assert run_ranks(tags_of_a_load, 2, str(tmp_path)) == ["RankDisagreement", "CheckpointIncomplete"]
