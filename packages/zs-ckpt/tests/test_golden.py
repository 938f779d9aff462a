"""Checkpoints of every version that was ever released stay in `golden` and load."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_ckpt
import zs_comm
from zs_ckpt.manifest import VERSION
from zs_comm.testing import run_ranks

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("v[0-9]*"))


def given() -> Any:
    if "golden_values" not in sys.modules:
        spec = importlib.util.spec_from_file_location("golden_values", GOLDEN / "values.py")
        assert spec is not None and spec.loader is not None
        sys.modules["golden_values"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["golden_values"])
    return sys.modules["golden_values"]


CASES = [(version, tag) for version in VERSIONS for tag in given().TAGS]


def test_the_current_version_is_there() -> None:
    assert f"v{VERSION}" in VERSIONS


@pytest.mark.parametrize(("version", "tag"), CASES)
def test_every_byte_verifies(version: str, tag: str) -> None:
    report = zs_ckpt.verify(GOLDEN / version, tag)
    assert report.ok and report.leftovers == [], str(report)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_folder_is_read(version: str) -> None:
    assert zs_ckpt.tags(GOLDEN / version) == list(given().TAGS)
    with zs_ckpt.Snapshot(GOLDEN / version) as snapshot:
        assert snapshot.tag == given().TAGS[-1]


@pytest.mark.parametrize(("version", "tag"), CASES)
def test_every_value_is_read(version: str, tag: str) -> None:
    values, found = given(), zs_ckpt.read(GOLDEN / version, tag=tag)
    loose = values.loose()
    expected = {
        f"loose/{group}/{name}": value for group in ("dtypes", "shapes") for name, value in loose[group].items()
    }
    expected |= {f"loose/{name}": value for name, value in loose.items() if isinstance(value, torch.Tensor)}
    expected |= {f"cut/{name}": value for name, value in values.cut().items()}
    world = values.TAGS.index(tag) + 1
    expected |= {f"rank{rank}/cut/own": values.own(rank) for rank in range(world)}
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        flat = [one.reshape(-1).contiguous().view(torch.uint8) for one in (found[name], value)]
        assert torch.equal(*flat), name
    with zs_ckpt.Snapshot(GOLDEN / version, tag) as snapshot:
        assert snapshot.client_state == values.values()
        assert (snapshot.manifest.step, snapshot.manifest.world) == (values.STEP, world)


def loaded(group: zs_comm.Group, folder: str, tag: str) -> bool:
    """Into places of other shards than were saved."""
    values = given()
    tensors = {name: torch.zeros_like(value) for name, value in values.cut().items()}
    cut = values.Cut(group.rank, group.size, tensors, torch.zeros(3, dtype=torch.int64))
    same = values.TAGS.index(tag) + 1 == group.size
    if not same:
        cut.pieces = lambda made=cut.pieces: (piece for piece in made() if not piece.scope)
    loose: dict[str, Any] = {}
    zs_ckpt.load(folder, {"cut": cut, "loose": loose}, tag=tag, group=group)
    for name, value in values.cut().items():
        size = value.numel()
        mine = slice(size * group.rank // group.size, size * (group.rank + 1) // group.size)
        assert torch.equal(tensors[name].view(-1)[mine], value.view(-1)[mine]), name
    assert cut.kind == "cut" and [own["mine"] for own in cut.ranks] == list(range(values.TAGS.index(tag) + 1))
    assert not same or torch.equal(cut.own, values.own(group.rank))
    assert loose["values"] == values.values()
    assert torch.equal(loose["shapes"]["large"], values.loose()["shapes"]["large"])
    return True


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("version", "tag"), CASES)
def test_any_number_of_ranks_loads_it(version: str, tag: str, world: int) -> None:
    assert run_ranks(loaded, world, str(GOLDEN / version), tag) == [True] * world


@pytest.mark.parametrize("version", VERSIONS)
def test_a_save_goes_beside_it(version: str, tmp_path: Path) -> None:
    """A folder of an old version is one that a training goes on in."""
    folder = shutil.copytree(GOLDEN / version, tmp_path / "run")
    zs_ckpt.save(folder, {"x": torch.ones(2)}, tag="now")
    assert zs_ckpt.tags(folder) == [*given().TAGS, "now"]
    assert zs_ckpt.read(folder)["x"].tolist() == [1, 1]


def test_another_version_is_refused_by_number(tmp_path: Path) -> None:
    import json
    import zlib

    folder = shutil.copytree(GOLDEN / f"v{VERSION}", tmp_path / "run")
    path = folder / "one" / "manifest.json"
    raw = path.read_bytes().replace(f'"version":{VERSION}'.encode(), b'"version":999', 1)
    body = raw[: raw.rindex(b',"crc32"')]
    path.write_bytes(body + b',"crc32":"%08x"}' % zlib.crc32(body))
    json.loads(path.read_bytes())
    with pytest.raises(zs_ckpt.UnknownVersion, match="999"):
        zs_ckpt.read(folder, tag="one")
