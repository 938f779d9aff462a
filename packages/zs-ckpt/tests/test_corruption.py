"""Bytes that are not those that were written: each is found, by the name of the file and of the tensor."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zs_ckpt

sys.path.insert(0, str(Path(__file__).parent))

from damage import (
    TAG,
    caught,
    copy,
    error_of,
    extents,
    flip,
    load_one,
    make_two_ranks,
    manifest_of,
    read_all,
    save_one,
    shards,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two_ranks(tmp_path_factory.mktemp("good"), 3)


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy(good, tmp_path / "broken")


def test_undamaged(good: Path) -> None:
    assert load_one(good) == 3
    assert len(read_all(good)) == 10  # eight tensors, and one of each rank's own
    assert len(shards(good)) == 2


# ---- single bits ----


def positions(good: Path) -> Iterator[tuple[str, int, str]]:
    """(file, position, tensor or "") in every region of every file."""
    draw = random.Random(0)
    for name, file, start, stop in extents(good):
        for position in sorted({start, stop - 1, draw.randrange(start, stop)}):
            yield f"{TAG}/{file}", position, name
    for path in shards(good):
        offset = manifest_of(good)["files"][path.name]["data_offset"]
        chosen = {*range(10), offset - 1, *(draw.randrange(offset) for _ in range(30))}
        yield from ((f"{TAG}/{path.name}", position, "") for position in sorted(chosen))
    size = (good / TAG / "manifest.json").stat().st_size
    chosen = {*range(120), *range(size - 30, size), *(draw.randrange(size) for _ in range(150))}
    yield from ((f"{TAG}/manifest.json", position, "") for position in sorted(chosen))


def test_every_flipped_bit_is_found(good: Path, broken: Path) -> None:
    draw, count = random.Random(1), 0
    for file, position, tensor in positions(good):
        bits = range(8) if draw.random() < 0.1 else [draw.randrange(8)]
        for bit in bits:
            flip(broken / file, position, bit)
            error = caught(broken)
            where = f"bit {bit} of byte {position} of {file}: {error}"
            assert isinstance(error, zs_ckpt.CheckpointCorrupt), where
            assert error.file == str(broken / file), where
            if tensor:
                assert error.tensor is not None and error.tensor.endswith(tensor), where
            flip(broken / file, position, bit)
            count += 1
    assert count > 1000
    assert len(read_all(broken)) == 10  # every bit is back


def test_every_flipped_bit_of_latest_is_found_or_harmless(broken: Path) -> None:
    """The tag has a checksum; where a flip makes the line one without, as written by hand, no tag has that name."""
    path, found = broken / "latest", 0
    for position in range(path.stat().st_size):
        for bit in range(8):
            flip(path, position, bit)
            error = error_of(lambda: load_one(broken))
            if error is not None:
                assert isinstance(error, zs_ckpt.CheckpointCorrupt | zs_ckpt.CheckpointIncomplete)
                assert error.file == str(path)
                found += 1
            flip(path, position, bit)
    assert found >= len(TAG) * 8


# ---- larger damage ----


def test_truncated_and_lengthened(good: Path, broken: Path) -> None:
    for file in [*(f"{TAG}/{path.name}" for path in shards(good)), f"{TAG}/manifest.json"]:
        size = (good / file).stat().st_size
        for length in sorted({0, 1, 7, 8, 100, size // 2, size - 4096, size - 1, size + 1, size + 4096} - {-1}):
            if length < 0:
                continue
            shutil.copy(good / file, broken / file)
            os.truncate(broken / file, length)
            error = caught(broken)
            assert isinstance(error, zs_ckpt.CheckpointCorrupt) and error.file == str(broken / file), (file, length)
        shutil.copy(good / file, broken / file)


def test_zeroed_blocks(good: Path, broken: Path) -> None:
    for path in shards(broken):
        size = path.stat().st_size
        for start in range(0, size, 65536):
            with open(path, "r+b") as file:
                file.seek(start)
                before = file.read(4096)
                file.seek(start)
                file.write(bytes(len(before)))
            assert caught(broken).file == str(path)
            with open(path, "r+b") as file:
                file.seek(start)
                file.write(before)
    assert len(read_all(broken)) == 10


def test_swapped_blocks(good: Path, broken: Path) -> None:
    """Within a tensor and between two: a checksum belongs to one place of one tensor."""
    whole = [found for found in extents(good) if found[3] - found[2] == 4096]
    draw = random.Random(2)
    for _ in range(40):
        a, b = draw.sample([found for found in whole if found[1] == whole[0][1]], 2)
        path = broken / TAG / a[1]
        content = path.read_bytes()
        swapped = bytearray(content)
        swapped[a[2] : a[3]], swapped[b[2] : b[3]] = content[b[2] : b[3]], content[a[2] : a[3]]
        path.write_bytes(swapped)
        error = caught(broken)
        assert error.tensor is not None and error.tensor.endswith((a[0], b[0]))
        path.write_bytes(content)


def test_swapped_shards(broken: Path) -> None:
    a, b = shards(broken)
    os.rename(a, broken / "aside")
    os.rename(b, a)
    os.rename(broken / "aside", b)
    assert caught(broken).file in (str(a), str(b))


def test_missing_shard(broken: Path) -> None:
    for path in shards(broken):
        os.rename(path, broken / "aside")
        error = caught(broken)
        assert isinstance(error, zs_ckpt.CheckpointIncomplete) and error.file == str(path)
        os.rename(broken / "aside", path)


def test_shard_of_another_step(broken: Path, tmp_path: Path) -> None:
    """The same tensors in the same places, of another save: whole, and block by block (a write that was lost)."""
    other = make_two_ranks(tmp_path / "other", 5)
    for mine, theirs in zip(shards(broken), shards(other), strict=True):
        content, stale = mine.read_bytes(), theirs.read_bytes()
        assert len(content) == len(stale)
        mine.write_bytes(stale)
        assert caught(broken).file == str(mine)
        for start in range(0, len(content), 40960):
            mine.write_bytes(content[:start] + stale[start : start + 4096] + content[start + 4096 :])
            assert caught(broken).file == str(mine), start
        mine.write_bytes(content)


def test_manifest_of_another_step(good: Path, broken: Path, tmp_path: Path) -> None:
    other = make_two_ranks(tmp_path / "other", 5)
    shutil.copy(other / TAG / "manifest.json", broken / TAG / "manifest.json")
    assert isinstance(caught(broken), zs_ckpt.CheckpointIncomplete)


def test_nothing_is_loaded_of_a_damaged_checkpoint_that_was_not_read(broken: Path) -> None:
    """A part that is whole can still be had."""
    name, file, start, _ = next(found for found in extents(broken) if "embed" in found[0])
    flip(broken / TAG / file, start, 0)
    assert caught(broken).tensor == name
    assert "model/counts" in zs_ckpt.read(broken, names="model/counts")


def test_an_older_tag_loads_by_name(tmp_path: Path) -> None:
    save_one(tmp_path, 3, "a")
    save_one(tmp_path, 5, "b")
    (newest,) = (tmp_path / "b").glob("*.safetensors")
    flip(newest, newest.stat().st_size - 1, 7)
    assert isinstance(caught(tmp_path), zs_ckpt.CheckpointCorrupt)
    assert load_one(tmp_path, "a") == 3
