"""Adam (Kingma & Ba, 2015, algorithm 1) where torch's lacks a switch: without bias correction, as BERT was trained."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._lists import check, check_betas, evaluate, states, with_gradients


class Adam(torch.optim.Optimizer):
    """Adam or, by default, AdamW (Loshchilov & Hutter, 2019). With `bias_correction` prefer torch's: it is fused.

    Args:
        params: parameters or groups.
        lr: step size.
        betas: of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: see `decoupled`.
        bias_correction: False takes the moments as they are, so the first steps are larger.
        decoupled: weights decay by `lr * weight_decay` (AdamW); else `weight_decay * p` is added to the gradient.
    """

    __zs_requires__ = "elements"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        decoupled: bool = True,
    ) -> None:
        check(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": check_betas(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "decoupled": decoupled,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            adam_step(self, group)
        return loss


def adam_step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """One step of one group of `optimizer`, whose keys are the arguments of `Adam`."""
    params, grads = with_gradients(group)
    if not params:
        return
    lr, decay = float(group["lr"]), group["weight_decay"]
    if decay and group["decoupled"]:
        torch._foreach_mul_(params, 1 - lr * decay)
    elif decay:
        grads = list(torch._foreach_add(grads, params, alpha=decay))
    firsts, seconds, steps = states(optimizer, params, "exp_avg", "exp_avg_sq")
    moments(firsts, seconds, grads, group["betas"])
    ones, twos = corrections(steps, group["betas"], wanted=group["bias_correction"])
    denominators = torch._foreach_sqrt(seconds)
    torch._foreach_div_(denominators, [two**0.5 for two in twos])
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(params, firsts, denominators, [-lr / one for one in ones])


def moments(firsts: list[Tensor], seconds: list[Tensor], grads: list[Tensor], betas: tuple[float, float]) -> None:
    """Updates both moving averages in place."""
    torch._foreach_lerp_(firsts, grads, 1 - betas[0])
    torch._foreach_mul_(seconds, betas[1])
    torch._foreach_addcmul_(seconds, grads, grads, 1 - betas[1])


def corrections(
    steps: Sequence[Tensor], betas: tuple[float, float], *, wanted: bool
) -> tuple[list[float], list[float]]:
    """`1 - beta ** step` of both moments for each parameter; ones unless `wanted`."""
    counts = [float(step) if wanted else float("inf") for step in steps]
    return [1 - betas[0] ** count for count in counts], [1 - betas[1] ** count for count in counts]
