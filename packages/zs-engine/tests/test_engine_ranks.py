"""The engine on two ranks: shared work, and errors that every rank gets."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import zs_comm
import zs_engine
import zs_zero
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from zs_comm import Group
from zs_comm.testing import RunResult, run_ranks

CONFIG = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "gradient_clipping": 0.1,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def engine_of(group: Group, **more: Any) -> zs_engine.Engine:
    return zs_engine.initialize(model=net(), mesh=group, config=CONFIG | more)[0]


def micro_batches(rank: int, world: int, count: int) -> list[Tensor]:
    """This rank's parts of `count` batches of 4 samples."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator).chunk(world)[rank] for _ in range(count)]


def train(engine: zs_engine.Engine, data: list[Tensor]) -> None:
    for batch in data:
        engine.backward(engine(batch).square().mean())
        engine.step()


def trained(group: Group, stage: int) -> dict[str, Any]:
    engine = engine_of(group, zero_optimization={"stage": stage})
    train(engine, micro_batches(group.rank, group.size, 12))
    return {
        "weights": zs_zero.full_state_dict(engine.module),
        "norm": engine.get_global_grad_norm(),
        "sizes": engine.get_batch_info(),
        "place": (engine.global_rank, engine.world_size, engine.dp_world_size),
        "samples": engine.global_samples,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_like_one_with_both_halves(stage: int) -> None:
    first, second = run_ranks(trained, 2, stage)
    alone = engine_of(Group.single(), train_micro_batch_size_per_gpu=4)
    train(alone, micro_batches(0, 1, 12))
    assert first["place"] == (0, 2, 2) and second["place"] == (1, 2, 2)
    assert first["sizes"] == (8, 2, 2) and first["samples"] == 48
    assert first["norm"] == second["norm"] == pytest.approx(alone.get_global_grad_norm(), rel=1e-5)
    for name, value in zs_zero.full_state_dict(alone.module).items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-6)


def built_under_init(group: Group) -> tuple[float | None, dict[str, Tensor]]:
    config = CONFIG | {"zero_optimization": {"stage": 3}}
    with zs_zero.Init(config_dict_or_path=config, mesh=group, live_numel=0):
        model = net()
    engine = zs_engine.initialize(model=model, mesh=group, config=config)[0]
    train(engine, micro_batches(group.rank, group.size, 12))
    return engine.get_global_grad_norm(), zs_zero.full_state_dict(engine.module)


def test_a_model_built_under_init() -> None:
    (norm, weights), _ = run_ranks(built_under_init, 2)
    expected = run_ranks(trained, 2, 3)[0]
    assert norm == expected["norm"]
    assert all(torch.equal(weights[name], value) for name, value in expected["weights"].items())


def over_meshes(group: Group) -> list[tuple[Any, Any]]:
    meshes = {
        "group": group,
        "default": None,
        "process group": group.process_group,
        "replicate": zs_comm.Mesh.build(world=group, replicate=2),
        "1-d": init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)),
        "2-d": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")),
        "tensor parallel": zs_comm.Mesh.build(world=group, tp=2),
    }
    found = []
    for mesh in meshes.values():
        engine = zs_engine.initialize(model=net(), mesh=mesh, config=CONFIG | {"zero_optimization": {"stage": 3}})[0]
        train(engine, micro_batches(0, 1, 4))
        found.append((engine.get_batch_info(), engine.get_global_grad_norm()))
    return found


def test_the_mesh_says_who_shares_the_batch() -> None:
    first, second = run_ranks(over_meshes, 2)
    assert first == second
    assert [sizes for sizes, _ in first] == [(8, 2, 2)] * 6 + [(8, 4, 2)]
    assert [norm for _, norm in first] == [pytest.approx(first[0][1], rel=1e-6)] * 7


def shares(group: Group) -> list[list[int]]:
    _, _, loader, _ = zs_engine.initialize(
        model=net(), mesh=group, training_data=torch.arange(16), config=CONFIG | {"train_batch_size": 16}
    )
    return [[int(item) for batch in loader for item in batch] for _ in range(2)]


def test_ranks_share_each_epoch() -> None:
    first, second = run_ranks(shares, 2)
    assert sorted(first[0] + second[0]) == sorted(first[1] + second[1]) == list(range(16))
    assert first[0] != first[1]


# -- one rank's mistake is every rank's error -------------------------------------------------------------------------


def failures(result: RunResult) -> list[tuple[str, str]]:
    assert all(outcome.kind == "raised" and outcome.seconds < 15 for outcome in result.outcomes), result
    return [(outcome.error_type, outcome.text) for outcome in result.outcomes]


def odd_config(group: Group, odd: dict[str, Any]) -> None:
    engine_of(group, **(odd if group.rank == 1 else {}))


def test_a_bad_key_on_one_rank() -> None:
    first, second = failures(run_ranks(odd_config, 2, {"sheduler": {}}, expect_exit=True))
    assert second == ("ConfigError", "sheduler: unknown key; did you mean 'scheduler'?")
    assert first[0] == "RankDisagreement" and "rank 1" in first[1] and "sheduler: unknown key" in first[1]


def test_different_configurations() -> None:
    found = failures(run_ranks(odd_config, 2, {"gradient_clipping": 0.2}, expect_exit=True))
    for kind, text in found:
        assert kind == "RankDisagreement" and "the configuration" in text and "0.2" in text


def bad_config(group: Group, config: dict[str, Any]) -> None:
    zs_engine.initialize(model=net(), mesh=group, config=config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (CONFIG | {"train_batch_size": 7}, "train_batch_size(7) != train_micro_batch_size_per_gpu(1) * "),
        (CONFIG | {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both true: choose one"),
    ],
)
def test_a_bad_configuration_on_all_ranks(config: dict[str, Any], text: str) -> None:
    for kind, message in failures(run_ranks(bad_config, 2, config, expect_exit=True)):
        assert kind == "ConfigError" and text in message


def odd_model(group: Group) -> None:
    model = net() if group.rank == 0 else nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 3))
    zs_engine.initialize(model=model, mesh=group, config=CONFIG)


def test_different_models() -> None:
    assert [kind for kind, _ in failures(run_ranks(odd_model, 2, expect_exit=True))] == ["RankDisagreement"] * 2


class Failing(nn.Module):
    """Raises in its forward or its backward when told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.fails = ""

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.body(batch)
        if self.fails == "forward":
            raise ValueError("broken forward")
        if self.fails == "backward":
            hidden.register_hook(self._raise)
        out: Tensor = self.head(hidden)
        return out

    def _raise(self, gradient: Tensor) -> None:
        raise ValueError("broken backward")


def fails_on_rank_1(group: Group, where: str) -> float:
    engine = zs_engine.initialize(model=Failing(), mesh=group, config=CONFIG | {"zero_optimization": {"stage": 3}})[0]
    train(engine, micro_batches(group.rank, 2, 4))
    started = time.monotonic()
    if group.rank == 1:
        engine.module.fails = where
    if group.rank == 1 and where == "device":
        engine(torch.ones(2, 6, device="meta"))
    if group.rank == 1 and where == "step":
        engine.lr_scheduler = object()
    train(engine, micro_batches(group.rank, 2, 4))
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("where", "kind", "text"),
    [
        ("forward", "ValueError", "broken forward"),
        ("backward", "ValueError", "broken backward"),
        ("step", "AttributeError", "no attribute 'step'"),
        ("device", "ConfigError", "argument batch of forward is on meta, and the model on cpu"),
    ],
)
def test_an_exception_on_one_rank_ends_the_other(where: str, kind: str, text: str) -> None:
    first, second = failures(run_ranks(fails_on_rank_1, 2, where, expect_exit=True))
    assert second[0] == kind and text in second[1]
    assert first[0] in ("PeerLost", "CommTimeout", "RankDisagreement")


def dies(group: Group) -> None:
    import os

    engine = engine_of(group, zero_optimization={"stage": 2})
    train(engine, micro_batches(group.rank, 2, 2))
    if group.rank == 1:
        os._exit(9)
    train(engine, micro_batches(group.rank, 2, 4))


def test_a_rank_that_dies() -> None:
    first, second = run_ranks(dies, 2, expect_exit=True).outcomes
    assert first.error_type == "PeerLost" and first.seconds < 15
    assert (second.kind, second.exit_code) == ("died", 9)
