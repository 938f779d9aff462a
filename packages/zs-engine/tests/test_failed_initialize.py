"""After an initialize() that failed the model is as it was: whole, without hooks, ready for another."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import zs_engine
import zs_zero
from torch import nn
from zs_comm import ConfigError, Group, RankDisagreement
from zs_comm.testing import run_ranks

CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
AUTO = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}
GROUPS = {"type": "WarmupLR", "params": {"warmup_max_lr": [1.0, 2.0]}}
LAYERS = {"progressive_layer_drop": {"enabled": True}}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def fails(optimizer: Any) -> Any:
    raise RuntimeError("no schedule today")


LATE = [
    ({"scheduler": GROUPS}, {}, r"scheduler\.params: WarmupLR: warmup_max_lr: 2 values for 1 parameter groups"),
    ({}, {"lr_scheduler": fails}, "no schedule today"),
    ({}, {"training_data": 3}, "object of type 'int' has no len"),
]
EARLY = [
    ({"scheduler": AUTO}, {}, r'scheduler\.params\.total_num_steps: "auto" has to be filled in by the caller \(it has'),
    (LAYERS, {}, r"progressive_layer_drop\.enabled: the forward of Sequential"),
    (
        {},
        {"lr_scheduler": 3},
        r"lr_scheduler should be a learning-rate schedule or make one of the optimizer \(got",
    ),
]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(("config", "call", "text"), LATE + EARLY)
def test_a_second_initialize_works(stage: int, config: dict[str, Any], call: dict[str, Any], text: str) -> None:
    model, sizes = net(), {"zero_optimization": {"stage": stage}}
    with pytest.raises((ConfigError, RuntimeError, TypeError), match=text):
        zs_engine.initialize(model=model, config=CONFIG | sizes | config, **call)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), net().parameters(), strict=True))
    engine = zs_engine.initialize(model=model, config=CONFIG | sizes)[0]
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    assert engine.global_steps == 1


@pytest.mark.parametrize(("config", "call", "text"), EARLY)
def test_what_can_be_known_before_is_said_before_anything_is_sharded(
    config: dict[str, Any], call: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zs_zero, "shard", None)
    with pytest.raises(ConfigError, match=text):
        zs_engine.initialize(model=net(), config=CONFIG | config, **call)


def failed_on_one(group: Group) -> list[float]:
    model, config = net(), CONFIG | {"zero_optimization": {"stage": 3}}
    with pytest.raises(RuntimeError if group.rank else RankDisagreement, match="no schedule today"):
        zs_engine.initialize(model=model, config=config, mesh=group, lr_scheduler=fails if group.rank else None)
    whole = all(torch.equal(one, other) for one, other in zip(model.parameters(), net().parameters(), strict=True))
    engine = zs_engine.initialize(model=model, config=config, mesh=group)[0]
    return [float(whole), float(engine(torch.ones(1, 4)).sum().detach())]


def test_one_rank_that_fails_takes_all_back() -> None:
    expected = [1.0, float(net()(torch.ones(1, 4)).sum().detach())]
    assert run_ranks(failed_on_one, 2) == [expected, expected]


def test_a_schedule_needs_an_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    config = {"train_batch_size": 1, "scheduler": {"type": "WarmupLR"}}
    with caplog.at_level(logging.WARNING, "zs_engine"):
        assert zs_engine.initialize(model=net(), config=config)[3] is None
    assert caplog.messages == ["scheduler.type: WarmupLR is left out, because there is no optimizer to schedule"]
    with pytest.raises(ConfigError, match="there is no optimizer to make one of"):
        zs_engine.initialize(model=net(), config={"train_batch_size": 1}, lr_scheduler=fails)
