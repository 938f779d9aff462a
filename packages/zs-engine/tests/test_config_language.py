"""How a configuration may be given, old names, contradictions between sections, and keys that nobody knows."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
from torch import nn
from zs_comm import ConfigError
from zs_comm.config import dotted
from zs_comm.keys import verdicts
from zs_engine.config import EngineConfig, examine, language, load

MICRO = {"train_micro_batch_size_per_gpu": 1}


def problems(config: Any) -> list[str]:
    return [str(problem) for problem in examine(config)[2]]


def verdict(config: dict[str, Any], name: str) -> tuple[str, str]:
    rows = {dotted(row.path): row for row in verdicts(language(), config, examine(config)[2])}
    return rows[name].verdict, rows[name].text


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [base64.urlsafe_b64encode, base64.b64encode])
def test_base64(encode: Any) -> None:
    if encode is base64.b64encode:
        assert load(encode(json.dumps(MICRO).encode()).decode())[1] == (1, 1, 1)
        return
    text = '{"train_batch_size": 6, // \u00ff\u00fe??\n "scheduler": {"type": "WarmupLR>>>"}}'
    with pytest.raises(ConfigError, match=r"<base64>:2:24: scheduler.type: unknown scheduler 'WarmupLR>>>'"):
        load(encode(text.encode()).decode())


def test_a_path_or_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 6, /* samples */ }')
    assert load(file)[1] == load(str(file))[1] == load({"train_batch_size": 6})[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 6}', "the configuration is JSON text: give the file's path, or json.loads"),
        ("", "the configuration is an empty string"),
        ("nowhere.json", "cannot read the configuration 'nowhere.json'"),
        ("aGVsbG8gd29ybGQ=", "cannot read the configuration 'aGVsbG8gd29ybGQ='"),  # base64 of something else
    ],
)
def test_a_string_that_is_none_of_them(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(text)
    assert str(raised.value).startswith(message)


def test_an_unknown_key_is_found_whatever_its_value() -> None:
    for value in ("auto", None, False, {}, []):
        for config in ({"bf16": {"enabel": value}}, {"nonsens": value}, {"zero_optimization": {"stge": value}}):
            (found,) = problems(config)
            assert "unknown key" in found
    params = {"lr": "auto", "wieght_decay": "auto"}
    assert problems({"optimizer": {"type": "AdamW", "params": params}}) == [
        "optimizer.params.wieght_decay: AdamW takes no such parameter; did you mean 'weight_decay'?"
    ]


def test_a_value_beside_an_auto_is_judged_too() -> None:
    params = {"total_num_steps": "auto", "warmup_max_lr": "auto", "warmup_type": "cosine"}
    (found,) = problems({"scheduler": {"type": "WarmupDecayLR", "params": params}})
    assert found.startswith("scheduler.params.warmup_type: WarmupDecayLR: must be 'log' or 'linear' (got 'cosine')")


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_are_finite(number: float) -> None:
    for config in ({"gradient_clipping": number}, {"fp16": {"loss_scale": number}}, {"train_batch_size": number}):
        assert len(problems(config)) == 1
    with pytest.raises(ConfigError, match=r"<base64>:1:21: a number that is too large"):
        load(base64.urlsafe_b64encode(b'{"train_batch_size":' + b"9" * 5000 + b"}").decode())
    with pytest.raises(ConfigError, match=r"<base64>:1:22: a number that is too large, found '1e400}'"):
        load(base64.urlsafe_b64encode(b'{"gradient_clipping":1e400}').decode())


# -- unknown keys -----------------------------------------------------------------------------------------------------

STRAY = {**MICRO, "cuda_visible_devices": "0", "zero_optimization": {"stage": 2, "stagee": 3, "overlap_comm": True}}


def test_unknown_keys_may_be_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="2 problems:"):
        load(STRAY)
    with caplog.at_level(logging.WARNING, "zs_engine"):
        parsed = load(STRAY, unknown_keys="warn")[0]
    assert parsed.zero_optimization.stage == 2  # what stands beside a stray key is not lost with it
    assert sorted(caplog.messages) == [
        "ignored: cuda_visible_devices: unknown key",
        "ignored: zero_optimization.stagee: unknown key; did you mean 'stage'?",
    ]


def test_an_unknown_parameter_is_dropped_and_what_stands_beside_it_judged(caplog: pytest.LogCaptureFixture) -> None:
    optimizer: dict[str, Any] = {"type": "AdamW", "params": {"lr": 0.5, "lrr": 2}}
    config = {**MICRO, "optimizer": optimizer, "scheduler": {"type": "WarmupLR", "params": {"warmup": 2}}}
    with caplog.at_level(logging.WARNING, "zs_engine"):
        engine = zs_engine.initialize(model=nn.Linear(2, 2), config=config, unknown_keys="warn")[0]
    assert engine.optimizer.param_groups[0]["betas"] == (0.9, 0.999) and engine.lr_scheduler.warmup_max_lr == [0.5]
    assert [line.split(":")[1].strip() for line in caplog.messages] == [
        "optimizer.params.lrr", "scheduler.params.warmup"
    ]  # fmt: skip
    optimizer["params"]["lr"] = -1
    with pytest.raises(ConfigError, match=r"^optimizer\.params\.lr: "):
        load(config, unknown_keys="warn")
    config["optimizer"] = {"type": "AdamW"}
    with pytest.raises(ConfigError, match=r"^optimizer\.params: AdamW: optimizer got an empty parameter list"):
        zs_engine.initialize(model=nn.Linear(2, 2), model_parameters=[], config=config, unknown_keys="warn")


def test_a_wrong_value_is_an_error_all_the_same() -> None:
    with pytest.raises(ConfigError) as raised:
        load({**STRAY, "zero_optimization": {"stage": 7}}, unknown_keys="warn")
    assert str(raised.value) == "zero_optimization.stage: Input should be 0, 1, 2 or 3 (got 7)"
    with pytest.raises(ConfigError, match="unknown_keys should be 'error' or 'warn'"):
        load(MICRO, unknown_keys="ignore")


def test_initialize_takes_unknown_keys() -> None:
    make = {"model": nn.Linear(2, 2), "config": STRAY, "optimizer": lambda p: torch.optim.AdamW(p)}
    with pytest.raises(ConfigError, match="cuda_visible_devices: unknown key"):
        zs_engine.initialize(**make)
    engine = zs_engine.initialize(**make, unknown_keys="warn")[0]
    assert engine.zero_optimization_stage() == 2


def test_a_key_in_the_wrong_place_is_told_where_it_belongs() -> None:
    assert problems({"reduce_scatter": True}) == ["reduce_scatter: unknown key; it belongs in 'zero_optimization'"]
    assert problems({"bf16": {"loss_scale_window": 3}}) == ["bf16.loss_scale_window: unknown key; it belongs in 'fp16'"]
    for name in [key for key in EngineConfig.model_fields if key.startswith("zs_")]:
        assert problems({"bf16": {name: 1}}) == [f"bf16.{name}: unknown key; it belongs at the top level"]


# -- old names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "stage"), [(True, 1), (False, 0)])
def test_zero_optimization_was_once_a_switch(old: bool, stage: int) -> None:
    assert load({**MICRO, "zero_optimization": old})[0].zero_optimization.stage == stage
    assert verdict({"zero_optimization": old}, "zero_optimization")[0] == "equivalent"


def test_old_names_are_accepted_with_a_note() -> None:
    zero = {"find_unused_parameters": True, "stage3_gather_fp16_weights_on_model_save": True, "cpu_offload": False}
    assert problems({"zero_optimization": zero, "bfloat16": {"enabled": True}}) == []
    found, text = verdict({"zero_optimization": zero}, "zero_optimization.find_unused_parameters")
    assert found == "equivalent" and "old name" in text
    assert load({**MICRO, "bfloat16": {"enabled": True}})[0].bfloat16.enabled
    found, text = verdict({"bfloat16": {"enabled": True}}, "bfloat16.enabled")
    assert found == "equivalent" and text.startswith("bfloat16 is another name of 'bf16'; ")
    assert verdict({"bf16": {"enabled": True}}, "bf16.enabled")[0] == "honoured"
    for name in ("cpu_offload", "cpu_offload_param", "cpu_offload_params"):
        assert problems({"zero_optimization": {"stage": 3, name: True}}) == []
        found, text = verdict({"zero_optimization": {"stage": 3, name: True}}, f"zero_optimization.{name}")
        assert found == "equivalent" and text.endswith(".device: 'cpu'")


def test_the_two_names_of_a_key_contradict_each_other() -> None:
    assert problems({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}) == [
        "bfloat16: is the same key as 'bf16', which is given too"
    ]
    assert problems({"zero_optimization": {"stage3_max_live_parameters": 1, "max_live_parameters": 1}}) == [
        "zero_optimization.max_live_parameters: is the same key as 'stage3_max_live_parameters', which is given too"
    ]


# -- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "path", "names"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled", ("fp16.enabled", "bf16.enabled")),
        ({"amp": {"enabled": True}, "fp16": {"enabled": True}}, "amp.enabled", ("amp.enabled", "fp16.enabled")),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads",
            ("zero_optimization.stage",),
        ),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}, "zero_optimization": {"stage": 2}},
            "bf16.bf16_optimizer_states",
            ("bf16.bf16_master_weights_and_grads",),
        ),
        (
            {"sparse_gradients": True, "zero_optimization": {"stage": 3}},
            "sparse_gradients",
            ("zero_optimization.stage",),
        ),
        (
            {"data_types": {"param_dtype": "fp16"}, "bf16": {"enabled": True}},
            "data_types.param_dtype",
            ("data_types.param_dtype", "fp16.enabled", "bf16.enabled"),
        ),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            "train_batch_size",
            ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        ),
    ],
)
def test_a_contradiction_names_both_sides(config: dict[str, Any], path: str, names: tuple[str, ...]) -> None:
    found = examine(config, world=1 if "train_batch_size" in config else None)[2]
    (text,) = [one.text for one in found if dotted(one.path) == path and one.kind == "invalid"]
    assert all(name in text for name in names)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_what_is_accepted_without_being_there_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    quiet = {"tensorboard": {"enabled": False}, "flops_profiler": {"enabled": False}, "gradient_clipping": 1.0}
    with caplog.at_level(logging.WARNING, "zs_engine"):
        load({**MICRO, **quiet})
        assert caplog.messages == []
        load({**MICRO, "flops_profiler": {"enabled": True, "profile_step": 3}, "wandb": {"enabled": True}})
    first, second = caplog.messages
    assert first.startswith("flops_profiler.enabled: no profile is printed")
    assert second.startswith("wandb.enabled: the scalars go to the observers")


def test_log_level(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("zs_engine")
    before = logger.level
    try:
        load({**MICRO, "log_level": "error"})
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)
    assert problems({"log_level": "loud"})[0].startswith("log_level: Input should be 'debug', 'info'")
