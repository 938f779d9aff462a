"""The engine over zs-zero and zs-comm: its losses and parameters are, bit for bit, those of zs-zero by hand.

"AdamW" in a configuration is torch's fused kernel, so that is the one by hand too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zs_comm
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm.testing import run_ranks

REQUIRES = {"zs-comm", "zs-zero", "zs-engine"}
STEPS = 3


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def forward(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.layers(batch).square().mean()
        return loss


def batch(step: int, group: zs_comm.Group) -> Tensor:  # (2, 6)
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).chunk(group.size)[group.rank]


def by_engine(group: zs_comm.Group, stage: int) -> tuple[list[float], dict[str, Any]]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    net = Regression()
    engine, _, _, _ = zs_engine.initialize(model=net, model_parameters=net.parameters(), config=config)
    losses = []
    for step in range(STEPS):
        loss = engine(batch(step, group))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, zs_zero.full_state_dict(net)


def by_hand(group: zs_comm.Group, stage: int) -> tuple[list[float], dict[str, Any]]:
    net = Regression()
    optimizer = zs_zero.shard(
        net, torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01, fused=True), stage=stage
    )
    losses = []
    for step in range(STEPS):
        loss = net(batch(step, group))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, zs_zero.full_state_dict(net)


@pytest.mark.parametrize("stage", [1, 3])
def test_engine_adds_nothing_to_the_numbers(stage: int) -> None:
    for (losses, params), (expected_losses, expected) in zip(
        run_ranks(by_engine, 2, stage), run_ranks(by_hand, 2, stage), strict=True
    ):
        assert losses == expected_losses
        assert all(torch.equal(params[name], expected[name]) for name in expected)
