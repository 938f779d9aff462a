"""Where the loss scale meets tensors: losses on their way into a backward, gradients on their way to the update.

The factor is applied in the backward, not when the loss is scaled. So gradients of a window always carry the scale that
the step divides them by, even those of a loss that was scaled before the last step.
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from zs_comm import ConfigError

from .autograd import BackwardTasks, age, made_of
from .loss_scale import LossScale

log = logging.getLogger("zs_zero")


class Scaling:
    """The loss scale of one sharded model, and which backwards went through it."""

    def __init__(self, loss_scale: LossScale | None, *, speaks: bool = True) -> None:
        self.loss_scale = loss_scale
        self._speaks = speaks  # one rank tells for all
        self._tasks = BackwardTasks(_nothing)
        self._spoiled = False  # the window holds a gradient that was not scaled
        self._ahead: weakref.WeakSet[_Mark] = weakref.WeakSet()  # scaled losses before their backward

    @property
    def value(self) -> float:
        """What gradients are multiplied by now."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    @property
    def dynamic(self) -> bool:
        """Whether that changes."""
        return self.loss_scale is not None and self.loss_scale.dynamic

    @property
    def checks(self) -> bool:
        """Whether steps with gradients that are not finite are skipped."""
        return self.loss_scale is not None

    @property
    def required(self) -> bool:
        """Whether a backward must come through `scale`."""
        return self.loss_scale is not None and (self.loss_scale.dynamic or self.loss_scale.value != 1.0)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the scale, in fp32 where it is in 16 bits (it would overflow).

        Raises ConfigError for what is no tensor, or was made of a scaled loss. What is added later is not seen.
        """
        as_loss(loss)
        if not self.required:
            return loss
        if self._ahead and self._is_scaled(loss):
            raise ConfigError(
                "this loss is scaled already, or a part of it is: give the loss itself to engine.backward(loss), or "
                "call backward() of what scale(loss) returned"
            )
        apply: Any = _Scale.apply
        scaled: Tensor = apply(loss, self)
        node: Any = scaled.grad_fn
        if node is not None:
            node.mark = _Mark(age(node), self)
            self._ahead.add(node.mark)
        return scaled

    def _is_scaled(self, loss: Tensor) -> bool:
        def ours(node: Any) -> bool:
            mark = getattr(node, "mark", None)
            return isinstance(mark, _Mark) and mark.scaling is self

        return made_of(loss, ours, since=min(mark.age for mark in self._ahead))

    def scaled(self, grad: Tensor) -> Tensor:
        """A gradient in the units of the window's: those carry the scale until the step."""
        return grad if self.value == 1.0 else grad * self.value

    def unscaled(self, grad: Tensor) -> Tensor:
        """A gradient of the window in the units of the loss."""
        return grad if self.value == 1.0 else grad / self.value

    def check_backward(self) -> None:
        """In a hook of a parameter: raises ConfigError unless this backward came through `scale`."""
        if not self._tasks.unfinished:
            self._spoiled = True
            self.check_window()

    def check_window(self) -> None:
        """Raises ConfigError while there are gradients that were not scaled."""
        if self._spoiled:
            raise ConfigError(
                "a backward of an unscaled loss, where the loss is to be scaled: call optimizer.scale(loss).backward() "
                "(of an engine: engine.backward(loss) or engine.scale(loss).backward()); after abort_step() go on"
            )

    def forget(self) -> None:
        """The window's gradients are gone."""
        self._tasks.forget()
        self._spoiled = False

    def state_dict(self) -> dict[str, float]:
        """The scale's state; that of nothing scaled is empty."""
        return {} if self.loss_scale is None else self.loss_scale.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Takes what `state_dict` gave; of another kind of scale (another precision, say) nothing."""
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state_dict)

    def update(self, *, overflow: bool) -> None:
        """A step was taken or skipped. Raises LossScaleError where that was asked for."""
        if self.loss_scale is None:
            return
        before = self.loss_scale.value
        self.loss_scale.update(overflow)
        if not overflow or not self._speaks:
            return
        stuck, now = self.loss_scale.stuck, self.loss_scale.value
        if stuck:
            if stuck & (stuck - 1) == 0:  # the 1st, 2nd, 4th ...: a line for each would be all there is to read
                text = "gradients are not finite at loss scale %g, which is not lowered; steps skipped in a row: %d"
                log.warning(text, now, stuck)
        else:
            log.info("gradients are not finite: the step is skipped, the loss scale goes from %g to %g", before, now)


def as_loss(loss: Any) -> Tensor:
    """`loss` itself. Raises ConfigError for what is no tensor (a model's tuple of outputs, say)."""
    if not isinstance(loss, Tensor):
        raise ConfigError(f"a loss should be a tensor to call backward() on (got {type(loss).__name__})")
    return loss


class _Mark:
    """Lives as long as the node of a scaled loss."""

    def __init__(self, age: int, scaling: Scaling) -> None:
        self.age, self.scaling = age, scaling


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scaling: Scaling) -> Tensor:
        ctx.scaling = scaling
        sixteen_bit = loss.dtype in (torch.float16, torch.bfloat16)
        return (loss.float() if sixteen_bit else loss) * scaling.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        scaling: Scaling = ctx.scaling
        scaling._tasks.enter()
        scaling._ahead.discard(ctx.mark)
        return grads[0] * scaling.value, None


def _nothing() -> None:
    pass
