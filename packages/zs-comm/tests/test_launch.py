"""Rank discovery from the environment, joining, leaving."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from zs_comm import CommTimeout, ConfigError, Group, RankEnv, all_reduce, discover, init_distributed, shutdown
from zs_comm.hostlist import expand_hostlist, expand_tasks_per_node
from zs_comm.testing import run_ranks

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "node[003-005,9],gpu1",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, RankEnv()),
        ({"SLURM_NTASKS": "4"}, RankEnv()),  # inside salloc, not started by srun
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "h",
                "MASTER_PORT": "1",
            },
            RankEnv(rank=3, world=4, local_rank=1, local_world=2, source="torchrun", master_addr="h", master_port=1),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, RankEnv(rank=1, world=2, local_rank=1, local_world=2, source="torchrun")),
        (
            SLURM,
            RankEnv(
                rank=5,
                world=7,
                local_rank=1,
                local_world=2,
                source="slurm",
                master_addr="node003",
                master_port=15000 + 123456 % 15000,
            ),
        ),
        (
            SLURM | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},  # torchrun inside SLURM
            RankEnv(source="torchrun"),
        ),
        (
            SLURM | {"SLURM_STEP_NODELIST": "b[1-2]", "MASTER_PORT": "999", "SLURM_STEP_NUM_TASKS": "6"},
            RankEnv(rank=5, world=6, local_rank=1, local_world=2, source="slurm", master_addr="b1", master_port=999),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            RankEnv(rank=2, world=4, local_rank=0, local_world=2, source="openmpi", master_port=29500),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            RankEnv(
                rank=1,
                world=2,
                local_rank=1,
                local_world=2,
                source="openmpi",
                master_addr="127.0.0.1",
                master_port=29500,
            ),
        ),
    ],
)
def test_discover(environ: dict[str, str], expected: RankEnv) -> None:
    assert discover(environ) == expected


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"RANK": "1"}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not a rank of WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is not a rank"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 is not a rank"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        ({"SLURM_PROCID": "0"}, "SLURM_PROCID=0 is set but SLURM_NTASKS is not"),
        ({"SLURM_PROCID": "7", "SLURM_NTASKS": "7"}, "SLURM_PROCID=7 is not a rank of SLURM_NTASKS=7"),
        ({"OMPI_COMM_WORLD_SIZE": "7"}, "OMPI_COMM_WORLD_RANK is not"),
    ],
)
def test_contradicting_variables_are_named(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        discover(environ)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("node[003-005,9],gpu1", ["node003", "node004", "node005", "node9", "gpu1"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("a-b[1]-c, d", ["a-b1-c", "d"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-2", "n1-2]", "n[a]", "n[3-1]", "n[[1]]"])
def test_host_lists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        expand_hostlist(text)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(1, 4))
def test_host_lists_keep_every_number(numbers: list[int], width: int) -> None:
    text = ",".join(f"{n:0{width}d}" for n in numbers)
    assert expand_hostlist(f"x[{text}]y") == [f"x{n:0{width}d}y" for n in numbers]


def test_tasks_per_node() -> None:
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="tasks per node"):
        expand_tasks_per_node("2x3")


def test_one_process_just_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    group = init_distributed()
    assert (group.axis, group.rank, group.size, group.process_group) == ("world", 0, 1, None)
    assert not dist.is_initialized()
    shutdown()


def test_arguments_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="give both or neither"):
        init_distributed(rank=0)
    with pytest.raises(ConfigError, match="rank=2 is not a rank of world=2"):
        init_distributed(rank=2, world=2)
    with pytest.raises(ConfigError, match="without a store or an init_method"):
        init_distributed(rank=0, world=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR and MASTER_PORT not set"):
        init_distributed()


def test_ranks_that_do_not_come(tmp_path: Path) -> None:
    with pytest.raises(CommTimeout, match="not all of the 2 ranks came in 1 s"):
        init_distributed("gloo", timeout_s=1.0, init_method=f"file://{tmp_path}/meet", rank=0, world=2)
    assert not dist.is_initialized()
    shutdown()


def again(group: Group, path: str) -> list[Any]:
    same = init_distributed()
    first = float(all_reduce(torch.ones(1), same, op="sum"))
    shutdown()
    shutdown()
    new = init_distributed("gloo", init_method=f"file://{path}", rank=group.rank, world=group.size, timeout_s=7.0)
    return [same.members, same.axis, new.timeout_s, first, float(all_reduce(torch.ones(1), new, op="sum"))]


def test_init_takes_what_exists_and_can_follow_a_shutdown(tmp_path: Path) -> None:
    assert run_ranks(again, 2, str(tmp_path / "meet")) == [[(0, 1), "world", 7.0, 2.0, 2.0]] * 2


def from_variables(group: Group, names: list[dict[str, str]]) -> float:
    shutdown()
    os.environ.update(names[group.rank])
    world = init_distributed(timeout_s=20.0)
    return float(all_reduce(torch.tensor([world.rank + 1.0]), world, op="sum"))


@pytest.mark.parametrize("launcher", ["torchrun", "slurm", "openmpi"])
def test_init_from_a_launchers_variables(launcher: str) -> None:
    names = {
        "torchrun": [{"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for r in range(2)],
        "slurm": [
            {"SLURM_PROCID": str(r), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(r), "SLURM_JOB_NODELIST": "localhost"}
            for r in range(2)
        ],
        "openmpi": [{"OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_SIZE": "2"} for r in range(2)],
    }[launcher]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert run_ranks(from_variables, 2, [one | {"MASTER_PORT": port} for one in names]) == [3.0, 3.0]
