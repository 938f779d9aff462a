"""The reduced gradients of a window as one: their norm, whether they are finite, whether the step is taken.

Until the step they carry the loss scale. Then they are divided by it and clipped, in one pass over them.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from zs_comm import Group, all_reduce

from .flat import Flat
from .norm import global_norm
from .scaling import Scaling


class Gradients:
    """What the step decides by. `shard` is the group over which the flats are spread, `votes` the other axes."""

    def __init__(
        self, flats: Sequence[Flat], ignored: Sequence[nn.Parameter], scaling: Scaling, *,
        shard: Group, votes: Sequence[Group], slices: int,
    ) -> None:  # fmt: skip
        self._flats = flats
        self._ignored = [param for param in ignored if param.requires_grad]  # each rank's own
        self._scaling = scaling
        self._shard, self._votes = shard, votes
        self._slices = slices

    def norm(self) -> Tensor:
        """The global 2-norm of the mean gradient, unscaled (0-dim fp32, CPU). Collective."""
        return self._scaling.unscaled(global_norm(self._flats, self._shard, slices=self._slices))

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        """Multiplies them by `min(1, max_norm / (norm + 1e-6))`."""
        self._multiply(_clip_factor(norm, max_norm))
        for flat in self._flats:
            flat.settle_factors()

    def decide(self, max_norm: float | None, drop: Callable[[], None]) -> tuple[Tensor | None, bool]:
        """The norm, where something asks for it, and whether the step is taken. Collective.

        If so they are unscaled and clipped. If not they are dropped.
        """
        norm, factor = None, 1.0 / self._scaling.value
        if max_norm is not None or self._scaling.checks:
            norm = self.norm()
            if self._scaling.checks and self._overflow(norm):
                drop()
                return norm, False
            if max_norm is not None and max_norm < math.inf:
                factor *= _clip_factor(norm, max_norm)
        self._multiply(factor)
        if self._scaling.value != 1.0:
            for param in self._ignored:  # no part of the norm, so they are not clipped
                if param.grad is not None:
                    param.grad.mul_(1.0 / self._scaling.value)
        return norm, True

    def _overflow(self, norm: Tensor) -> bool:
        """Whether a gradient is not finite on any rank that holds a piece of the model. Collective.

        `norm` says so for what is sharded or replicated. Gradients of ignored parameters are each rank's own, and
        another rank of a model axis (a pipeline stage, say) holds other parameters: these are asked.
        """
        own = [param.grad for param in self._ignored if param.grad is not None]
        found = not (bool(torch.isfinite(norm)) and all(bool(torch.isfinite(grad).all()) for grad in own))
        for group in self._votes:
            vote = torch.tensor([found], dtype=torch.uint8)
            all_reduce(vote, group, op="max", label="overflow")
            found = bool(vote.item())
        return found

    def _multiply(self, factor: float) -> None:
        if factor == 1.0:
            return
        for flat in self._flats:
            flat.multiply_gradients(factor)


def _clip_factor(norm: Tensor, max_norm: float) -> float:
    factor = max_norm / (float(norm) + 1e-6)
    return 1.0 if factor >= 1.0 else factor  # a norm that is not a number is none: torch spreads it, and so do we
