"""fp16 in a checkpoint that other ranks at another stage load: the scale, its counters, skipped steps, the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
from torch import Tensor, nn
from zs_comm import Group
from zs_comm.testing import run_ranks

STEPS, SAVED, BAD = 12, 4, (2, 6)  # the checkpoint is taken inside of window 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x.to(self.inner.weight.dtype)).tanh())


def engine_of(group: Group | None, stage: int) -> zs_engine.Engine:
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 20}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 2},
    }
    return zs_engine.initialize(model=Net(), mesh=group, config=config)[0]


def batch(micro: int, rank: int, world: int) -> Tensor:
    """This rank's samples of 4; one sample of the last rank overflows in the steps of `BAD`."""
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(micro))
    if micro % 2 and micro // 2 in BAD:
        whole[3] = torch.inf
    return whole.chunk(world)[rank]


def train(group: Group | None, stage: int, folder: str, resume: bool) -> tuple[list[Any], list[Tensor]]:
    rank, world = (group.rank, group.size) if group else (0, 1)
    engine, seen = engine_of(group, stage), []
    if resume:
        engine.load_checkpoint(folder)
    for micro in range(engine.micro_steps, 2 * STEPS):
        engine.backward(engine(batch(micro, rank, world)).float().square().mean())
        engine.step()
        if micro == 2 * SAVED:
            if not resume:
                engine.save_checkpoint(folder)
            seen.clear()
        elif micro % 2:
            seen.append((engine.was_step_applied(), engine.loss_scale(), engine.skipped_steps, *engine.get_lr()))
    return seen, [engine.zero.full_param(param) for param in engine.module.parameters()]


def anyhow(world: int, stage: int, folder: Path, resume: bool) -> tuple[list[Any], list[Tensor]]:
    if world == 1:
        return train(None, stage, str(folder), resume)
    first, second = run_ranks(train, world, stage, str(folder), resume)
    assert first[0] == second[0]
    return first


@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 1)), ((2, 1), (2, 2)), ((1, 0), (2, 3))])
def test_the_scale_goes_on_elsewhere(before: tuple[int, int], after: tuple[int, int], tmp_path: Path) -> None:
    wanted, end = anyhow(*before, tmp_path, False)
    found, end_found = anyhow(*after, tmp_path, True)
    assert found == wanted
    # the overflow before the checkpoint used one of two lives up, so that the one after it halves the scale
    assert [row[1] for row in found] == [256, 256, 128, 128, 128, 128, 256, 256]
    assert found[-1][2] == 2 and [row[0] for row in found].count(False) == 1
    for value, there in zip(end_found, end, strict=True):
        torch.testing.assert_close(value, there, rtol=2e-3, atol=2e-4)
