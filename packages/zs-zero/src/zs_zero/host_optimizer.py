"""Optimizer steps on flat host memory: the `HostOptimizer` Protocol and its plain implementation.

[Note: One formula]
Every host optimizer obeys one formula, so that no tier, chunk size, thread count or instruction set changes a bit:

    g = fp32(grad) * fp32(factor)              rounded once; unscaling and clipping in one factor
    adam, adamw, adagrad                       torch's fused CPU kernel, operation by operation, on `g`
    sgd                                        torch.optim.SGD (any form of it but the fused one's tail)
    lion                                       Chen et al., "Symbolic discovery of optimization algorithms", 2023:
        p = p * fp32(1 - lr * weight_decay);  u = m * fp32(b1) + g * fp32(1 - b1);  p = p - fp32(lr) * sign(u)
        m = m * fp32(b2) + g * fp32(1 - b2)    every product and every sum rounded once to fp32: no fused multiply-add
    out = cast(p)                              torch's cast: to nearest, ties to even, denormals kept

"operation by operation" means the kernel's vector body, for every element. torch's own last `numel % 16` elements go
through a scalar loop that rounds once more than the body does (it lacks the fused multiply-add), so torch's fused
kernels agree with this formula, and with themselves in other slices, on whole vectors only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

PROTOCOL = 1

STATE: dict[str, tuple[str, ...]] = {
    "adamw": ("param", "exp_avg", "exp_avg_sq"),
    "adam": ("param", "exp_avg", "exp_avg_sq"),
    "sgd": ("param", "momentum_buffer"),
    "adagrad": ("param", "sum"),
    "lion": ("param", "exp_avg"),
}
"""The flat tensors of each kind. `momentum_buffer` may be absent where `momentum` is 0."""

HYPER: dict[str, tuple[str, ...]] = {
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "adam": ("lr", "betas", "eps", "weight_decay"),
    "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr", "lr_decay", "eps", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
}
"""The hyper-parameters of each kind, named as in torch's `param_groups`: all are given, none has a default."""

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)  # of gradients, and of `out`


@runtime_checkable
class HostOptimizer(Protocol):
    """A step of an element-wise optimizer on flat memory, in one pass. What it must do is executable:
    `zs_zero.testing.check_host_optimizer`."""

    PROTOCOL: int  # version of this contract; checked before use

    def step(
        self,
        kind: str,
        state: Mapping[str, Tensor],
        grad: Tensor,
        *,
        hyper: Mapping[str, Any],
        step: int,
        factor: float,
        out: Tensor | None = None,
    ) -> None:
        """Update `state` in place by [Note: One formula].

        `kind`: one of `STATE`. `state`: `{name: (numel,) fp32}`, "param" is the master weight. `grad`:
        `(numel,)` fp32, bf16 or fp16, left as it is. `hyper`: the keys of `HYPER[kind]`. `step`: which step of
        these elements this is, from 1. `factor`: what each gradient is multiplied by. `out`: `(numel,)` fp32,
        bf16 or fp16; receives the new weights. All tensors are contiguous and on the host.

        Raises `ValueError`, before anything changes: an unknown kind, key, dtype, another numel, a `step` below 1.
        """

    def sum_of_squares(self, grad: Tensor) -> tuple[float, bool]:
        """The sum of the squares of `grad` `(numel,)`, and whether every element is finite.

        Squared and summed in fp64: within 1e-12 relative of the exact sum, and no overflow. Where an element is not
        finite the sum is not, either.
        """


class TorchHostOptimizer:
    """The formula by torch's own CPU kernels, in chunks so that the scratch memory stays small."""

    PROTOCOL = PROTOCOL

    def __init__(self, *, chunk_numel: int = 1 << 20) -> None:
        if chunk_numel < _VECTOR or chunk_numel % _VECTOR:
            raise ValueError(f"chunk_numel must be a positive multiple of {_VECTOR}: {chunk_numel}")
        self.chunk_numel = chunk_numel

    def step(
        self,
        kind: str,
        state: Mapping[str, Tensor],
        grad: Tensor,
        *,
        hyper: Mapping[str, Any],
        step: int,
        factor: float,
        out: Tensor | None = None,
    ) -> None:
        """See `HostOptimizer.step`."""
        _check(kind, state, grad, hyper, step, out)
        numel = grad.numel()
        with torch.no_grad():
            for start in range(0, numel, self.chunk_numel):
                end = min(start + self.chunk_numel, numel)
                whole = end - (end - start) % _VECTOR
                _update(kind, _cut(state, start, whole), _scaled(grad[start:whole], factor), hyper, step)
                if whole < end:  # [Note: One formula]: the tail goes through the vector body too
                    rest = _cut(state, whole, end)
                    padded = {name: _padded(tensor) for name, tensor in rest.items()}
                    _update(kind, padded, _padded(_scaled(grad[whole:end], factor)), hyper, step)
                    for name, tensor in rest.items():
                        tensor.copy_(padded[name][: end - whole])
            if out is not None:
                out.copy_(state["param"])

    def sum_of_squares(self, grad: Tensor) -> tuple[float, bool]:
        """See `HostOptimizer.sum_of_squares`."""
        _check_flat("grad", grad, grad.numel(), LOW_PRECISION)
        total = 0.0
        for start in range(0, grad.numel(), self.chunk_numel):
            chunk = grad[start : start + self.chunk_numel].to(torch.float64)
            total += float(torch.dot(chunk, chunk))
        # fp64 holds the square of every fp32, and more than 2**700 of them: not finite means that some element is not
        return total, math.isfinite(total)


_VECTOR = 16  # fp32 elements: the widest vector (512 bits), a multiple of the others; torch's threads cut at it as well


def _update(kind: str, state: dict[str, Tensor], g: Tensor, hyper: Mapping[str, Any], step: int) -> None:
    """One slice, whole vectors, `g` (numel,) fp32."""
    if not g.numel():
        return
    params, grads = [state["param"]], [g]
    steps = [torch.tensor(float(step - 1))]  # torch counts up before it computes
    match kind:
        case "adamw" | "adam":
            (adamw if kind == "adamw" else adam)(
                params,
                grads,
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                steps,
                fused=True,
                amsgrad=False,
                lr=hyper["lr"],
                beta1=hyper["betas"][0],
                beta2=hyper["betas"][1],
                eps=hyper["eps"],
                weight_decay=hyper["weight_decay"],
                maximize=False,
            )
        case "adagrad":
            adagrad(
                params,
                grads,
                [state["sum"]],
                steps,
                fused=True,
                lr=hyper["lr"],
                lr_decay=hyper["lr_decay"],
                eps=hyper["eps"],
                weight_decay=hyper["weight_decay"],
                maximize=False,
            )
        case "sgd":
            first = step == 1 or not hyper["momentum"]  # torch starts the buffer as a copy of the gradient, undamped
            buffers: list[Tensor | None] = [None if first else state["momentum_buffer"]]
            sgd(
                params,
                grads,
                buffers,
                foreach=False,
                fused=False,
                lr=hyper["lr"],
                momentum=hyper["momentum"],
                dampening=hyper["dampening"],
                weight_decay=hyper["weight_decay"],
                nesterov=hyper["nesterov"],
                maximize=False,
            )
            if hyper["momentum"] and buffers[0] is not None:
                state["momentum_buffer"].copy_(buffers[0])
        case "lion":
            _lion(
                state["param"], state["exp_avg"], g, lr=hyper["lr"], betas=hyper["betas"], decay=hyper["weight_decay"]
            )


def _lion(p: Tensor, m: Tensor, g: Tensor, *, lr: float, betas: tuple[float, float], decay: float) -> None:
    # no `alpha=` and no addcmul: both may fuse
    p.mul_(1 - lr * decay)
    update = m.mul(betas[0]).add_(g.mul(1 - betas[0])).sign_()
    p.sub_(update.mul_(lr))
    m.mul_(betas[1]).add_(g.mul(1 - betas[1]))


def _scaled(grad: Tensor, factor: float) -> Tensor:
    g = grad.float()
    return g if factor == 1.0 else g.mul(factor)


def _cut(state: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[start:end] for name, tensor in state.items()}


def _padded(tensor: Tensor) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, _VECTOR - tensor.numel()))


def _check(
    kind: str, state: Mapping[str, Tensor], grad: Tensor, hyper: Mapping[str, Any], step: int, out: Tensor | None
) -> None:
    if kind not in STATE:
        raise ValueError(f"kind {kind!r}: one of {', '.join(STATE)}")
    if set(hyper) != set(HYPER[kind]):
        raise ValueError(f"{kind} takes the hyper-parameters {', '.join(HYPER[kind])}, not {', '.join(hyper)}")
    needed = [name for name in STATE[kind] if name != "momentum_buffer" or hyper["momentum"]]
    if not set(needed) <= set(state) <= set(STATE[kind]):
        raise ValueError(f"{kind} takes the states {', '.join(needed)}, not {', '.join(state)}")
    if step < 1:
        raise ValueError(f"step counts from 1: {step}")
    _check_flat("grad", grad, grad.numel(), LOW_PRECISION)
    for name, tensor in state.items():
        _check_flat(name, tensor, grad.numel(), (torch.float32,))
    if out is not None:
        _check_flat("out", out, grad.numel(), LOW_PRECISION)


def _check_flat(name: str, tensor: Tensor, numel: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be flat, contiguous and on the host: {tuple(tensor.shape)} on {tensor.device}")
    if tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, the gradient {numel}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}: one of {', '.join(map(str, dtypes))}")
