"""Groups from what names a set of ranks, and the arrangement of a world along axes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from zs_comm import ConfigError, Group, Mesh, all_reduce, as_group
from zs_comm.mesh import _sizes
from zs_comm.testing import run_ranks


def arranged(group: Group, sizes: dict[str, int]) -> dict[str, Any]:
    mesh = Mesh.build(world=group, device_type="cpu", **sizes)
    sums = {}
    for axis in ("pp", "dp", "replicate", "shard", "sp", "tp", "ep", "world"):
        along = mesh.group(axis)
        assert along.hub is group.hub
        assert along.axis == axis
        assert along.members[along.rank] == group.rank
        if axis != "world":
            assert along.size == mesh.sizes[axis]
            assert along.rank == mesh.coordinate[axis]
        sums[axis] = int(all_reduce(torch.tensor([2**group.rank]), along, op="sum"))
        assert sums[axis] == sum(2**member for member in along.members)
    return {axis: mesh.group(axis).members for axis in sums}


def test_axes_of_four_ranks() -> None:
    ranks = run_ranks(arranged, 4, {"pp": 2, "tp": 2})
    assert [r["tp"] for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [r["pp"] for r in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [r["dp"] for r in ranks] == [(0,), (1,), (2,), (3,)]
    ranks = run_ranks(arranged, 4, {"dp": 4, "replicate": 2, "ep": 2})
    assert [r["shard"] for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [r["replicate"] for r in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [r["ep"] for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [r["dp"] for r in ranks] == [(0, 1, 2, 3)] * 4
    ranks = run_ranks(arranged, 4, {})
    assert [r["shard"] for r in ranks] == [(0, 1, 2, 3)] * 4
    ranks = run_ranks(arranged, 4, {"dp": 2, "sp": 2, "replicate": 2})
    assert [r["dp"] for r in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]


def test_alone() -> None:
    mesh = Mesh.build()
    assert mesh.group("dp").size == 1
    assert mesh.device_mesh is None
    assert mesh.coordinate["tp"] == 0
    with pytest.raises(ConfigError, match="no axis 'pd'; there are pp"):
        mesh.group("pd")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"pp": 2, "dp": 3, "tp": 2}, "pp(2) * dp(3) * tp(2) = 12 != world(8)"),
        ({"dp": 4}, "dp(4) = 4 != world(8)"),
        ({"pp": 3}, "pp(3) = 3 does not divide world(8)"),
        ({"tp": 2, "replicate": 3}, "replicate(3) does not divide dp(4)"),
        ({"replicate": 2, "ep": 8}, "ep(8) does not divide shard(4) = dp(8) / replicate(2)"),
    ],
)
def test_the_equation_that_fails_is_shown(sizes: dict[str, int], text: str) -> None:
    whole: dict[str, Any] = {"pp": 1, "dp": None, "tp": 1, "sp": 1, "ep": 1, "replicate": 1} | sizes
    with pytest.raises(ConfigError) as caught:
        _sizes(8, **whole)
    assert str(caught.value) == text


def test_a_size_below_one() -> None:
    with pytest.raises(ConfigError, match="tp is 0"):
        Mesh.build(tp=0)


@given(*(st.sampled_from([1, 2, 3]) for _ in range(6)))
def test_sizes_multiply_to_the_world(pp: int, tp: int, sp: int, ep: int, replicate: int, rest: int) -> None:
    world = pp * tp * sp * ep * replicate * rest
    sizes = _sizes(world, pp=pp, dp=None, tp=tp, sp=sp, ep=ep, replicate=replicate)
    assert sizes["pp"] * sizes["dp"] * sizes["sp"] * sizes["tp"] == world
    assert sizes["dp"] == sizes["replicate"] * sizes["shard"]
    assert sizes["shard"] % sizes["ep"] == 0


def torchs_own(group: Group) -> list[Any]:
    mesh = Mesh.build(world=group, tp=2, device_type="cpu")
    device_mesh = mesh.device_mesh
    assert device_mesh is not None
    assert mesh.device_mesh is device_mesh
    assert device_mesh.mesh_dim_names == ("shard", "tp")
    along = as_group(device_mesh["tp"])
    assert float(all_reduce(torch.ones(1), along, op="sum")) == 2.0
    with pytest.raises(ConfigError, match="the DeviceMesh has 2 dimensions"):
        as_group(device_mesh)
    return [along.axis, along.members, tuple(device_mesh.shape)]


def test_device_mesh_over_the_same_groups() -> None:
    first, *_, last = run_ranks(torchs_own, 4)
    assert first == ["tp", (0, 1), (2, 2)]
    assert last == ["tp", (2, 3), (2, 2)]


def made(group: Group) -> list[Any]:
    whole = as_group(None, "dp")
    assert as_group(group) is group
    pair = dist.new_group([0, 2])
    if group.rank == 1:
        with pytest.raises(ConfigError, match="not a member"):
            as_group(pair)
        return [whole.members]
    along = as_group(pair, "tp", timeout_s=3.0)
    assert along.timeout_s == 3.0
    assert as_group(dist.new_group([group.rank], use_local_synchronization=True)).process_group is None
    return [whole.members, along.members, along.rank, float(all_reduce(torch.ones(1), along, op="sum"))]


def test_groups_from_process_groups() -> None:
    assert run_ranks(made, 3) == [[(0, 1, 2), (0, 2), 0, 2.0], [(0, 1, 2)], [(0, 1, 2), (0, 2), 1, 2.0]]


def test_what_is_no_group() -> None:
    assert as_group(None).size == 1
    assert as_group(None, "tp").axis == "tp"
    with pytest.raises(ConfigError, match="expected a Group"):
        as_group(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="need a process group"):
        Group("dp", members=(0, 1))
    with pytest.raises(ConfigError, match="must be positive"):
        Group("dp", timeout_s=0)


def test_importing_brings_in_neither_dtensor_nor_pydantic() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import zs_comm; new = set(sys.modules) - before;"
        "print([m for m in new if m.split('.')[0] == 'pydantic' or 'tensor' in m or 'device_mesh' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
