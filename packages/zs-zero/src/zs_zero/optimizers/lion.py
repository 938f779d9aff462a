"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2).

    u = sign(b1 m + (1 - b1) g)
    p = p (1 - lr weight_decay) - lr u
    m = b2 m + (1 - b2) g

The sign makes every element move by lr: use a learning rate 3 to 10 times smaller than Adam's (section 5).
"""

from collections.abc import Callable
from typing import Any

import torch

from ._lists import check, check_betas, evaluate, states, with_gradients


class Lion(torch.optim.Optimizer):
    """Lion, by the operations of `zs_zero.host_optimizer` (every product and sum rounded once), so with its bits.

    Args:
        params: parameters or groups.
        lr: step of each element.
        betas: of the update and of the momentum; (0.9, 0.99) in the paper.
        weight_decay: decoupled.
    """

    __zs_requires__ = "elements"

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        check(lr=lr, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": check_betas(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params, grads = with_gradients(group)
            if not params:
                continue
            (momenta,) = states(self, params, "exp_avg", counted=False)
            lr, (first, second) = float(group["lr"]), group["betas"]
            update = torch._foreach_mul(momenta, first)
            # no `alpha=` and no lerp: they may round once where the formula rounds twice
            torch._foreach_add_(update, torch._foreach_mul(grads, 1 - first))
            torch._foreach_sign_(update)
            torch._foreach_mul_(update, lr)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, update)
            del update
            torch._foreach_mul_(momenta, second)
            torch._foreach_add_(momenta, torch._foreach_mul(grads, 1 - second))
        return loss
