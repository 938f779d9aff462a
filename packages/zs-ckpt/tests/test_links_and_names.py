"""Links and names that lead out of the folder: not followed, not written through, refused."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
import zs_ckpt
from zs_comm import ConfigError, ZsError

sys.path.insert(0, str(Path(__file__).parent))

from damage import TAG, error_of, folder_with_step_2, intact, load_one, refused, save_long, save_one

folder = pytest.fixture(folder_with_step_2)


# ---- links ----


@pytest.mark.parametrize("name", ["latest", f"{TAG}/manifest.json", f"{TAG}/lock"])
@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_written_through_a_link(folder: Path, tmp_path: Path, name: str, dangling: bool) -> None:
    outside = tmp_path / "outside"
    if not dangling:
        outside.write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    error = error_of(lambda: save_one(folder, 4))
    if error is not None:
        assert os.path.basename(name) in str(error)
        assert (folder / name).is_symlink()
        (folder / name).unlink()
        save_one(folder, 4)
    assert load_one(folder) == 4
    assert (outside.read_text() == "mine") if not dangling else not outside.exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_tag_that_is_a_link_is_refused(folder: Path, tmp_path: Path, dangling: bool) -> None:
    outside = tmp_path / "outside"
    if not dangling:
        outside.mkdir()
        (outside / "mine").write_text("mine")
    (folder / "elsewhere").symlink_to(outside)
    assert "elsewhere" in str(refused(lambda: save_one(folder, 4, "elsewhere")))
    assert [path.name for path in outside.iterdir()] == ["mine"] if not dangling else not outside.exists()
    assert load_one(folder) == 2


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    """Its name is the caller's, not the checkpoint's."""
    (tmp_path / "link").symlink_to(folder)
    save_one(tmp_path / "link", 4)
    assert load_one(folder) == load_one(tmp_path / "link") == 4


def test_links_that_come_and_go_during_a_save(folder: Path, tmp_path: Path) -> None:
    """Names of the checkpoint become links to a file of ours, again and again, while it is saved."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    names = [folder / "latest", folder / TAG / "manifest.json", folder / TAG / "lock"]
    stop = threading.Event()

    def swap() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            aside = tmp_path / "aside"
            aside.symlink_to(outside)
            os.replace(aside, names[turn % len(names)])

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for step in range(4, 44, 2):
            try:
                save_one(folder, step)
            except (OSError, ZsError):
                continue
    finally:
        stop.set()
        swapper.join()
    assert outside.read_text() == "mine"
    for name in names:
        if name.is_symlink():
            name.unlink()
    save_one(folder, 100)
    assert load_one(folder) == 100


def test_a_hard_linked_copy_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    """`cp -al`: a backup that shares the files must not change when the tag is saved again."""
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup, copy_function=os.link)
    before = {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    for step in (4, 6):
        save_long(folder, step)
    assert {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()} == before
    assert load_one(backup) == 2
    assert load_one(folder) == 6


# ---- names ----

TAGS = [
    "../x",
    "..",
    ".",
    "",
    "/abs",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 300,
    "latest",
    "lock",
    ".hidden",
    " ",
    "\ud800",
]


@pytest.mark.parametrize("tag", TAGS, ids=ascii)
def test_tags_that_are_no_names(folder: Path, tmp_path: Path, tag: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError):
        save_one(folder, 4, tag)
    with pytest.raises(ConfigError):
        load_one(folder, tag)
    assert sorted(tmp_path.rglob("*")) == before


def test_tags_that_differ_by_case(folder: Path) -> None:
    with pytest.raises(ConfigError, match="case"):
        save_one(folder, 4, TAG.upper())
    assert load_one(folder) == 2


NAMES = ["../x", "a/../b", "a\0b", "x" * 3000, "..", "\ud800"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_tensors_that_have_no_names(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        zs_ckpt.save(folder, {"model": {name: torch.ones(3)}}, tag=TAG)
    with pytest.raises(ConfigError):
        zs_ckpt.save(folder, {name: torch.ones(3)}, tag=TAG)
    intact(folder)


def test_a_latest_that_climbs_is_refused(folder: Path, tmp_path: Path) -> None:
    save_one(tmp_path / "secret", 8)
    for text in ("../secret/checkpoint", "/etc", "..", "a\0b", "x" * 5000, "", "\n", " "):
        (folder / "latest").write_text(text)
        error = error_of(lambda: load_one(folder))
        assert isinstance(error, zs_ckpt.CheckpointCorrupt | zs_ckpt.CheckpointIncomplete), text
        assert "latest" in str(error.file)
