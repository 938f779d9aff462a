"""What the optimizer tests share: gradients of every kind of number, states, and their comparison bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from zs_offload_aio import optim

GRADS = (torch.float32, torch.bfloat16, torch.float16)
STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adagrad": ("sum",),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
}
HYPER: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}),
    ("adam", {"lr": 1e-2, "betas": (0.4, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ("adagrad", {"lr": 1e-2, "lr_decay": 0.01, "eps": 1e-10, "weight_decay": 0.1}),
    ("lion", {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    ("sgd", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "nesterov": False}),
]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"lr": 1e-2, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}),
    ("adam", {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
    ("adagrad", {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}),
    ("sgd", {"lr": 1e-2, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.01, "nesterov": True}),
    ("sgd", {"lr": 1e-2, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}),
]


def numbers(seed: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Over sixty orders of magnitude: zeros, denormals, the tiny and the huge of fp32 (as far as `dtype` has them)."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=source) * torch.exp(8 * torch.randn(numel, generator=source))
    values[::17] = 0.0
    values[1::31] = -0.0
    values[5::31] = 1e-41
    values[7::61] = -3e-39
    values[9::97] = 1e-30
    values[11::101] = 3e18
    values[13::1009] = -2e38
    return values.clamp(-60000, 60000).half() if dtype == torch.float16 else values.to(dtype)


def fresh(kind: str, param: Tensor) -> dict[str, Tensor]:
    return {"param": param.clone(), **{name: torch.zeros_like(param) for name in STATES[kind]}}


def step(kind: str, state: dict[str, Tensor], grad: Tensor, *, number: int, **keywords: Any) -> None:
    """`optim.<kind>`, the step's number where that kind takes one."""
    count = {} if kind == "lion" else {"step": number}
    getattr(optim, kind)(state["param"], grad, *(state[name] for name in STATES[kind]), **count, **keywords)


def cut(state: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[begin:end] for name, tensor in state.items()}


def pieces(numel: int, seed: int, most: int = 5) -> Iterator[tuple[int, int]]:
    """[0, numel) in a few random pieces."""
    source = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, numel, (seed % most,), generator=source).tolist()
    borders = sorted({0, numel, *inner})
    return itertools.pairwise(borders)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def differing(a: Tensor, b: Tensor) -> int:
    """Elements with other bits; one NaN is as good as another."""
    return int(((bits(a) != bits(b)) & ~(a.isnan() & b.isnan())).sum())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    for name, tensor in wanted.items():
        differ = differing(found[name], tensor)
        assert differ == 0, f"{what}: {differ} of {tensor.numel()} elements of {name} have other bits"
