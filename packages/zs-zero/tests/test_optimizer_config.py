"""The section `optimizer`: DeepSpeed's types and parameters, what each makes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zs_comm import ConfigError
from zs_comm.config import validate
from zs_zero import optimizers
from zs_zero.config import OptimizerConfig


def net() -> nn.ModuleDict:
    return nn.ModuleDict({"embed": nn.Embedding(3, 4), "body": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


def make(name: str, **params: Any) -> torch.optim.Optimizer:
    section, model = validate(OptimizerConfig, {"type": name, "params": params}), net()
    section.prepare(model)
    factory = section.factory()
    assert factory is not None
    return factory(list(model.parameters()))


def refused(name: str, **params: Any) -> list[tuple[str, str, str]]:
    """(path, text, kind) of each problem."""
    section = validate(OptimizerConfig, {"type": name, "params": params})
    found = section.problems(lambda: [{"params": [torch.zeros(1, requires_grad=True)]}])
    return [(".".join(map(str, one.path)), one.text, one.kind) for one in found]


@pytest.mark.parametrize("name", ["Lamb", "LAMB", "lamb"])
def test_lamb(name: str) -> None:
    made = make(name, lr=0.002, weight_decay=0.01, bias_correction=False, max_coeff=0.3, min_coeff=0.01)
    assert type(made) is optimizers.Lamb
    assert {key: made.defaults[key] for key in ("lr", "bias_correction", "max_coeff", "min_coeff")} == {
        "lr": 0.002, "bias_correction": False, "max_coeff": 0.3, "min_coeff": 0.01
    }  # fmt: skip
    assert make(name).defaults == {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True,
        "max_coeff": 10.0, "min_coeff": 0.01, "eps_inside_sqrt": False, "correct_step_size": True,
    }  # fmt: skip
    ((path, text, _),) = refused(name, amsgrad=True)
    assert path == "params.amsgrad" and text.startswith(f"{name}: LAMB has no AMSGrad variant")


def test_lion() -> None:
    made = make("LION", set_grad_none=True, lr=2e-6, betas=[0.9, 0.99])
    assert type(made) is optimizers.Lion
    assert made.defaults == {"lr": 2e-6, "betas": (0.9, 0.99), "weight_decay": 0.0}
    assert make("Lion").defaults == {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
    assert refused("Lion", use_triton=True) == [("params.use_triton", "Lion takes no such parameter", "unknown")]


def test_muon_splits_by_names_and_shapes() -> None:
    made = make("Muon", lr=0.01, momentum=0.9, weight_decay=0.1, betas=[0.8, 0.9], eps=1e-6)
    muon, adam = made.param_groups
    assert [tuple(param.shape) for param in muon["params"]] == [(4, 4)] and len(adam["params"]) == 4
    assert (muon["lr"], muon["momentum"], muon["weight_decay"], muon["ns_method"]) == (0.01, 0.9, 0.1, "gram")
    assert (adam["lr"], adam["betas"], adam["eps"], adam["weight_decay"]) == (0.01, (0.8, 0.9), 1e-6, 0.1)
    assert [group["lr"] for group in make("muon", lr=0.1, muon_lr=0.2, adam_lr=0.3).param_groups] == [0.2, 0.3]
    assert [group["lr"] for group in make("muon").param_groups] == [0.02, 3e-4]
    assert make("muon", adam_w_mode=False, ns_method="standard").param_groups[1]["decoupled"] is False
    ((path, text, kind),) = refused("Muon", per_head_muon=True)
    assert (path, kind) == ("params.per_head_muon", "refused") and "not there yet" in text
    ((path, text, kind),) = refused("Muon", ns_method="newton")
    assert path == "params.ns_method" and "one of standard, gram" in text


@pytest.mark.parametrize("name", ["OneBitAdam", "OnebitLamb", "ZeroOneAdam", "MuAdam", "MuAdamW", "MuSGD"])
def test_types_that_are_refused_by_name(name: str) -> None:
    ((path, text, kind),) = refused(name, lr=0.1, freeze_step=400)
    assert (path, kind) == ("type", "refused") and text.startswith(name)


def test_all_problems_together() -> None:
    found = refused("AdamW", max_grad_norm=1.0, lrr=0.1, fp32_optimizer_states=False, betas=[0.9])
    assert [(path, kind) for path, _, kind in found] == [
        ("params.max_grad_norm", "invalid"),
        ("params.fp32_optimizer_states", "refused"),
        ("params.lrr", "unknown"),
        ("params.betas", "invalid"),
    ]
    assert "did you mean 'lr'" in found[2][1]
    assert refused("Lmb")[0][1] == "unknown optimizer 'Lmb'; did you mean 'Lamb'?"
    assert refused("CPUAdam")[0][1] == "unknown optimizer 'CPUAdam'; did you mean 'Adam'?"
    ((path, text, _),) = refused("Adam", torch_adam=True, adam_w_mode="yes")
    assert path == "params.adam_w_mode" and "true or false" in text


def test_adam_of_torch_and_without_bias_correction() -> None:
    assert type(make("Adam", torch_adam=True, adam_w_mode=False, maximize=True)) is torch.optim.Adam
    assert make("AdamW", torch_adam=True, fp32_optimizer_states=True).defaults["weight_decay"] == 0.01
    made = make("AdamW", bias_correction=False, adam_w_mode=False, weight_decay=0.1)
    assert type(made) is optimizers.Adam
    assert (made.defaults["decoupled"], made.defaults["bias_correction"]) == (True, False)
    assert make("Adam", bias_correction=False, adam_w_mode=False).defaults["decoupled"] is False
    assert make("Adam", amsgrad=True).defaults["amsgrad"] is True
    with pytest.raises(ConfigError, match="amsgrad needs bias_correction"):
        make("Adam", amsgrad=True, bias_correction=False)


@pytest.mark.parametrize(
    "name", ["SGD", "sgd", "rmsProp", "RMSprop", "Adagrad", "ADAGRAD", "NAdam", "Adafactor", "Adadelta"]
)
def test_others_are_torchs(name: str) -> None:
    assert type(make(name, lr=0.5)).__module__.startswith("torch.optim")


def test_legacy_fusion_says_nothing() -> None:
    assert validate(OptimizerConfig, {"type": "Adam", "legacy_fusion": True}).factory() is not None
