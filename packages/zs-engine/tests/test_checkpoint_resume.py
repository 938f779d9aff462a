"""Exact resume: what follows a load is what would have followed the save, bit for bit at the same world size."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
from torch import Tensor, nn
from zs_comm import Group
from zs_comm.testing import run_ranks


class Net(nn.Module):
    """Dropout draws random numbers; the last layer is tied to the first one's transpose by a product."""

    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 17)
        self.norm = nn.LayerNorm(17)
        self.dropout = nn.Dropout(dropout)
        self.unused = nn.Linear(3, 2)
        self.frozen = nn.Linear(17, 17).requires_grad_(False)
        self.outer = nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.inner.weight.dtype)
        return self.outer(self.dropout(self.frozen(self.norm(self.inner(x)).tanh())))


class Samples:
    """64 samples; a sample is 6 numbers that tell which one it is."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(index))


def config_of(stage: int, bf16: bool, steps: int, world: int, micro: int = 2) -> dict[str, Any]:
    return {
        "train_batch_size": micro * steps * world,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 5}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }


def engine_of(group: Group, config: dict[str, Any], *, seed: int, dropout: float = 0.25) -> zs_engine.Engine:
    torch.manual_seed(seed)
    random.seed(seed)
    model = Net(dropout)
    torch.manual_seed(100 * seed + group.rank)
    return zs_engine.initialize(model=model, training_data=Samples(), mesh=group, config=config)[0]


def train(engine: zs_engine.Engine, batches: Any, count: int) -> list[float]:
    losses = []
    for batch in itertools.islice(batches, count):
        loss = engine(batch).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def everything(engine: zs_engine.Engine) -> dict[str, Any]:
    """All that must be the same."""
    found: dict[str, Any] = {}
    for state in (engine.module, engine.optimizer):  # this rank's part of every tensor
        pieces = state.__zs_shardable__().pieces()
        found |= {f"{piece.spec} {piece.box} {piece.scope}": piece.data.clone() for piece in pieces}
    found["rng"] = torch.get_rng_state()
    found["python"] = random.random()
    found["lr"] = engine.get_lr()
    found["counters"] = (engine.global_steps, engine.micro_steps, engine.global_samples)
    found["schedule"] = engine.lr_scheduler.state_dict()
    return found


def differing(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)

    assert here.keys() == there.keys()
    return [name for name in here if not same(here[name], there[name])]


def resumed(group: Group, folder: str, stage: int, cases: list[tuple[bool, int, int]]) -> list[str]:
    wrong = []
    for bf16, steps, stop in cases:
        where, config = f"{folder}/{bf16}-{steps}-{stop}", config_of(stage, bf16, steps, group.size)
        engine = engine_of(group, config, seed=1)
        batches = zs_engine.RepeatingLoader(engine.training_dataloader)
        train(engine, batches, stop)
        engine.save_checkpoint(where, client_state={"seen": (stop, 0.1)})
        losses = train(engine, batches, 7)
        expected = everything(engine)
        engine.destroy()

        other = engine_of(group, config, seed=2)
        train(other, other.training_dataloader, 3)  # what it had is gone after the load
        path, client = other.load_checkpoint(where)
        label = f"bf16 {bf16}, {steps} micro-steps, stopped after {stop}"
        if client != {"seen": (stop, 0.1)} or Path(path).name != f"global_step{stop // steps}":
            wrong.append(f"{label}: {path} {client}")
        again = train(other, zs_engine.RepeatingLoader(other.training_dataloader), 7)
        if again != losses:
            wrong.append(f"{label}: losses {losses} and {again}")
        wrong += [f"{label}: {name}" for name in differing(expected, everything(other))]
        other.destroy()
    return wrong


# after a step, inside a window, at the end of an epoch (16 batches of 2 samples on each of two ranks)
CASES = [(False, 1, 5), (True, 1, 16), (False, 4, 6), (True, 4, 7), (False, 4, 8)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_on_as_many_ranks_is_bitwise(stage: int, tmp_path: Path) -> None:
    for wrong in run_ranks(resumed, 2, str(tmp_path), stage, CASES, timeout_s=120):
        assert not wrong


def test_resume_on_one_rank_is_bitwise(tmp_path: Path) -> None:
    assert not run_ranks(resumed, 1, str(tmp_path), 2, CASES)[0]
