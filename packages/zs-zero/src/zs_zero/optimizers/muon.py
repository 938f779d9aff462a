"""Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024): momentum, orthogonalised.

    m = m + (1 - momentum) (g - m);    u = g + momentum (m - g) where nesterov, else m
    p = p (1 - lr weight_decay) - lr sqrt(max(1, rows / columns)) orthogonal(u)

`orthogonal` is a Newton-Schulz iteration of degree five: singular values go to about 1. It is for the matrices of
hidden layers; embeddings, the head, biases and norms are trained by AdamW in groups of the same optimizer.
"""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ._lists import check, check_betas, evaluate, states, with_gradients
from .adam import adam_step

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic with the steepest slope at zero, from the article above
_RESTART = 2  # Gram iterations before the matrix itself is multiplied: the error grows with their number
_METHODS = ("standard", "gram")
_MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "nesterov": True, "ns_steps": 5, "ns_method": "standard"}
_ADAM = {
    "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0, "bias_correction": True, "decoupled": True
}  # fmt: skip


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon=True`, AdamW for those with False: the published pair, in one optimizer.

    A group without `use_muon`, and plain parameters, are split by the parameters' own flag `param.use_muon` (see
    `mark_for_muon`), or else by their shape: two dims or more are Muon's.

    Args:
        params: parameters or groups. A Muon group takes lr, momentum, weight_decay, nesterov, ns_steps and ns_method;
            an Adam group lr, betas, eps, weight_decay, bias_correction and decoupled. Missing ones come from below.
        lr: of the Muon groups, as a spectral norm.
        momentum, nesterov: of the Muon groups.
        weight_decay: decoupled, of all groups.
        ns_steps: Newton-Schulz iterations.
        ns_method: "standard" iterates on the matrix in bf16; "gram" on the small Gram matrix (fewer operations for wide
            ones), in fp16 on a GPU and in fp32 else. Equal but for rounding.
        adam_lr, betas, eps: of the Adam groups.
        decoupled: False: the Adam groups add the decay to the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_method: str = "standard",
        adam_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        decoupled: bool = True,
    ) -> None:
        own = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "ns_steps": ns_steps,
            "ns_method": ns_method,
        }  # fmt: skip
        other = {"lr": adam_lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        for settings in (own, other):
            _check_group(settings)
        super().__init__(list(_split(params, _MUON | own, _ADAM | other)), {})

    def __zs_requires__(self, group: dict[str, Any]) -> str:
        """Whole matrices for Muon's groups, single elements for Adam's."""
        return "whole" if group["use_muon"] else "elements"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; checks the group's values. Raises ValueError for a wrong one, or a vector in a Muon group."""
        group = dict(param_group)
        if not isinstance(group.get("use_muon"), bool):
            raise ValueError(f"a group of Muon has use_muon=True or False (got {group.get('use_muon')!r})")
        known = _MUON if group["use_muon"] else _ADAM
        group = known | group
        _check_group(group)
        super().add_param_group(group)
        if group["use_muon"]:
            for param in self.param_groups[-1]["params"]:
                if param.dim() < 2:
                    shape = tuple(param.shape)
                    raise ValueError(f"Muon orthogonalises matrices; a parameter of shape {shape} belongs to Adam")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            if group["use_muon"]:
                _muon_step(self, group)
            else:
                adam_step(self, group)
        return loss


def _check_group(group: dict[str, Any]) -> None:
    check(lr=group["lr"], weight_decay=group["weight_decay"])
    if "momentum" not in group:
        check_betas(group["betas"])
        check(eps=group["eps"])
        return
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum is a number in [0, 1) (got {group['momentum']!r})")
    if not (isinstance(group["ns_steps"], int) and group["ns_steps"] >= 1):
        raise ValueError(f"ns_steps is a whole number of at least 1 (got {group['ns_steps']!r})")
    if group["ns_method"] not in _METHODS:
        raise ValueError(f"ns_method is one of {', '.join(_METHODS)} (got {group['ns_method']!r})")


def mark_for_muon(model: nn.Module) -> None:
    """Sets `param.use_muon` where it is not set: True for two dims or more outside of embeddings and the head.

    Those are known by their names, as in DeepSpeed: they contain "embed" or "lm_head".
    """
    for name, param in model.named_parameters():
        if not hasattr(param, "use_muon"):
            hidden = not any(word in name.lower() for word in ("embed", "lm_head"))
            param.use_muon = hidden and param.dim() >= 2  # type: ignore[attr-defined]


def _split(params: Any, muon: dict[str, Any], adam: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The groups given, those without `use_muon` split by what their parameters are."""
    items = list(params)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        if "use_muon" in group:
            yield (muon if group["use_muon"] else adam) | group
            continue
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        named = members and isinstance(members[0], tuple)  # (name, parameter), as torch takes them
        flags = [getattr(p, "use_muon", p.dim() >= 2) for p in ([param for _, param in members] if named else members)]
        halves = [(True, muon), (False, adam)]
        for use_muon, defaults in halves if members else halves[1:]:
            half = [member for member, flag in zip(members, flags, strict=True) if bool(flag) is use_muon]
            if half or not members:
                others = (adam if use_muon else muon).keys() - defaults.keys()
                settings = {key: value for key, value in group.items() if key not in others}
                yield defaults | settings | {"params": half, "use_muon": use_muon}


def _muon_step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    params, grads = with_gradients(group)
    (momenta,) = states(optimizer, params, "momentum_buffer", counted=False)
    lr, momentum = float(group["lr"]), group["momentum"]
    for param, grad, buffer in zip(params, grads, momenta, strict=True):
        buffer.lerp_(grad, 1 - momentum)
        update = (grad.lerp(buffer, momentum) if group["nesterov"] else buffer).flatten(1)  # (rows, columns)
        rows, columns = update.shape
        direction = orthogonal(update, group["ns_steps"], method=group["ns_method"])
        param.mul_(1 - lr * group["weight_decay"])
        param.add_(direction.view(param.shape), alpha=-lr * sqrt(max(1.0, rows / columns)))


def orthogonal(matrix: Tensor, steps: int, *, method: str = "standard", eps: float = 1e-7) -> Tensor:
    """About `U V^T` of `matrix = U S V^T` (rows, columns), by Newton-Schulz: singular values between 0.5 and 1.5.

    `method` as in `Muon`; the result is in the dtype that it computes in.
    """
    half = torch.float16 if matrix.is_cuda else torch.float32
    x = matrix if method == "gram" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=eps)
    if method == "gram":
        x = _gram_iteration(x.to(half), steps)
    else:
        a, b, c = _COEFFICIENTS
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if tall else x


def _gram_iteration(x: Tensor, steps: int) -> Tensor:
    """The same polynomial by its factor: x (n, m) is only multiplied by the product of the factors, each (n, n).

    With R = x x^T each step multiplies x by P = a + b R + c R R from the left, and so R by P from both sides.
    """
    a, b, c = _COEFFICIENTS
    eye = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    for first in range(0, steps, _RESTART):
        gram, product = x @ x.mT, eye
        for step in range(first, min(first + _RESTART, steps)):
            factor = torch.addmm(gram, gram, gram, beta=b, alpha=c).add_(eye, alpha=a)
            product = factor @ product
            if step + 1 < min(first + _RESTART, steps):
                gram = factor @ gram @ factor
        x = product @ x
    return x
