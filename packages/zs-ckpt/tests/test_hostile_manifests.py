"""Manifests written to do harm, with checksums that are right: refused before anything is done on their word."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_ckpt

sys.path.insert(0, str(Path(__file__).parent))

from damage import TAG, caught, copy, error_of, make_two_ranks, manifest_of, read_all, rewrite, shards, write_manifest
from rigs import in_child, limit_memory

Members = dict[str, Any]
EMBED = "model/embed"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two_ranks(tmp_path_factory.mktemp("good"), 3)


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    return copy(good, tmp_path / "broken")


def embed(members: Members) -> Members:
    return members["tensors"][EMBED]


def piece(members: Members, index: int = 0) -> Members:
    return embed(members)["pieces"][index]


def entry(members: Members) -> Members:
    return next(iter(members["files"].values()))


def put(found: Members, **values: Any) -> None:
    found |= values


def renamed(members: Members, group: str, old: str, new: str) -> None:
    members[group] = {new if name == old else name: value for name, value in members[group].items()}


def file_renamed(members: Members, new: str) -> None:
    old = next(iter(members["files"]))
    renamed(members, "files", old, new)
    for group in (members["tensors"], *members["rank_tensors"]):
        for tensor in group.values():
            for one in tensor["pieces"]:
                if one["file"] == old:
                    one["file"] = new


def moved(members: Members, by: int) -> None:
    """A piece's box, by rows."""
    piece(members)["box"][0] = [place + by for place in piece(members)["box"][0]]


HUGE = 1 << 62
CASES: dict[str, Callable[[Members], object]] = {
    # boxes
    "overlapping boxes": lambda m: put(piece(m, 1), box=piece(m, 0)["box"]),
    "the same piece twice": lambda m: embed(m)["pieces"].append(piece(m)),
    "a hole": lambda m: embed(m)["pieces"].pop(),
    "no piece": lambda m: put(embed(m), pieces=[]),
    "out of range": lambda m: moved(m, 1 << 20),
    "before the beginning": lambda m: moved(m, -1),
    "shifted by a row": lambda m: moved(m, 1),
    "a box of another shape": lambda m: put(piece(m), box=[[0, 1]]),
    "a box of no numbers": lambda m: put(piece(m), box=[["0", "1"], [None, {}]]),
    "a box upside down": lambda m: put(piece(m), box=[[5, 2], [0, 512]]),
    "a box of fractions": lambda m: put(piece(m), box=[[0.0, 1.5], [0, 512]]),
    "a huge box": lambda m: put(piece(m), box=[[0, HUGE], [0, HUGE]]),
    "a huge shape": lambda m: put(embed(m), shape=[HUGE, HUGE]),
    "a huge shape and box": lambda m: (
        put(embed(m), shape=[HUGE, 512], pieces=[piece(m)]),
        put(piece(m), box=[[0, HUGE], [0, 512]], nbytes=HUGE * 2048, crc=""),
    ),
    "a shape beyond 64 bits": lambda m: put(embed(m), shape=[10**30, 0]),
    "a negative shape": lambda m: put(embed(m), shape=[-256, -512]),
    "a hundred dims": lambda m: put(embed(m), shape=[1] * 100),
    "a shape of truth": lambda m: put(embed(m), shape=[True, False]),
    # places in files
    "an offset past the end": lambda m: put(piece(m), offset=1 << 40),
    "a negative offset": lambda m: put(piece(m), offset=-64),
    "an offset into another piece": lambda m: put(piece(m), offset=piece(m)["offset"] + 64),
    "more bytes than the box has": lambda m: put(piece(m), nbytes=piece(m)["nbytes"] + 4096),
    "huge bytes": lambda m: put(piece(m), nbytes=1 << 63),
    "another dtype": lambda m: put(embed(m), dtype="float64"),
    "no such dtype": lambda m: put(embed(m), dtype="os.system"),
    "a dtype that is a list": lambda m: put(embed(m), dtype=["float32"]),
    "extents of nothing": lambda m: put(piece(m), extent_nbytes=0),
    "huge extents": lambda m: put(piece(m), extent_nbytes=1 << 40),
    "too few checksums": lambda m: put(piece(m), crc=piece(m)["crc"][:-8]),
    "too many checksums": lambda m: put(piece(m), crc=piece(m)["crc"] * 2),
    "checksums that are none": lambda m: put(piece(m), crc="x" * len(piece(m)["crc"])),
    "a file that is not listed": lambda m: put(piece(m), file="00000000-00000.safetensors"),
    "a larger file": lambda m: put(entry(m), nbytes=entry(m)["nbytes"] + 1),
    "data before the file": lambda m: put(entry(m), data_offset=-8),
    "data behind the file": lambda m: put(entry(m), data_offset=entry(m)["nbytes"] + 1),
    "another header": lambda m: put(entry(m), header_crc="00000000"),
    # names
    "a tensor's name that climbs": lambda m: renamed(m, "tensors", EMBED, "model/../../embed"),
    "an absolute name": lambda m: renamed(m, "tensors", EMBED, "/embed"),
    "a name with a zero": lambda m: renamed(m, "tensors", EMBED, "em\0bed"),
    "no name": lambda m: renamed(m, "tensors", EMBED, ""),
    "a name of a dot": lambda m: renamed(m, "tensors", EMBED, "."),
    "an endless name": lambda m: renamed(m, "tensors", EMBED, "x" * 5000),
    "half a character": lambda m: renamed(m, "tensors", EMBED, "\ud800"),
    "a file above": lambda m: file_renamed(m, "../x-00000.safetensors"),
    "a file anywhere": lambda m: file_renamed(m, "/etc/passwd"),
    "a file in a folder": lambda m: file_renamed(m, "a/00000000-00000.safetensors"),
    "a file of another kind": lambda m: file_renamed(m, "manifest.json"),
    "another tag": lambda m: put(m, tag="other"),
    "a tag that climbs": lambda m: put(m, tag="../checkpoint"),
    # the rest
    "a newer version": lambda m: put(m, version=2),
    "an older version": lambda m: put(m, version=0),
    "a huge version": lambda m: put(m, version=10**300),
    "a version in words": lambda m: put(m, version="1"),
    "a true version": lambda m: put(m, version=True),
    "another format": lambda m: put(m, format="zip"),
    "no format": lambda m: m.pop("format"),
    "no ranks": lambda m: put(m, world=0, rank_tensors=[], rank_objects=[]),
    "many ranks": lambda m: put(m, world=HUGE),
    "fewer ranks than lists": lambda m: put(m, world=1),
    "a save_id that is none": lambda m: put(m, save_id="../../.."),
    "files as a list": lambda m: put(m, files=[]),
    "tensors as a string": lambda m: put(m, tensors="model"),
    "an unknown member": lambda m: put(m, pickle="gASV"),
    "an unknown member of a tensor": lambda m: put(embed(m), pickle="gASV"),
    "an unknown kind of value": lambda m: put(m, client_state={"__zs__": "os.system", "value": "true"}),
    "a value without its value": lambda m: put(m, client_state={"__zs__": "tuple"}),
    "bytes that are none": lambda m: put(m, client_state={"__zs__": "bytes", "value": "%%%"}),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(broken: Path, name: str) -> None:
    rewrite(broken, CASES[name])
    error = caught(broken)
    assert isinstance(error, zs_ckpt.CheckpointCorrupt), error
    assert error.file is not None and TAG in error.file
    assert isinstance(error, zs_ckpt.UnknownVersion) is ("version" in name), error
    assert len(str(error)) < 2000


def test_the_cases_change_something(good: Path, broken: Path) -> None:
    rewrite(broken, lambda members: None)
    assert len(read_all(broken)) == 10
    for name, change in CASES.items():
        members = manifest_of(good)
        change(members)
        assert json.dumps(members) != json.dumps(manifest_of(good)), name


def text(good: Path, old: str, new: str) -> bytes:
    members = manifest_of(good)
    del members["crc32"]
    raw = json.dumps(members, separators=(",", ":"))
    assert raw.count(old) >= 1, old
    return raw.replace(old, new, 1).encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"world":2', '"world":2,"world":2'),
        ('"tensors":{', '"tensors":{"model/embed":{},'),
        ('"dtype":"float32"', '"dtype":"float32","dtype":"int32"'),
        ('"world":2', '"world":NaN'),
        ('"world":2', '"world":Infinity'),
        ('"world":2', f'"world":{"9" * 100_000}'),
        ('"world":2', f'"world":2,"x":{"[" * 200_000}{"]" * 200_000}'),
        ('"world":2', '"world":2,"x":' + '{"a":' * 200_000 + "1" + "}" * 200_000),
        ('"world":2', '"world":2,"x":\x00'),
        ('"world":2', '"world":2}{"world":2'),
        ('"client_state":', '"client_state":[' * 1),
    ],
    ids=lambda value: value[:30],
)
def test_text_that_is_no_manifest(good: Path, broken: Path, old: str, new: str) -> None:
    write_manifest(broken, text(good, old, new))
    error = caught(broken)
    assert isinstance(error, zs_ckpt.CheckpointCorrupt) and "manifest.json" in str(error.file)


@pytest.mark.parametrize("depth", [500, 900, 5_000])
def test_deep_values(good: Path, broken: Path, depth: int) -> None:
    """Deep, but well formed: loaded or refused, never a crash."""
    rewrite(broken, lambda members: None)
    value = "1"
    for _ in range(depth):
        value = f'{{"__zs__":"tuple","value":[{value}]}}'
    members = manifest_of(good)
    del members["crc32"]
    raw = json.dumps(members, separators=(",", ":"))
    head, _, _ = raw.partition('"client_state":')
    write_manifest(broken, f'{head}"client_state":{value}}}'.encode())

    def look() -> None:
        with zs_ckpt.Snapshot(broken) as snapshot:
            _ = snapshot.client_state

    error = error_of(look)
    if error is not None:
        assert isinstance(error, zs_ckpt.CheckpointCorrupt)
        assert "manifest.json" in str(error.file)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\x80\x04", b"{" * 10**6],
    ids=lambda content: content[:8].decode("latin1") or "empty",
)
def test_files_that_are_no_manifest(broken: Path, content: bytes) -> None:
    (broken / TAG / "manifest.json").write_bytes(content)
    assert isinstance(caught(broken), zs_ckpt.CheckpointCorrupt)
    write_manifest(broken, content)
    assert isinstance(caught(broken), zs_ckpt.CheckpointCorrupt)


# ---- memory ----


def huge_header(folder: Path, nbytes: int) -> None:
    """A file that is as long as the manifest says, nearly all of it header, and nearly all of that a hole."""
    path = shards(folder)[0]
    size = path.stat().st_size
    content = path.read_bytes()
    offset = manifest_of(folder)["files"][path.name]["data_offset"]
    with open(path, "wb") as file:
        file.write(nbytes.to_bytes(8, "little"))
        file.seek(nbytes)
        file.write(content[offset:])
    rewrite(folder, lambda members: put(members["files"][path.name], nbytes=nbytes + size - offset, data_offset=nbytes))


def huge_manifest(folder: Path, nbytes: int) -> None:
    os.truncate(folder / TAG / "manifest.json", nbytes)


def huge_tensor(folder: Path, nbytes: int) -> None:
    """Rows without columns: no bytes at all, and more rows than any memory has."""
    rewrite(folder, lambda members: put(members["tensors"]["model/nothing"], shape=[nbytes, 0], pieces=[]))


@pytest.mark.parametrize("make", [huge_header, huge_manifest])
@pytest.mark.parametrize("nbytes", [3 << 30, 1 << 40])
def test_memory_is_bounded(broken: Path, make: Callable[[Path, int], None], nbytes: int) -> None:
    make(broken, nbytes)

    def work() -> str:
        limit_memory(1 << 30)
        return type(caught(broken)).__name__

    assert in_child(work) == "CheckpointCorrupt"


def test_a_tensor_without_elements_may_have_any_shape(broken: Path) -> None:
    """torch counts up to 2**63: what it does not take is refused by name."""
    huge_tensor(broken, 1 << 62)
    error = error_of(lambda: read_all(broken))
    if error is not None:
        assert isinstance(error, zs_ckpt.CheckpointCorrupt)
        assert error.tensor == "model/nothing"


# ---- links ----


@pytest.mark.parametrize("what", ["shard", "manifest", "folder"])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_refused(broken: Path, tmp_path: Path, what: str, dangling: bool) -> None:
    """A link in a checkpoint may point at any file of the reader's."""
    path = {"shard": shards(broken)[0], "manifest": broken / TAG / "manifest.json", "folder": broken / TAG}[what]
    outside = tmp_path / "outside"
    os.rename(path, outside)
    path.symlink_to(tmp_path / "nowhere" if dangling else outside)
    error = caught(broken)
    assert dangling or isinstance(error, zs_ckpt.CheckpointCorrupt), error


@pytest.mark.parametrize("what", ["fifo", "folder", "device"])
def test_what_is_no_file_is_refused(broken: Path, what: str) -> None:
    path = shards(broken)[0]
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)  # opening it for reading would wait for ever
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert isinstance(caught(broken), zs_ckpt.CheckpointCorrupt)


# ---- no pickle ----


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(Canary.path),))

    path: Path


def test_nothing_is_unpickled(broken: Path, tmp_path: Path) -> None:
    """Blobs of torch in every place where one could lie, whose unpickling would make a folder."""
    Canary.path = tmp_path / "canary"
    blob = tmp_path / "blob"
    torch.save({"a": Canary()}, blob)
    with pytest.raises(Exception):  # noqa: B017 - it is what torch makes of it; here it only proves that the canary lives
        torch.load(blob, weights_only=True)
    assert not Canary.path.exists()
    content = blob.read_bytes()
    save_id = manifest_of(broken)["save_id"]
    for name in (f"{save_id}-00000.pt", "model.pt", "00000000-00000.pt"):
        (broken / TAG / name).write_bytes(content)
    assert len(read_all(broken)) == 10
    rewrite(
        broken,
        lambda m: put(
            m["files"], **{f"{save_id}-00000.pt": {"nbytes": len(content), "data_offset": 0, "header_crc": "00000000"}}
        ),
    )
    error = error_of(lambda: read_all(broken))
    assert error is None or isinstance(error, zs_ckpt.CheckpointCorrupt)
    shards(broken)[0].write_bytes(content)
    assert isinstance(caught(broken), zs_ckpt.CheckpointCorrupt)
    (broken / TAG / "manifest.json").write_bytes(content)
    assert isinstance(caught(broken), zs_ckpt.CheckpointCorrupt)
    (broken / "latest").write_bytes(content)
    assert isinstance(caught(broken), zs_ckpt.CheckpointCorrupt)
    assert not Canary.path.exists()
