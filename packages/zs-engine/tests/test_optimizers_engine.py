"""Optimizers named by a configuration train at every stage, and a checkpoint takes their states anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm import Group, barrier
from zs_comm.testing import run_ranks

PARAMS: dict[str, dict[str, Any]] = {
    "Muon": {"lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.01},
    "Lamb": {"lr": 0.01, "weight_decay": 0.01},
    "Lion": {"lr": 0.001},
    "Adafactor": {"lr": 0.01},
}


def engine_of(group: Group, name: str, stage: int) -> zs_engine.Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 23), nn.Tanh(), nn.Linear(23, 7), nn.Tanh(), nn.Linear(7, 3))
    config = {
        "train_batch_size": 12,
        "gradient_clipping": 0.5,
        "optimizer": {"type": name, "params": PARAMS[name]},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 5}},
        "zero_optimization": {"stage": stage},
    }
    return zs_engine.initialize(model=model, config=config, mesh=group)[0]


def train(engine: zs_engine.Engine, group: Group, steps: range) -> None:
    for step in steps:
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step)).tensor_split(group.size)[group.rank]
        engine.backward(engine(x).square().mean())
        engine.step()


def stages(group: Group, name: str, folder: str) -> list[str]:
    """What differs between the stages, and between a run and one that a checkpoint carries to another stage."""
    lines = []
    runs: dict[int, dict[str, Tensor]] = {}
    for stage in range(4):
        engine = engine_of(group, name, stage)
        train(engine, group, range(4))
        engine.save_checkpoint(folder, f"stage{stage}")
        train(engine, group, range(4, 7))
        runs[stage] = zs_zero.full_state_dict(engine.module)
        engine.destroy()
    barrier(group)
    for stage in range(4):
        engine = engine_of(group, name, 3 - stage)
        engine.load_checkpoint(folder, f"stage{stage}")
        train(engine, group, range(4, 7))
        resumed = zs_zero.full_state_dict(engine.module)
        for key, value in runs[0].items():
            if not torch.equal(value, runs[stage][key]):
                lines.append(f"stage {stage}: {key}")
            if not torch.equal(resumed[key], runs[stage][key]):
                lines.append(f"stage {stage} resumed at {3 - stage}: {key}")
    return lines


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", PARAMS)
def test_stages_and_checkpoints(name: str, world: int, tmp_path: Path) -> None:
    if world == 1:
        assert stages(Group.single(), name, str(tmp_path)) == []
    else:
        assert not [line for lines in run_ranks(stages, world, name, str(tmp_path)) for line in lines]


def resumed(group: Group, folder: str) -> dict[str, Tensor]:
    engine = engine_of(group, "Muon", 3)
    engine.load_checkpoint(folder, "stage1")
    matrices = ((name, param) for name, param in engine.module.named_parameters() if param.dim() > 1)
    return {name: engine.optimizer.full_state(param, "momentum_buffer") for name, param in matrices}


def test_momentum_of_whole_matrices_at_another_world(tmp_path: Path) -> None:
    run_ranks(stages, 3, "Muon", str(tmp_path))
    wanted = resumed(Group.single(), str(tmp_path))
    for found in run_ranks(resumed, 2, str(tmp_path)):
        assert found.keys() == wanted.keys()
        assert all(value is not None and torch.equal(value, wanted[name]) for name, value in found.items())
        assert all(float(value.abs().max()) > 0 for value in found.values())
