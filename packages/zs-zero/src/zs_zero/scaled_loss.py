"""The loss scale as an optimizer's user sees it."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .runtime import Runtime


class ScaledLoss(abc.ABC):
    """What `ZeroOptimizer` does about the loss scale."""

    _runtime: Runtime

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, to call `backward()` on; gradients have the scale of the time of that.

        All of it: a term that is added to a scaled loss is not scaled, which no gradient shows (its share of the update
        is too small by that factor). Raises ConfigError for what is no tensor, or was made of a scaled loss.
        """
        return self._runtime.scaling.scale(loss)

    @property
    def loss_scale(self) -> float:
        """The present loss scale; 1 where nothing is scaled."""
        return self._runtime.scaling.value

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale changes."""
        return self._runtime.scaling.dynamic
