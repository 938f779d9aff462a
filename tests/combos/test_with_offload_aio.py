"""zs-offload-aio beside zs-zero: neither imports the other; its entry points satisfy zs-zero's Protocols."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from zs_zero.block_store import PROTOCOL as BLOCK_STORE_PROTOCOL
from zs_zero.block_store import BlockStore
from zs_zero.host_optimizer import PROTOCOL as HOST_OPTIMIZER_PROTOCOL
from zs_zero.host_optimizer import HostOptimizer, TorchHostOptimizer
from zs_zero.testing import check_block_store, check_host_optimizer

REQUIRES = {"zs-zero", "zs-offload-aio"}


def entry_point(group: str) -> Any:
    return entry_points(group=group)["aio"].load()


def test_block_store(tmp_path: Path) -> None:
    make = entry_point("zs_zero.block_stores")
    with_folder = make(tmp_path)
    assert isinstance(with_folder, BlockStore) and with_folder.PROTOCOL == BLOCK_STORE_PROTOCOL
    with_folder.close()
    check_block_store(lambda: make(tmp_path))


def test_host_optimizer() -> None:
    make = entry_point("zs_zero.host_optimizers")
    assert isinstance(make(), HostOptimizer) and make().PROTOCOL == HOST_OPTIMIZER_PROTOCOL
    check_host_optimizer(make)


def test_the_same_bits_as_the_plain_implementation() -> None:
    hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    found = []
    for optimizer in (entry_point("zs_zero.host_optimizers")(), TorchHostOptimizer()):
        generator = torch.Generator().manual_seed(0)
        param, out = torch.randn(1003, generator=generator), torch.empty(1003, dtype=torch.bfloat16)
        state = {"param": param, "exp_avg": torch.zeros(1003), "exp_avg_sq": torch.zeros(1003)}
        for step in range(1, 4):
            grad = torch.randn(1003, generator=generator).bfloat16()
            optimizer.step("adamw", state, grad, hyper=hyper, step=step, factor=0.37, out=out)
        found.append({**state, "out": out})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_neither_imports_the_other(tmp_path: Path) -> None:
    for mine, other in (("zs_zero", "zs_offload_aio"), ("zs_offload_aio.torch", "zs_zero")):
        code = f"import sys, {mine}; print({other!r} in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["False"]
