"""The optimizers that a DeepSpeed configuration names: `optimizer.params` are the arguments, with DeepSpeed's defaults.

Every other `optimizer.type` is a class of `torch.optim`, with torch's. `set_grad_none` and, on one of Muon's halves or
what is torch's anyway, `torch_adam` say nothing; `NOT_THERE` has the values that are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ._lists import check
from .adam import Adam
from .lamb import Lamb
from .lion import Lion
from .muon import Muon

Optimizer = torch.optim.Optimizer
Betas = tuple[float, float]
Make = Callable[..., Optimizer]


def adam(
    params: Any,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    bias_correction: bool = True,
    adam_w_mode: bool = True,
    amsgrad: bool = False,
    set_grad_none: bool = True,
    fp32_optimizer_states: bool = True,
    torch_adam: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> Optimizer:
    """AdamW unless `adam_w_mode` is false: torch's, or without bias correction our own.

    Raises:
        ValueError: for AMSGrad without bias correction.
    """
    if not bias_correction:
        if amsgrad:
            raise ValueError("amsgrad needs bias_correction")
        return Adam(params, lr, betas, eps, weight_decay, bias_correction=False, decoupled=adam_w_mode)
    kind = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    how = {"fused": True} if foreach is None and fused is None else {"foreach": foreach, "fused": fused}
    return kind(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **how)


def lamb(
    params: Any,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    amsgrad: bool = False,
) -> Optimizer:
    """LAMB as DeepSpeed's kernel computes it: bias correction is in the step size, not in the moments.

    Raises:
        ValueError: for `amsgrad`.
    """
    if amsgrad:
        raise ValueError("LAMB has no AMSGrad variant")
    return Lamb(
        params,
        lr,
        betas,
        eps,
        weight_decay,
        bias_correction=bias_correction,
        eps_inside_sqrt=eps_inside_sqrt,
        max_coeff=max_coeff,
        min_coeff=min_coeff,
        correct_step_size=True,
    )


def lion(
    params: Any,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    weight_decay: float = 0.0,
    *,
    set_grad_none: bool = True,
    fp32_optimizer_states: bool = True,
) -> Optimizer:
    """Lion, with the defaults of DeepSpeed's kernel (the paper's are 1e-4 and (0.9, 0.99))."""
    return Lion(params, lr, betas, weight_decay)


def muon(
    params: Any,
    lr: float | None = None,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    *,
    muon_lr: float | None = None,
    adam_lr: float | None = None,
    betas: Betas = (0.9, 0.95),
    eps: float = 1e-10,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_method: str = "gram",
    adam_w_mode: bool = True,
    torch_adam: bool = False,
    fp32_optimizer_states: bool = True,
    per_head_muon: bool = False,
) -> Optimizer:
    """Muon with AdamW: `lr` is that of both halves, `muon_lr` and `adam_lr` those of one.

    Which half a parameter belongs to says its `use_muon` (see `mark_for_muon`)."""
    check(lr=lr or 0.0)  # also where each half has its own
    rates = [(muon_lr, 0.02), (adam_lr, 3e-4)]
    first, second = (own if own is not None else lr if lr is not None else default for own, default in rates)
    return Muon(
        params,
        first,
        momentum,
        weight_decay,
        nesterov=nesterov,
        ns_steps=ns_steps,
        ns_method=ns_method,
        adam_lr=second,
        betas=betas,
        eps=eps,
        decoupled=adam_w_mode,
    )


NAMED: Mapping[str, Make] = {
    "adam": adam, "adamw": adam, "lamb": lamb, "lion": lion, "muon": muon, "adagrad": torch.optim.Adagrad
}  # fmt: skip

_COMPRESSED = "the 1-bit optimizers come with the compressed collectives, which are not there yet"
_MUP = "the widths that it scales by are known to the mup package: give initialize() its optimizer, mup.{}"
REFUSED: Mapping[str, str] = {
    "onebitadam": _COMPRESSED,
    "onebitlamb": _COMPRESSED,
    "zerooneadam": _COMPRESSED,
    "muadam": _MUP.format("MuAdam"),
    "muadamw": _MUP.format("MuAdamW"),
    "musgd": _MUP.format("MuSGD"),
    "lbfgs": "its step() needs a closure that evaluates the model again, and the engine steps without one",
    "sparseadam": "it takes sparse gradients only, and the optimizer is handed dense ones",
}
"""Types that DeepSpeed knows and this project does not, with the reason."""

NOT_THERE: Mapping[str, tuple[bool, str]] = {
    "fp32_optimizer_states": (False, "states are fp32: see bf16.bf16_optimizer_states and offload_optimizer.zs_state"),
    "per_head_muon": (True, "Muon takes whole matrices; one iteration for each head is not there yet"),
}
"""Parameters of the optimizers above: the value that is refused, and why."""
