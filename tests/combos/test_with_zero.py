"""zs-zero over zs-comm, no engine: three steps on two ranks are plain torch's on the whole batch, at every stage."""

from __future__ import annotations

import pytest
import torch
import zs_comm
import zs_zero
from torch import Tensor, nn
from zs_comm.testing import run_ranks

REQUIRES = {"zs-comm", "zs-zero"}
STEPS = 3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def batch(step: int) -> Tensor:  # (4, 6)
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def trained(group: zs_comm.Group, stage: int) -> dict[str, Tensor]:
    net = model()
    optimizer = zs_zero.shard(net, torch.optim.AdamW(net.parameters(), lr=0.01), stage=stage)
    for step in range(STEPS):
        mine = batch(step).chunk(group.size)[group.rank]
        net(mine).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in zs_zero.full_state_dict(net).items()}


def plain() -> dict[str, Tensor]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for step in range(STEPS):
        net(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(net.state_dict())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_plain_torch(stage: int) -> None:
    expected = plain()
    for found in run_ranks(trained, 2, stage):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
