"""Offload through the engine: the sections of a configuration, in every tier, give the numbers of a run in memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm import ConfigError, Group
from zs_comm.config import dotted
from zs_comm.testing import run_ranks
from zs_engine.config import examine

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 0.01}},
}
STEPS = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.body, self.head = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.tok.weight.requires_grad_(requires_grad=False)  # frozen parameters live somewhere too

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.head(self.body(self.tok(ids)).tanh())
        return x.float().square().mean()


def with_path(zero: dict[str, Any], folder: str) -> dict[str, Any]:
    """The sections with their files in `folder`."""
    result = json.loads(json.dumps(zero))
    for name in ("offload_optimizer", "offload_param"):
        section = result.get(name, {})
        if "nvme" in (section.get("device"), section.get("zs_gradients")):
            section["nvme_path"] = folder
    return dict(result)


def engine_of(group: Group, zero: dict[str, Any], folder: str, **more: Any) -> zs_engine.Engine:
    torch.manual_seed(0)
    config = CONFIG | {"zero_optimization": with_path(zero, folder)} | more
    return zs_engine.initialize(model=Net(), mesh=group, config=config)[0]


def train(engine: zs_engine.Engine, steps: int = STEPS) -> list[float]:
    losses = []
    for number in range(steps * CONFIG["gradient_accumulation_steps"]):
        generator = torch.Generator().manual_seed(10 * number + engine.global_rank)
        loss = engine(torch.randint(64, (2, 4), generator=generator).to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def run(group: Group, zero: dict[str, Any], folder: str, more: dict[str, Any]) -> dict[str, Any]:
    engine = engine_of(group, zero, folder, **more)
    losses = train(engine)
    found = {
        "losses": losses,
        "norm": engine.get_global_grad_norm(),
        "skipped": engine.skipped_steps,
        "weights": zs_zero.full_state_dict(engine.module, masters=True),
    }
    engine.destroy()
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = one["weights"], other["weights"]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return equal and weights[0].keys() == weights[1].keys() and one["losses"] == other["losses"] == one["losses"]


SMALL = {"zs_block_numel": 64, "buffer_count": 1}
NVME = {"device": "nvme"} | SMALL
TIERS: dict[str, dict[str, Any]] = {
    "cpu": {"offload_optimizer": {"device": "cpu"}},
    "old name": {"cpu_offload": True},
    "half in cpu": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "nvme": {"offload_optimizer": NVME},
    "gradients too": {"offload_optimizer": NVME | {"zs_gradients": "nvme"}},
    "as much as fits": {"offload_optimizer": NVME | {"zs_max_in_cpu": 2000}},
    "half in nvme": {"offload_optimizer": NVME | {"ratio": 0.5}},
    "capped blocks": {"offload_optimizer": {"device": "nvme"}, "sub_group_size": 100},
    "early": {"offload_optimizer": NVME | {"zs_early_update": True}},
    "super": {"offload_optimizer": {"device": "cpu", "super_offload": True}},
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "parameters in cpu": {"offload_param": {"device": "cpu"}},
    "parameters in nvme": {"offload_param": {"device": "nvme", "max_in_cpu": 0, "buffer_count": 1}},
    "both in nvme": {"offload_optimizer": NVME, "offload_param": {"device": "nvme", "max_in_cpu": 100}},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 1}},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tier", TIERS)
def test_an_optimizer_elsewhere_gives_the_numbers_of_one_in_memory(tier: str, precision: str, tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        wanted, found = (
            run(Group.single(), {"stage": stage} | zero, str(tmp_path), PRECISIONS[precision])
            for zero in ({}, TIERS[tier])
        )
        assert same(wanted, found), stage
        assert repr(wanted["norm"]) == repr(found["norm"])  # not a number after an overflow
        assert wanted["skipped"] == found["skipped"] == (2 if precision == "fp16" else 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tier", PARAMETERS)
def test_parameters_elsewhere_give_the_numbers_of_those_in_memory(tier: str, precision: str, tmp_path: Path) -> None:
    wanted, found = (
        run(Group.single(), {"stage": 3} | zero, str(tmp_path), PRECISIONS[precision])
        for zero in ({}, PARAMETERS[tier])
    )
    assert same(wanted, found)


def on_ranks(group: Group, folder: str) -> list[bool]:
    tiers = [(1, TIERS["cpu"]), (2, TIERS["gradients too"]), (3, PARAMETERS["both in nvme"])]
    return [
        same(*(run(group, {"stage": stage} | zero, folder, PRECISIONS["bf16"]) for zero in ({}, tier)))
        for stage, tier in tiers
    ]


def test_two_ranks(tmp_path: Path) -> None:
    assert run_ranks(on_ranks, 2, str(tmp_path)) == [[True] * 3] * 2


def test_the_report_and_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: dict[str, list[float]] = {}

    class Monitor:
        def scalar(self, name: str, value: float, step: int) -> None:
            told.setdefault(name.removeprefix("Train/Samples/"), []).append(value)

    with caplog.at_level(logging.INFO, "zs_engine"):
        engine = engine_of(Group.single(), {"stage": 2, "offload_optimizer": NVME}, str(tmp_path), steps_per_print=2)
        engine.observers.add(Monitor())
        train(engine, 4)
    lines = [line for line in caplog.messages if line.startswith("offload: ")]
    assert len(lines) == 2 and all("read" in line and "overlap" in line for line in lines)
    report = engine.offload_report()
    assert report.steps == 4 and str(report)
    assert report.read == report.expected_read and report.written == report.expected_written
    assert told["offload_read_nbytes"][-1] == sum(report.read.values()) > 0
    assert len(told["offload_stall_ms"]) == 4 and all(value >= 0 for value in told["offload_stall_ms"])
    engine.destroy()
    assert list(tmp_path.rglob("*.blocks")) == []


def test_nothing_is_reported_where_nothing_is_offloaded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zs_engine"):
        train(engine_of(Group.single(), {"stage": 1}, "", steps_per_print=1), 1)
    assert not any(line.startswith("offload: ") for line in caplog.messages)


def test_a_limit_that_cannot_be_met(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": NVME, "offload_param": {"device": "nvme"}}
    with pytest.raises(ConfigError, match="host_memory_limit"):
        engine_of(Group.single(), zero, str(tmp_path), zs_host_memory_limit="1kB")
    assert list(tmp_path.rglob("*.blocks")) == []


@pytest.mark.parametrize("missing", ["optimizer", "parameters"])
def test_a_missing_folder(missing: str, tmp_path: Path) -> None:
    zero = {"stage": 3} | (TIERS["nvme"] if missing == "optimizer" else PARAMETERS["parameters in nvme"])
    with pytest.raises(OSError, match="not/there"):
        engine_of(Group.single(), zero, str(tmp_path / "not/there"))


def test_getters(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5, "zs_early_update": True}}
    aio = {"queue_depth": 4}
    engine = engine_of(Group.single(), zero | {"offload_param": {"device": "cpu"}}, str(tmp_path), aio=aio)
    assert engine.zero_offload_optimizer().device == engine.zero_offload_param().device == "cpu"
    assert engine.zero_cpu_offload() and engine.zero_use_cpu_optimizer() and engine.super_offload()
    assert engine.zero_partial_offload() == 0.5
    assert engine.aio_config().queue_depth == 4
    engine = engine_of(Group.single(), {"stage": 3}, str(tmp_path))
    assert not (engine.zero_cpu_offload() or engine.zero_use_cpu_optimizer() or engine.super_offload())


@pytest.mark.parametrize(("kind", "needs"), [("Lamb", "norms"), ("Adafactor", "whole parameters")])
def test_an_optimizer_that_looks_at_more_than_elements(kind: str, needs: str) -> None:
    config = {"optimizer": {"type": kind}, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert examine(config)[2] == []
    config["zero_optimization"] = {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
    (problem,) = examine(config)[2]
    assert dotted(problem.path).startswith("optimizer") and needs in problem.text
    assert "offload_optimizer.device 'nvme'" in problem.text
