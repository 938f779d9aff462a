"""The manifest is input from outside: what no save writes is refused before anything is opened on its word."""

import copy
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import Sharded
from zs_ckpt import CheckpointCorrupt, CheckpointIncomplete, UnknownVersion, load, read, save
from zs_ckpt.manifest import parse_manifest
from zs_ckpt.sealed import read_sealed, seal, unseal

FILE = Path("folder/tag/manifest.json")
A, B = "0123abcd-00000.safetensors", "0123abcd-00001.safetensors"


def piece(box, file=A, offset=0, size=4, extent=4096):
    nbytes = size
    for start, stop in box:
        nbytes *= stop - start
    crc = "89abcdef" * -(-nbytes // extent)
    return {"box": box, "file": file, "offset": offset, "nbytes": nbytes, "extent_nbytes": extent, "crc": crc}


def manifest():
    x = [piece([[0, 2], [0, 5]]), piece([[2, 4], [0, 5]], B)]
    return {
        "format": "zs-ckpt",
        "version": 1,
        "serial": 3,
        "save_id": "0123abcd",
        "tag": "tag",
        "world": 2,
        "files": {
            A: {"nbytes": 64 + 40 + 12, "data_offset": 64, "header_crc": "00000000"},
            B: {"nbytes": 64 + 40, "data_offset": 64, "header_crc": "00000000"},
        },
        "tensors": {"m/x": {"shape": [4, 5], "dtype": "float32", "pieces": x}},
        "rank_tensors": [{"m/own": {"shape": [3], "dtype": "float32", "pieces": [piece([[0, 3]], A, 40)]}}, {}],
        "objects": {"m": {"lr": 0.1}},
        "rank_objects": [{}, {"m": 1}],
        "client_state": None,
    }


def test_a_manifest():
    found = parse_manifest(manifest(), FILE)
    assert found.members() == manifest()
    assert found.tensors["m/x"].spec.shape == (4, 5) and found.nbytes == 220 and found.world == 2


X = ("tensors", "m/x")
FIRST = (*X, "pieces", 0)
BAD = {
    "another format": (("format",), "safetensors"),
    "hole": ((*FIRST, "box"), [[0, 1], [0, 10]]),
    "overlap": ((*X, "pieces", 1, "box"), [[1, 3], [0, 5]]),
    "out of range": ((*X, "pieces", 1, "box"), [[3, 5], [0, 5]]),
    "reversed": ((*FIRST, "box"), [[2, 0], [0, 5]]),
    "other dims": ((*FIRST, "box"), [[0, 10]]),
    "no pair": ((*FIRST, "box"), [[0, 2, 3], [0, 5]]),
    "float in a box": ((*FIRST, "box"), [[0, 2.0], [0, 5]]),
    "true in a box": ((*FIRST, "box"), [[0, True], [0, 5]]),
    "huge box": ((*FIRST, "box"), [[0, 1 << 62], [0, 1 << 62]]),
    "beyond 64 bits": ((*FIRST, "box"), [[0, 1 << 70], [0, 5]]),
    "missing piece": ((*X, "pieces"), []),
    "piece twice": ((*X, "pieces"), [piece([[0, 2], [0, 5]])] * 2),
    "pieces are no list": ((*X, "pieces"), {}),
    "piece is no object": (FIRST, 5),
    "huge shape": ((*X, "shape"), [1 << 62, 1 << 62]),
    "negative shape": ((*X, "shape"), [-4, 5]),
    "too many dims": ((*X, "shape"), [1] * 1000),
    "shape is no list": ((*X, "shape"), "45"),
    "unknown dtype": ((*X, "dtype"), "load"),
    "dtype of another size": ((*X, "dtype"), "float64"),
    "dtype is no string": ((*X, "dtype"), 3),
    "offset behind the end": ((*FIRST, "offset"), 4096),
    "negative offset": ((*FIRST, "offset"), -8),
    "huge offset": ((*FIRST, "offset"), 2**63 - 8),
    "bytes of two pieces": (("rank_tensors", 0, "m/own", "pieces", 0, "offset"), 36),
    "other nbytes": ((*FIRST, "nbytes"), 36),
    "unlisted file": ((*FIRST, "file"), "0123abcd-00007.safetensors"),
    "file elsewhere": ((*FIRST, "file"), "../other/0123abcd-00000.safetensors"),
    "absolute file": ((*FIRST, "file"), "/etc/passwd"),
    "extent of zero": ((*FIRST, "extent_nbytes"), 0),
    "extent too large": ((*FIRST, "extent_nbytes"), 1 << 30),
    "extent out of step": ((*FIRST, "extent_nbytes"), 4097),
    "too few checksums": ((*FIRST, "crc"), ""),
    "too many checksums": ((*FIRST, "crc"), "89abcdef" * 2),
    "no checksum": ((*FIRST, "crc"), "89ABCDEF"),
    "member that is unknown": ((*FIRST, "compression"), "zip"),
    "unknown member of a tensor": ((*X, "quantised"), True),
    "unknown member of a file": (("files", A, "link"), "x"),
    "unknown member": (("plugins",), []),
    "file of another length": (("files", A, "nbytes"), 1 << 40),
    "header behind the end": (("files", A, "data_offset"), 4096),
    "header's checksum": (("files", A, "header_crc"), "0"),
    "no files": (("files",), {}),
    "files are no object": (("files",), []),
    "world of zero": (("world",), 0),
    "world too large": (("world",), 1 << 40),
    "ranks that are not there": (("rank_tensors",), [{}]),
    "rank objects that are not there": (("rank_objects",), [{}, {}, {}]),
    "save_id": (("save_id",), "../../.."),
    "serial": (("serial",), -1),
    "step": (("step",), 1.5),
    "an object that no save writes": (("objects", "m"), {"__zs__": "pickle", "value": "x"}),
    "a rank's object that no save writes": (("rank_objects", 0), {"m": {"__zs__": 3}}),
    "client state that no save writes": (("client_state",), [{"__zs__": "tuple"}]),
}


@pytest.mark.parametrize("what", BAD)
def test_what_no_save_writes(what):
    path, value = BAD[what]
    members = manifest()
    place = members
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CheckpointCorrupt) as caught:
        parse_manifest(members, FILE)
    assert caught.value.file == str(FILE)
    if path[0] == "tensors":
        assert caught.value.tensor in ("m/x", "m/own", None) and "m/" in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/x", "", "a/../b", "a\0b", "x" * 5000, "__metadata__"])
def test_names_of_tensors(name):
    members = manifest()
    members["tensors"][name] = members["tensors"].pop("m/x")
    with pytest.raises(CheckpointCorrupt):
        parse_manifest(members, FILE)


@pytest.mark.parametrize(
    "name", ["../a", "manifest.json", "0123abcd-00000.pt", "/abs", "0123abcd-00000.safetensors/.."]
)
def test_names_of_files(name):
    members = manifest()
    members["files"][name] = members["files"].pop(A)
    with pytest.raises(CheckpointCorrupt, match="which no save does"):
        parse_manifest(members, FILE)


@pytest.mark.parametrize("version", [0, 2, 99, "1", True, None, 1.5])
def test_other_versions(version):
    members = manifest()
    members["version"] = version
    with pytest.raises(UnknownVersion, match="reads version 1"):
        parse_manifest(members, FILE)


@pytest.mark.parametrize("member", [key for key in manifest() if key != "client_state"])
def test_missing_members(member):
    members = manifest()
    del members[member]
    with pytest.raises(CheckpointCorrupt):
        parse_manifest(members, FILE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(json_values, st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_anywhere_is_a_manifest_or_a_typed_error(value, data):
    members = manifest()
    place = members
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = value
    try:
        found = parse_manifest(copy.deepcopy(members), FILE)
    except CheckpointCorrupt:
        return
    assert found.members() == members


def test_sealed_objects():
    value = {"a": [1, 2.5, "x\ud800", None], "b": {}}
    assert unseal(seal(value), FILE) == value
    raw = seal(value)
    assert json.loads(raw)["crc32"] == f"{zlib.crc32(raw[:-20]):08x}"
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointCorrupt):
            unseal(bytes(flipped), FILE)
    for length in range(len(raw)):
        with pytest.raises(CheckpointCorrupt):
            unseal(raw[:length], FILE)
    with pytest.raises(CheckpointCorrupt):
        unseal(raw + b"\n", FILE)


def sealed(body):
    return body + b',"crc32":"%08x"}' % zlib.crc32(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":2',
        b'{"a":{"b":1,"c":2,"b":3}',
        b'{"a":NaN',
        b'{"a":-Infinity',
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' + b'{"b":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a":' + b"1" * 10_000,
        b"[1",
        b'{"crc32":"00000000"',
        b'{"a":"\xff"',
        b"",
    ],
    ids=range(12),
)
def test_json_that_is_none_or_hostile(body):
    with pytest.raises(CheckpointCorrupt) as caught:
        unseal(sealed(body), FILE)
    assert caught.value.file == str(FILE) and len(str(caught.value)) < 700


@pytest.mark.parametrize("power", [38, 60])
def test_memory_is_not_taken_on_the_manifests_word(power, tmp_path):
    """It promises up to an exabyte; the file that is there has some bytes."""
    save(tmp_path, {"x": torch.ones(4)})
    path = tmp_path / "checkpoint" / "manifest.json"
    members, _ = read_sealed(path)
    (name,) = members["files"]
    rows, nbytes = 1 << power - 10, 1 << power
    extents = nbytes // (4 << 20)
    stored = {"box": [[0, rows], [0, 256]], "file": name, "offset": 0, "nbytes": nbytes, "extent_nbytes": 4 << 20}
    stored["crc"] = "00000000" * min(extents, 1 << 16)
    members["tensors"]["x"] = {"shape": [rows, 256], "dtype": "float32", "pieces": [stored]}
    members["files"][name]["nbytes"] = members["files"][name]["data_offset"] + nbytes
    path.write_bytes(seal(members))
    tracemalloc.start()
    with pytest.raises(CheckpointCorrupt, match="bytes"):
        read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_file_that_is_shorter_than_it_says_takes_no_memory(tmp_path):
    save(tmp_path, {"x": torch.ones(1 << 20)})
    path = tmp_path / "checkpoint" / "manifest.json"
    (name,) = read_sealed(path)[0]["files"]
    with open(tmp_path / "checkpoint" / name, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointCorrupt, match="1,000 bytes") as caught:
        load(tmp_path, {"x": torch.zeros(1 << 20)})
    assert caught.value.file.endswith(name)
    (tmp_path / "checkpoint" / name).unlink()
    with pytest.raises(CheckpointIncomplete) as missing:
        load(tmp_path, {"x": torch.zeros(1 << 20)})
    assert missing.value.file.endswith(name)


def test_a_manifest_under_another_tag(tmp_path):
    save(tmp_path, {"m": Sharded(0, 1, {"x": ((4,), torch.float32)})}, tag="one")
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(CheckpointCorrupt, match="'one'"):
        read(tmp_path, tag="two")
