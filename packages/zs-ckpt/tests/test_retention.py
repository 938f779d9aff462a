"""How many checkpoints stay, by validity; and what crashed saves left behind."""

import os

import pytest
import torch
from zs_ckpt import read, save, saving, tags
from zs_ckpt.lock import TagLock
from zs_ckpt.retention import collect_leftovers, prune
from zs_comm import ConfigError


def put(folder, number, **options):
    return save(folder, {"x": torch.full((100,), float(number))}, tag=f"step{number}", **options)


def newest(folder):
    return int(read(folder)["x"][0])


def test_the_newest_stay(tmp_path):
    for number in range(5):
        put(tmp_path, number, keep=2)
        assert tags(tmp_path) == [f"step{n}" for n in range(max(number - 1, 0), number + 1)]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step3", "step4"] and newest(tmp_path) == 4


def test_saving_again_makes_a_tag_the_newest(tmp_path):
    for number in (0, 1, 0, 2):
        put(tmp_path, number, keep=2)
    assert tags(tmp_path) == ["step0", "step2"]


@pytest.mark.parametrize("damage", ["manifest", "short", "missing", "folder"])
def test_torn_ones_do_not_count_and_push_nothing_out(damage, tmp_path):
    for number in range(3):
        put(tmp_path, number)
    torn = tmp_path / "step2"
    (data,) = torn.glob("*.safetensors")
    if damage == "manifest":
        raw = bytearray((torn / "manifest.json").read_bytes())
        raw[len(raw) // 2] ^= 1
        (torn / "manifest.json").write_bytes(raw)
    elif damage == "short":
        os.truncate(data, 100)
    else:
        data.unlink()
        if damage == "folder":
            data.mkdir()
    put(tmp_path, 3, keep=2)
    assert tags(tmp_path) == ["step1", "step2", "step3"]  # two that are good, and the torn one for a person to see


def test_what_crashed_saves_left_is_collected(tmp_path):
    put(tmp_path, 0)
    dead = tmp_path / "dead"
    dead.mkdir()
    for name in ("01234567-00000.safetensors.tmp-01234567", "01234567-00001.safetensors", "01234567-00001.index.json",
                 "manifest.json.tmp-01234567", "lock"):  # fmt: skip
        (dead / name).write_text("x")
    (tmp_path / "latest.tmp-01234567").write_text("x")
    (tmp_path / "step0" / "01234567-00000.error.json").write_text("x")
    put(tmp_path, 1)
    for name in ("01234567-00000.safetensors", "01234567-00001.index.json", "lock", "notes.txt"):
        (tmp_path / "step1" / name).write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "notes.txt").write_text("x")
    (tmp_path / "mixed" / "01234567-00001.safetensors").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    put(tmp_path, 0)
    assert sorted(os.listdir(tmp_path)) == ["latest", "mine", "mixed", "notes.txt", "step0", "step1"]
    assert len(os.listdir(tmp_path / "step1")) == 3 and (tmp_path / "step1" / "notes.txt").exists()
    assert len(os.listdir(tmp_path / "step0")) == 2 and len(os.listdir(tmp_path / "mixed")) == 2


def test_what_another_process_is_saving_stays(tmp_path):
    for number in range(3):
        put(tmp_path, number)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "01234567-00000.safetensors.tmp-01234567").write_text("x")
    locks = [TagLock(tmp_path / name, "01234567") for name in ("busy", "step0")]
    # the lock belongs to the open file, and so another one of this process finds it taken as well
    collect_leftovers(tmp_path)
    assert prune(tmp_path, 1) == ["step1"]
    assert tags(tmp_path) == ["step0", "step2"] and (tmp_path / "busy").exists()
    for lock in locks:
        lock.release()
    collect_leftovers(tmp_path)
    assert prune(tmp_path, 1) == ["step0"] and sorted(os.listdir(tmp_path)) == ["latest", "step2"]


def test_what_latest_names_stays(tmp_path):
    for number in range(4):
        put(tmp_path, number)
    (tmp_path / "latest").write_text("step0\n")
    assert prune(tmp_path, 1) == ["step2", "step1"]
    assert tags(tmp_path) == ["step0", "step3"] and newest(tmp_path) == 0


def test_files_of_others_stay(tmp_path):
    put(tmp_path, 0)
    (tmp_path / "step0" / "notes.txt").write_text("x")
    put(tmp_path, 1, keep=1)
    assert tags(tmp_path) == ["step1"] and os.listdir(tmp_path / "step0") == ["notes.txt"]


def test_space_is_made_before_a_save_that_needs_it(tmp_path, monkeypatch):
    """What a crashed save left goes first; what may be the only good copy stays until the commit."""
    put(tmp_path, 0)
    folder = tmp_path / "step0"
    (kept,) = folder.glob("*.safetensors")
    seen = []
    true = saving.write

    def looking(*args):
        seen.append(sorted(entry for entry in os.listdir(folder) if entry not in ("lock", "manifest.json", kept.name)))
        return true(*args)

    monkeypatch.setattr(saving, "write", looking)
    data, unfinished = "01234567-00000.safetensors", "01234567-00001.safetensors.tmp-01234567"
    for doubt in (None, "01234567-00000.error.json"):
        for name in filter(None, (data, unfinished, doubt)):
            (folder / name).write_text("x")
        put(tmp_path, 0)
        (kept,) = folder.glob("*.safetensors")
        assert len(os.listdir(folder)) == 2
    raw = bytearray((folder / "manifest.json").read_bytes())
    raw[50] ^= 1
    (folder / "manifest.json").write_bytes(raw)
    (folder / data).write_text("x")
    put(tmp_path, 0)
    assert seen == [[], [data], [data]] and newest(tmp_path) == 0


def test_a_tag_that_is_a_link(tmp_path):
    put(tmp_path, 0)
    (tmp_path / "step1").symlink_to(tmp_path / "step0")
    with pytest.raises(ConfigError, match="link"):
        put(tmp_path, 1)
    assert tags(tmp_path) == ["step0"]
