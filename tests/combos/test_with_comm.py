"""zs-comm by itself: ranks, the engine-free harness, the loopback counter."""

from __future__ import annotations

import sys

import torch
import zs_comm
from zs_comm.testing import run_ranks

REQUIRES = {"zs-comm"}


def summed(group: zs_comm.Group) -> list[float]:
    flat = torch.full((8,), float(group.rank + 1))
    zs_comm.all_reduce(flat, group, op="sum")
    return flat.tolist()


def test_sum_over_ranks() -> None:
    assert run_ranks(summed, 2) == [[3.0] * 8] * 2


def test_size_one_is_the_identity() -> None:
    flat = torch.arange(4.0)
    zs_comm.all_reduce(flat, zs_comm.Group.single(), op="sum")
    assert flat.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert not torch.distributed.is_initialized()


def test_no_sibling_was_imported_on_the_way(packages: set[str]) -> None:
    loaded = {name.replace("_", "-") for name in sys.modules if name.startswith("zs_") and "." not in name}
    assert loaded <= packages
