"""The configuration language: every key accepted with a reason, or refused by name; all problems at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero.optimizers
from hypothesis import given
from hypothesis import strategies as st
from zs_comm import ConfigError
from zs_comm.config import dotted
from zs_comm.jsonfile import parse_json
from zs_comm.keys import verdicts
from zs_engine.config import EngineConfig, examine, language, load
from zs_zero.batch import BatchSizes

EQUATION = "train_batch_size(32) != train_micro_batch_size_per_gpu(4) * gradient_accumulation_steps(3) * "
EQUATION += "data parallel world(2) = 24"
MICRO = {"train_micro_batch_size_per_gpu": 1}


def problems(config: Any, *, world: int | None = None) -> list[str]:
    return [str(problem) for problem in examine(config, world=world)[2]]


# -- batch sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "micro", "steps", "expected"),
    [
        (24, 4, 3, (24, 4, 3)),
        (24, 4, None, (24, 4, 3)),
        (24, None, 3, (24, 4, 3)),
        (None, 4, 3, (24, 4, 3)),
        (24, None, None, (24, 12, 1)),
        (None, 4, None, (8, 4, 1)),
    ],
)
def test_batch_sizes(train: int | None, micro: int | None, steps: int | None, expected: tuple[int, int, int]) -> None:
    assert BatchSizes.solve(train, micro, steps, 2) == expected


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (
            (32, 4, 3),
            EQUATION,
        ),
        ((30, 4, None), "train_batch_size(30) != train_micro_batch_size_per_gpu(4) * gradient_accumulation_steps(3)"),
        ((9, None, None), "train_batch_size(9) != train_micro_batch_size_per_gpu(4) * gradient_accumulation_steps(1)"),
        ((1, None, None), "train_batch_size(1) != train_micro_batch_size_per_gpu(1)"),
        ((None, None, 4), "give train_batch_size or train_micro_batch_size_per_gpu"),
    ],
)
def test_impossible_batch_sizes(sizes: tuple[int | None, int | None, int | None], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        BatchSizes.solve(*sizes, 2)
    assert text in str(raised.value)


@given(micro=st.integers(1, 64), steps=st.integers(1, 64), world=st.integers(1, 64))
def test_any_two_sizes_give_the_third(micro: int, steps: int, world: int) -> None:
    whole = BatchSizes(micro * steps * world, micro, steps)
    assert BatchSizes.solve(whole.train, micro, None, world) == whole
    assert BatchSizes.solve(whole.train, None, steps, world) == whole
    assert BatchSizes.solve(None, micro, steps, world) == whole


def test_batch_sizes_of_a_configuration() -> None:
    assert load({"train_batch_size": 8}, world=2)[1] == (8, 4, 1)
    assert load({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, world=2)[1] == (2, 1, 1)
    assert problems({"train_batch_size": 8}, world=None) == []
    assert problems({}, world=1) == [
        "train_batch_size: give train_batch_size or train_micro_batch_size_per_gpu (or both)"
    ]
    # a size that is no number is one problem, not two
    assert problems({"train_batch_size": "many"}, world=1) == [
        'train_batch_size: Input should be a whole number (got "many")'
    ]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean 'zero_optimization'?"),
        ({"sheduler": {}}, "sheduler: unknown key; did you mean 'scheduler'?"),
        ({"flop_profiler": {}}, "flop_profiler: unknown key; did you mean 'flops_profiler'?"),
        ({"reduce_bucket_size": 1}, "reduce_bucket_size: unknown key; it belongs in 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: Input should be 0, 1, 2 or 3 (got 4)"),
        ({"zero_optimization": 3}, "zero_optimization: Input should be an object (got 3)"),
        ({"train_batch_size": 0}, "train_batch_size: Input should be greater than or equal to 1 (got 0)"),
        ({"gradient_clipping": True}, "gradient_clipping: Input should be a number (got true)"),
        ({"communication_data_type": "int8"}, "communication_data_type: Input should be 'fp32', 'bf16' or 'fp16'"),
        (
            {"amp": {"enabled": True}},
            "amp.enabled: apex amp is not supported; use bf16, fp16 or torch_autocast (got true)",
        ),
        ({"fp16": {"enabled": "true"}}, 'fp16.enabled: Input should be true or false (got "true")'),
        ({"fp16": {"loss_scael": 0}}, "fp16.loss_scael: unknown key; did you mean 'loss_scale'?"),
        ({"graph_harvesting": True}, "graph_harvesting: CUDA graphs are not there yet (got true)"),
        ({"steps_per_print": {"a": 1}}, "steps_per_print: Input should be a whole number or a number"),
        (
            {"gradient_allreduce_op": "sum"},
            'gradient_allreduce_op: gradients are averaged; sums are not there yet (got "sum")',
        ),
        ({"aio": {"block_size": "1 MB?"}}, "aio.block_size: Input should be a number of bytes, or a string such as"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention.mode: sparse attention is not supported"),
        (
            {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
            "compression_training.weight_quantization.shared_parameters.enabled: compression is not there yet",
        ),
        ({"optimizer": {"type": "AdamV"}}, "optimizer.type: unknown optimizer 'AdamV'; did you mean 'Adam'?"),
        ({"optimizer": {"type": "OneBitLamb"}}, "optimizer.type: OneBitLamb: the 1-bit optimizers come with the compr"),
        (
            {"optimizer": {"type": "MuAdam"}},
            "optimizer.type: MuAdam: the widths that it scales by are known to the mup",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
            "optimizer.params.max_grad_norm: the optimizer does not clip; use the key gradient_clipping",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"momentun": 0.9}}},
            "optimizer.params.momentun: SGD takes no such parameter; did you mean 'momentum'?",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"lr": -1}}},
            "optimizer.params.lr: SGD: Invalid learning rate: -1 (got -1)",
        ),
        (
            {"optimizer": {"type": "LBFGS"}},
            "optimizer.type: LBFGS: its step() needs a closure that evaluates the model again",
        ),
        ({"optimizer": {"type": "SparseAdam"}}, "optimizer.type: SparseAdam: it takes sparse gradients only"),
        (
            {"scheduler": {"type": "ReduceLROnPlateau"}},
            "scheduler.type: ReduceLROnPlateau: its step() needs a metric, and the engine steps a schedule without",
        ),
        ({"scheduler": {"type": "LambdaLR"}}, "scheduler.type: LambdaLR: its argument is a function"),
        ({"scheduler": {"type": "MultiplicativeLR"}}, "scheduler.type: MultiplicativeLR: its argument is a function"),
        ({"scheduler": {"type": "SequentialLR"}}, "scheduler.type: SequentialLR: its argument is a list of schedules"),
        ({"scheduler": {"type": "ChainedScheduler"}}, "scheduler.type: ChainedScheduler: its argument is a list of"),
        ({1: 2}, "[1]: a key should be a string (got 1)"),
        ({None: 2}, "None: a key should be a string (got None)"),
        ({"fp16": {1: 2}}, "fp16[1]: a key should be a string (got 1)"),
        ({"train_batch_size": 10**400}, "train_batch_size: Input should be a number below 1.8e308"),
        ({"train_batch_size": 2**63}, "train_batch_size: Input should be a whole number below 2**63"),
        ({"train_batch_size": 1e300}, "train_batch_size: Input should be a whole number below 2**63"),
        (
            {"aio": {"block_size": "99999999999TiB"}},
            "aio.block_size: Input should be a number of bytes below 2**63",
        ),
        ({"fp16": {"enabled": True, "min_loss_scale": 10**400}}, "fp16.min_loss_scale: Input should be a number below"),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {}}},
            "scheduler.params.total_num_steps: WarmupDecayLR requires it",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}},
            "scheduler.params.warmup_type: WarmupLR: must be 'log' or 'linear' (got 'cosine')",
        ),
        ({"scheduler": {"type": "WarmUpLR"}}, "scheduler.type: unknown scheduler 'WarmUpLR'; did you mean 'WarmupLR'?"),
    ],
)
def test_refused(config: dict[str, Any], expected: str) -> None:
    (found,) = problems(config)
    assert found.startswith(expected)


def test_fp16_and_bf16_are_one_problem_that_names_both() -> None:
    for name in ("bf16", "bfloat16"):
        assert problems({"fp16": {"enabled": True}, name: {"enabled": True}}) == [
            f"fp16.enabled: fp16.enabled and {name}.enabled are both true: choose one"
        ]


def test_values_for_each_group() -> None:
    lists = {"type": "WarmupLR", "params": {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [1.0, 2.0]}}
    assert problems({"optimizer": {"type": "AdamW"}, "scheduler": lists}) == []
    assert problems({"scheduler": {"type": "MultiStepLR", "params": {"milestones": []}}}) == []


def test_no_object() -> None:
    assert problems([1]) == ["the configuration should be an object (got [1])"]
    for root in ([], 3, False):
        with pytest.raises(ConfigError, match="the configuration should be an object"):
            load(root)  # type: ignore[arg-type]


def test_everything_wrong_is_said_at_once_with_lines(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        """{
          "train_batch_size": 32,  // samples
          "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3,
          "fp16": {"enabled": "no"},
          "zero_optimization": {"stage": 4, "overlap_com": true},
          "optimizer": {"type": "AdamV"},
        }"""
    )
    with pytest.raises(ConfigError) as raised:
        load(file, world=2)
    title, *lines = [line.strip().removeprefix(str(file)) for line in str(raised.value).splitlines()]
    assert title == f"5 problems in {file}:" and len(raised.value.problems) == 5
    assert [line.split(": ")[1] for line in lines] == [
        "train_batch_size",
        "fp16.enabled",
        "zero_optimization.stage",
        "zero_optimization.overlap_com",
        "optimizer.type",
    ]
    assert [line.split(": ")[0] for line in lines] == [":2:31", ":4:31", ":5:42", ":5:45", ":6:33"]


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean 'ds_config.json'"):
        load(tmp_path / "ds_confg.json")


# -- what passes ------------------------------------------------------------------------------------------------------


def test_null_and_auto_mean_the_default() -> None:
    nothing = dict.fromkeys(EngineConfig.model_fields, "auto")
    assert examine(nothing)[0] == examine(dict.fromkeys(nothing))[0] == language()()
    assert examine({"zero_optimization": {"reduce_bucket_size": "auto", "stage": None}})[0] == language()()


def test_an_auto_that_is_required_may_still_be_filled_in() -> None:
    config = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}}}
    assert problems(config) == []


def test_notes_are_said(caplog: pytest.LogCaptureFixture) -> None:
    config = MICRO | {"zero_optimization": {"stage": 1, "overlap_comm": True, "round_robin_gradients": True}}
    with caplog.at_level(logging.INFO, "zs_engine"):
        load(config)
    (notes, clipping) = caplog.messages
    assert "zero_optimization.overlap_comm (equivalent), zero_optimization.round_robin_gradients (harmless)" in notes
    assert "nothing is clipped; DeepSpeed 0.19 would clip at 1.0" in clipping
    caplog.clear()
    with caplog.at_level(logging.INFO, "zs_engine"):
        load(MICRO | {"gradient_clipping": 0})
    assert caplog.messages == []


def test_adam_is_adamw_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for params, lines in (({}, 1), ({"adam_w_mode": True}, 1), ({"adam_w_mode": False}, 0)):
        caplog.clear()
        config = MICRO | {"gradient_clipping": 1.0, "optimizer": {"type": "Adam", "params": params}}
        with caplog.at_level(logging.INFO):
            load(config)[0].optimizer.factory()
        assert len(caplog.messages) == lines
        assert all("'Adam' is AdamW" in line for line in caplog.messages)


def test_every_key_has_a_verdict() -> None:
    text = """{
      "train_batch_size": 8,
      "fp16": {"enabled": "auto", "loss_scale": 0},
      "zero_optimization": {"stage": 3, "overlap_comm": true, "offload_param": {"device": "none"}, "sub_group_size": 9},
      "steps": 3
    }"""
    data, source = parse_json(text, name="c.json")
    rows = verdicts(language(), data, examine(data, source, world=1)[2], source)
    assert {dotted(row.path): (row.verdict, row.where) for row in rows} == {
        "train_batch_size": ("honoured", "c.json:2:27"),
        "fp16.enabled": ("honoured", "c.json:3:27"),
        "fp16.loss_scale": ("honoured", "c.json:3:49"),
        "zero_optimization.stage": ("honoured", "c.json:4:38"),
        "zero_optimization.overlap_comm": ("equivalent", "c.json:4:57"),
        "zero_optimization.offload_param.device": ("honoured", "c.json:4:91"),
        "zero_optimization.sub_group_size": ("honoured", "c.json:4:118"),
        "steps": ("unknown", "c.json:5:7"),
    }


def test_the_given_configuration_is_not_changed() -> None:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "betas": [0.9, 0.95]}},
    }
    before = json.dumps(config)
    parsed, _, data = load(config)
    parsed.optimizer.factory()
    assert json.dumps(config) == before == json.dumps(data)


# -- optimizers and schedules -----------------------------------------------------------------------------------------


def make(name: str, **params: Any) -> torch.optim.Optimizer:
    factory = examine({"optimizer": {"type": name, "params": params}})[0].optimizer.factory()
    assert factory is not None
    made = factory([torch.zeros(2, requires_grad=True)])
    assert isinstance(made, torch.optim.Optimizer)
    return made


def test_adam_is_adamw_unless_told_otherwise() -> None:
    assert type(make("Adam")) is type(make("adamw")) is type(make("AdamW", adam_w_mode=False)) is torch.optim.AdamW
    assert type(make("Adam", adam_w_mode=False)) is torch.optim.Adam


def test_adam_defaults_are_deepspeeds() -> None:
    assert make("AdamW").defaults["weight_decay"] == 0.0
    assert make("AdamW", weight_decay=0.1).defaults["weight_decay"] == 0.1
    assert make("AdamW", torch_adam=True).defaults["weight_decay"] == 0.01
    assert make("AdamW", betas=[0.8, 0.99]).defaults["betas"] == (0.8, 0.99)
    assert make("AdamW", lr="auto").defaults["lr"] == 1e-3


def test_adam_is_fused_unless_told_otherwise() -> None:
    assert make("AdamW").defaults["fused"] is True
    assert make("AdamW", fused=False).defaults["fused"] is False
    assert make("AdamW", foreach=True).defaults["fused"] is None


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "adagrad", "RMSprop", "NAdam", "Adamax"])
def test_other_torch_optimizers(name: str) -> None:
    assert type(make(name, lr=0.5)).__name__.lower() == name.lower()


def test_adam_without_bias_correction() -> None:
    assert type(make("Adam", bias_correction=False)) is zs_zero.optimizers.Adam
    assert make("AdamW", bias_correction=False, adam_w_mode=False).defaults["decoupled"] is True
    assert make("Adam", bias_correction=False, adam_w_mode=False).defaults["decoupled"] is False
    text = "optimizer.params.bias_correction: AdamW takes no such parameter"
    assert problems({"optimizer": {"type": "Adam", "params": {"bias_correction": False, "torch_adam": True}}}) == [text]


@pytest.mark.parametrize("name", ["Adam", "adamw", "Lion", "Muon"])
def test_states_in_bf16_by_a_parameter_of_the_optimizer_are_refused(name: str) -> None:
    found = examine({"optimizer": {"type": name, "params": {"fp32_optimizer_states": False}}})[2]
    why = "states are fp32: see bf16.bf16_optimizer_states and offload_optimizer.zs_state"
    assert [str(one) for one in found] == [f"optimizer.params.fp32_optimizer_states: {why}"]
    assert found[0].kind == "refused"
    assert problems({"optimizer": {"type": name, "params": {"fp32_optimizer_states": True}}}) == []


def test_torch_schedules() -> None:
    config, _, found = examine({"scheduler": {"type": "MultiStepLR", "params": {"milestones": [3, 5], "gamma": 0.5}}})
    factory = config.scheduler.factory()
    assert found == [] and factory is not None
    assert isinstance(factory(make("SGD")), torch.optim.lr_scheduler.MultiStepLR)


# -- getters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "prefetch"), [(0, False), (5e7, True)])
def test_prefetch(size: float, prefetch: bool) -> None:
    config = examine({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": size}})[0]
    assert config.zero_optimization.options() == {"stage": 3, "prefetch": prefetch}
