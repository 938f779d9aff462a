"""Tags, tensors' names and files' names that come from outside."""

import os

import pytest
from zs_ckpt import CheckpointCorrupt, CheckpointIncomplete
from zs_ckpt.names import check_case, check_key, check_name, check_tag, is_data_file, is_ours, open_file
from zs_comm import ConfigError


@pytest.mark.parametrize("tag", ["global_step10", "a", "v1.0-rc+2", "x" * 200, "étape", "step=3,loss=0.1"])
def test_tags(tag):
    assert check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag",
    [
        "", ".", "..", "../x", "a/b", "a\\b", "/abs", "a\0b", "a b", "a\n", ".hidden", "dot.", "x" * 201, "é" * 101,
        "latest", "LATEST", "lock", "x.tmp-0123abcd", "c:", "a*", "\ud800", 3, None, b"tag",
    ],
)  # fmt: skip
def test_what_is_no_tag(tag):
    with pytest.raises(ConfigError):
        check_tag(tag)


def test_tags_that_differ_by_case_only(tmp_path):
    (tmp_path / "Step1").mkdir()
    check_case(tmp_path, "Step1")
    check_case(tmp_path, "step2")
    check_case(tmp_path / "none", "step1")
    with pytest.raises(ConfigError, match="case"):
        check_case(tmp_path, "step1")


@pytest.mark.parametrize("name", ["model/layers.0.weight", "x", "a@0:1", "exp_avg/a b", "..a", "a..b/c", "x" * 1024])
def test_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "/abs", "\\abs", "a/../b", "..", "a/.", "a\0", "a\nb", "x" * 1025, "\udc80", "__metadata__", "a\\..\\b"],
)
def test_what_is_no_name(name):
    with pytest.raises(ConfigError):
        check_name(name)


@pytest.mark.parametrize("key", [3, "a/b", "", "rank0", "rank17", ".."])
def test_what_is_no_key(key):
    with pytest.raises(ConfigError):
        check_key(key)


def test_names_of_files():
    assert is_data_file("0123abcd-00000.safetensors") and is_data_file("0123abcd-1234567.safetensors")
    for name in ("../0123abcd-00000.safetensors", "0123ABCD-00000.safetensors", "manifest.json", "0123abcd-0.pt", ""):
        assert not is_data_file(name)
    assert is_ours("0123abcd-00001.index.json") and is_ours("manifest.json.tmp-0123abcd")
    assert not is_ours("manifest.json") and not is_ours("notes.txt") and not is_ours("lock")


def test_only_files_are_opened_and_not_through_links(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    fd = open_file(file)
    assert os.read(fd, 9) == b"abc"
    os.close(fd)
    with pytest.raises(CheckpointIncomplete) as missing:
        open_file(tmp_path / "none")
    assert missing.value.file == str(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointCorrupt, match="not a file"):
        open_file(tmp_path / "folder")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "pipe"):
        with pytest.raises(CheckpointCorrupt) as caught:
            open_file(tmp_path / name)
        assert caught.value.file == str(tmp_path / name)
