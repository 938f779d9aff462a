"""Keys that choose dtypes reach the training: the engine's numbers are those of zs_zero.shard with the same choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm import ConfigError, Group
from zs_comm.testing import run_ranks
from zs_engine.config import examine

F32, B16 = torch.float32, torch.bfloat16
MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}
LOW = {"dtype": B16, "master_dtype": B16, "state_dtype": F32}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bf16": {"enabled": True}}, {"dtype": B16}),
    ({"bf16": MASTERS}, LOW),
    ({"bf16": MASTERS | {"bf16_optimizer_states": True}}, LOW | {"state_dtype": B16}),
    (
        {"bf16": MASTERS, "zs_bf16_update": "stochastic_rounding", "zs_bf16_update_seed": 5},
        LOW | {"bf16_update": "stochastic_rounding", "seed": 5},
    ),
    ({"bf16": MASTERS, "zs_bf16_update": "kahan"}, LOW | {"bf16_update": "kahan"}),
    ({"bf16": {"enabled": True}, "communication_data_type": "FP32"}, {"dtype": B16, "reduce_dtype": F32}),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float32", "param_dtype": "bf16"}},
        {"dtype": B16, "grad_accum_dtype": F32},
    ),
    (
        {"data_types": {"buffer_dtype": "bf16", "grad_accum_dtype": "bf16"}},
        {"buffer_dtype": B16, "grad_accum_dtype": B16},
    ),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 4)
        self.register_buffer("gain", torch.tensor(1.0 + 2**-9))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x.to(self.inner.weight.dtype)))) * self.gain


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(x).float().square().mean()


def trained(group: Group, keys: dict[str, Any], options: dict[str, Any], stage: int) -> list[str]:
    """The parameters that differ after three updates of two micro-steps."""
    model, other = Net(), Net()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    engine = zs_engine.initialize(model=model, mesh=group, config=config | keys)[0]
    optimizer = zs_zero.shard(
        other, torch.optim.AdamW(other.parameters(), lr=0.01, fused=True), stage=stage, mesh=group, **options
    )
    for step in range(6):
        engine.backward(loss_of(engine, step, group.rank))
        engine.step()
        (loss_of(other, step, group.rank) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert model.gain.dtype == options.get("buffer_dtype", F32)
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return [
        name
        for (name, mine), theirs in pairs
        if mine.dtype != theirs.dtype or not torch.equal(engine.zero.full_param(mine), optimizer.full_param(theirs))
    ]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_keys_are_honoured(number: int) -> None:
    assert run_ranks(trained, 2, *CASES[number], (1, 3)[number % 2]) == [[], []]


def test_the_cases_differ() -> None:
    """What they are compared with depends on every one of these keys."""

    def result(options: dict[str, Any]) -> Tensor:
        model = Net()
        optimizer = zs_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=0.01), stage=0, **options)
        for step in range(6):
            loss_of(model, step, 0).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        return torch.cat([optimizer.full_param(param).flatten() for param in model.parameters()])

    options = [case for _, case in CASES if "reduce_dtype" not in case]  # one rank sends nothing
    results = [result(case) for case in options]
    for first in range(len(results)):
        for second in range(first):
            if second == 0 and options[first].get("bf16_update") == "kahan":
                continue  # the numbers of masters, without masters
            assert not torch.equal(results[first], results[second]), (options[first], options[second])


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        ({"zs_bf16_update": "kahan"}, ["zs_bf16_update", "bf16.enabled", "bf16.bf16_master_weights_and_grads"]),
        ({"bf16": {"enabled": True}, "zs_bf16_update": "stochastic_rounding"}, ["bf16.bf16_master_weights_and_grads"]),
        ({"zs_bf16_update": "kahn"}, ["'plain', 'stochastic_rounding' or 'kahan'"]),
        ({"zs_bf16_update_seed": -1}, ["zs_bf16_update_seed", "greater than or equal to 0"]),
        ({"zs_bf16_updates": "kahan"}, ["did you mean 'zs_bf16_update'"]),
        ({"data_types": {"grad_accum_dtype": "int8"}}, ["data_types.grad_accum_dtype", "'fp32', 'bf16' or 'fp16'"]),
        ({"data_types": {"grad_accum_type": "fp32"}}, ["did you mean 'grad_accum_dtype'"]),
        ({"data_types": {"param_dtype": "bfloat16"}}, ["data_types.param_dtype", "bf16.enabled"]),
        ({"communication_data_type": 16}, ["communication_data_type", "'fp32', 'bf16' or 'fp16'"]),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, ["bf16.bf16_master_weights_and_grads"]),
    ],
)
def test_refused(keys: dict[str, Any], texts: list[str]) -> None:
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 1}} | keys
    found = "\n".join(map(str, examine(config)[2]))
    assert all(text in found for text in texts), found
    with pytest.raises(ConfigError):
        zs_engine.initialize(model=Net(), config=config)
