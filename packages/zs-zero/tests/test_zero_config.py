"""The sections `zero_optimization`, `bf16` and `optimizer`, without an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic.fields import FieldInfo
from torch import nn
from zs_comm import ConfigError
from zs_comm.config import validate
from zs_comm.keys import Later, Note
from zs_zero import shard
from zs_zero.config import Bf16Config, OffloadOptimizerConfig, OffloadParamConfig, OptimizerConfig, ZeroConfig


def zero(**keys: Any) -> ZeroConfig:
    return validate(ZeroConfig, keys, path="zero_optimization")


def test_options_are_shards_keywords() -> None:
    model = nn.Linear(4, 4)
    sections = zero(stage=2), validate(Bf16Config, {"enabled": True})
    optimizer = shard(model, torch.optim.SGD(model.parameters()), **sections[0].options(), **sections[1].options())
    assert optimizer.stage == 2 and model.weight.dtype == torch.bfloat16
    assert Bf16Config().options() == {}
    assert ZeroConfig().options() == {"stage": 0, "prefetch": True}


@pytest.mark.parametrize("name", ["stage3_prefetch_bucket_size", "prefetch_bucket_size"])
def test_prefetch_bucket_size_zero_turns_prefetch_off(name: str) -> None:
    assert zero(stage=3, **{name: 0}).options()["prefetch"] is False
    assert zero(stage=3, **{name: 5e8}).options()["prefetch"] is True
    assert zero(stage=3, **{name: "auto"}) == zero(stage=3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_stage_shards(stage: int) -> None:
    section = zero(stage=stage)
    assert [section.shards_states, section.shards_gradients, section.shards_parameters] == [
        stage >= n for n in (1, 2, 3)
    ]


def test_a_published_stage_3_section() -> None:
    section = zero(
        stage=3,
        offload_optimizer={"device": "none", "pin_memory": True},
        offload_param={"device": None},
        overlap_comm=True,
        contiguous_gradients=True,
        sub_group_size=1e9,
        reduce_bucket_size="auto",
        stage3_param_persistence_threshold="auto",
        stage3_max_live_parameters=1e9,
        stage3_gather_16bit_weights_on_model_save=True,
        zero_hpz_partition_size=1,
        zero_quantized_weights=False,
        mics_shard_size=-1,
    )
    assert section.gather_16bit_weights_on_model_save and section.sub_group_size == 1_000_000_000


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"stage": 4}, "zero_optimization.stage: Input should be 0, 1, 2 or 3 (got 4)"),
        ({"stage": True}, "zero_optimization.stage: Input should be 0, 1, 2 or 3 (got true)"),
        ({"overlap_com": True}, "zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?"),
        ({"reduce_bucket_size": -1}, "greater than or equal to 0"),
        ({"offload_param": {"device": "disk"}}, "offload_param.device: Input should be 'none', 'cpu' or 'nvme'"),
        ({"offload_optimizer": {"buffer_count": 0}}, "buffer_count: Input should be greater than or equal to 1"),
        ({"offload_optimizer": {"pin_memry": 1}}, "unknown key; did you mean 'pin_memory'?"),
        ({"cpu_offload": 1}, "zero_optimization.cpu_offload: Input should be true or false (got 1)"),
        ({"zero_hpz_partition_size": 8}, "zero_hpz_partition_size: ZeRO++ is not there yet (got 8)"),
        ({"zero_quantized_gradients": True}, "ZeRO++ is not there yet"),
        ({"ignore_unused_parameters": False}, "there is no mode that raises (got false)"),
        ({"zenflow": {"topk_ratio": 0.1}}, "ZenFlow is not there yet"),
        ({"leaf_module": {"classes": ["Experts"]}}, "name the units by zs_zero.shard(units=...)"),
    ],
)
def test_refused(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        zero(**keys)
    assert text in str(raised.value)


def marks(info: FieldInfo) -> list[Any]:
    return [mark for mark in info.metadata if isinstance(mark, Note | Later)]


SECTIONS = (ZeroConfig, Bf16Config, OffloadParamConfig, OffloadOptimizerConfig, OptimizerConfig)


@pytest.mark.parametrize("section", SECTIONS)
def test_defaults_ask_for_nothing(section: type[Any]) -> None:
    made = section()
    for name, info in section.model_fields.items():
        for mark in marks(info):
            if isinstance(mark, Later):
                value = getattr(made, name)
                assert validate(section, {name: value}) == made
                assert value == mark.default


def test_the_only_keys_without_a_note() -> None:
    bare = {name for name, info in ZeroConfig.model_fields.items() if not marks(info)}
    assert bare == {"stage", "sub_group_size", "offload_param", "offload_optimizer"}  # the last two hold sections


def test_optimizer_alone() -> None:
    section = validate(OptimizerConfig, {"type": "Adam", "params": {"lr": 0.5, "betas": [0.9, 0.95]}})
    factory = section.factory()
    assert factory is not None
    made = factory([torch.zeros(1, requires_grad=True)])
    assert type(made) is torch.optim.AdamW
    assert (made.defaults["lr"], made.defaults["betas"], made.defaults["weight_decay"]) == (0.5, (0.9, 0.95), 0.0)
    assert validate(OptimizerConfig, {"type": None}).factory() is None
    with pytest.raises(ConfigError, match="empty parameter list"):
        factory([])
