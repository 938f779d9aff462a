"""LAMB (You et al., "Large Batch Optimization for Deep Learning", 2020, algorithm 2): Adam with a step per layer.

r = m^ / (sqrt(v^) + eps) + weight_decay p
p = p - lr (|p| / |r|) r            the ratio is held in [min_coeff, max_coeff], and is 1 where a norm is 0
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._lists import check, check_betas, evaluate, states, with_gradients
from .adam import corrections, moments


class Lamb(torch.optim.Optimizer):
    """LAMB. A layer is a parameter; its two norms are summed in fp64, over the ranks that hold a piece of it.

    Args:
        params: parameters or groups.
        lr: step relative to each layer's norm.
        betas: of the first and the second moment.
        eps: added to the root of the second moment, or below it with `eps_inside_sqrt`.
        weight_decay: added to the update before its norm is taken.
        bias_correction: False takes the moments as they are.
        max_coeff, min_coeff: bounds of the ratio of the norms.
        eps_inside_sqrt: `sqrt(v + eps)` in the place of `sqrt(v) + eps`.
        correct_step_size: correct the step size, `lr sqrt(1 - b2^t) / (1 - b1^t)`, and not the moments. The ratio then
            cancels no correction, so the first steps are smaller; apex and DeepSpeed compute this.
    """

    __zs_requires__ = "norms"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        eps_inside_sqrt: bool = False,
        correct_step_size: bool = False,
    ) -> None:
        check(lr=lr, eps=eps, weight_decay=weight_decay, min_coeff=min_coeff)
        if not max_coeff >= min_coeff:
            raise ValueError(f"max_coeff is at least min_coeff, {min_coeff} (got {max_coeff!r})")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": check_betas(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "max_coeff": max_coeff,
                "min_coeff": min_coeff,
                "eps_inside_sqrt": eps_inside_sqrt,
                "correct_step_size": correct_step_size,
            },
        )
        self.sum_pieces: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient; where the model is sharded, a collective."""
        loss = evaluate(closure)
        todo = [(group, *_updates(self, group)) for group in self.param_groups]
        pieces = [param for _, params, _, _ in todo for param in params]
        directions = [update for _, _, updates, _ in todo for update in updates]
        sums = torch.stack([_squares(pieces), _squares(directions)], dim=1)  # (pieces, 2)
        if self.sum_pieces is not None:
            sums = self.sum_pieces(pieces, sums)
        norms = iter(sums.sqrt().tolist())
        for group, params, updates, scales in todo:
            for param, update, scale in zip(params, updates, scales, strict=True):
                weight, direction = next(norms)
                ratio = 1.0
                if weight != 0 and direction != 0:
                    ratio = min(max(weight / direction, group["min_coeff"]), group["max_coeff"])
                param.add_(update, alpha=-float(group["lr"]) * scale * ratio)
        return loss


def _updates(optimizer: Lamb, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """The parameters with a gradient, their updates (of the same shapes), and what the steps are multiplied by."""
    params, grads = with_gradients(group)
    if not params:
        return [], [], []
    firsts, seconds, steps = states(optimizer, params, "exp_avg", "exp_avg_sq")
    moments(firsts, seconds, grads, group["betas"])
    ones, twos = corrections(steps, group["betas"], wanted=group["bias_correction"])
    scales = [1.0] * len(params)
    if group["correct_step_size"]:
        scales = [two**0.5 / one for one, two in zip(ones, twos, strict=True)]
        ones = twos = [1.0] * len(params)
    denominators = list(torch._foreach_div(seconds, twos))
    if group["eps_inside_sqrt"]:
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_sqrt_(denominators)
    else:
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
    updates = list(torch._foreach_div(firsts, ones))
    torch._foreach_div_(updates, denominators)
    if group["weight_decay"]:
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
    return params, updates, scales


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each tensor: (len(tensors),) fp64 on the CPU."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().cpu()
