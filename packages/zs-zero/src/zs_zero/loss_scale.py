"""The loss scale: how far gradients are lifted out of fp16's small numbers, and when that changes.

    overflow     x  .  .  .  .  .  .  .  x  .     x: a gradient is not finite, so the step is skipped
    scale       16  8  8  8  8 16 16 16 32 16     halved by an overflow, doubled by a window of 3 steps without

Mixed Precision Training (Micikevicius et al., 2018), section 3.2; the counting is
that of DeepSpeed's `DynamicLossScaler`, step for step. No tensor in here: what a scale is multiplied into is `scaling`.
"""

from __future__ import annotations

import abc
import math
import weakref
from collections.abc import Mapping
from typing import Any

from zs_comm import ConfigError, ZsError


class LossScaleError(ZsError, RuntimeError):
    """Gradients overflow although the loss scale is at its minimum, and `raise_at_minimum` was asked for."""


class LossScale(abc.ABC):
    """What losses are multiplied by before the backward, and gradients divided by before the update.

    One object belongs to one sharded model. All ranks see the same overflows, so it is the same on all of them.

    Attributes:
        value: the present scale.
        dynamic: whether it changes.
        stuck: overflows in a row to which the scale could not give way.
    """

    dynamic: bool
    value: float
    stuck: int = 0
    _owner: weakref.ref[object] | None = None

    @property
    def owner(self) -> object | None:
        """Whose losses it scales; None while it is free."""
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, owner: object | None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_owner"}  # a copy is free

    def update(self, overflow: bool) -> None:
        """Counts one step, taken or (`overflow`) skipped. To be called after the gradients were divided by `value`.

        Raises:
            LossScaleError: for an overflow at the minimum, where asked for. It is counted; the scale stays as it was.
        """
        if overflow:
            before = self.value
            try:
                self._overflowed()
            finally:
                self.stuck = self.stuck + 1 if self.at_minimum and before == self.value else 0
        else:
            self.stuck = 0
            self._went_well()

    @property
    @abc.abstractmethod
    def at_minimum(self) -> bool:
        """Whether no overflow can lower it any more."""

    @abc.abstractmethod
    def _overflowed(self) -> None: ...

    @abc.abstractmethod
    def _went_well(self) -> None: ...

    @abc.abstractmethod
    def state_dict(self) -> dict[str, float]:
        """What an exact resume needs, as plain numbers; among them `value`."""

    @abc.abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Takes what `state_dict` of a scale of the same kind gave; another kind's is ignored."""


class StaticLossScale(LossScale):
    """A scale that never changes. `StaticLossScale(1.0)` scales nothing, and only skips steps that overflow.

    Raises:
        ConfigError: unless `value` is a finite number above 0.
    """

    dynamic = False
    at_minimum = True

    def __init__(self, value: float = 1.0) -> None:
        self.value = _positive("loss_scale", value)

    def _overflowed(self) -> None:
        pass

    def _went_well(self) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        pass

    def __repr__(self) -> str:
        return f"StaticLossScale({self.value:g})"


class DynamicLossScale(LossScale):
    """Halved when gradients overflow, doubled after `window` steps without (counted after a first good one).

    Args:
        initial: the scale to begin with.
        window: steps between doublings. The first doubling after an overflow comes at good step `window + 1`.
        hysteresis: overflows until the scale is halved; the earlier ones only skip their step. The count begins anew
            when the scale is doubled.
        consecutive_hysteresis: it begins anew with every good step, so that overflows count in a row only.
        minimum: the scale is never halved below it.
        raise_at_minimum: raise LossScaleError for an overflow at the minimum, instead of skipping steps for ever.

    Raises:
        ConfigError: for a value out of its range.
    """

    dynamic = True
    FACTOR = 2.0  # a power of two: scaling and unscaling then round nothing

    def __init__(
        self,
        *,
        initial: float = 2.0**16,
        window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        minimum: float = 1.0,
        raise_at_minimum: bool = False,
    ) -> None:
        self.value = self.initial = _positive("initial", initial)
        self.minimum = _positive("minimum", minimum)
        for name, count in (("window", window), ("hysteresis", hysteresis)):
            if type(count) is not int or count < 1:
                raise ConfigError(f"{name} of a loss scale is a whole number of at least 1 (got {count!r})")
        if self.initial < self.minimum:
            raise ConfigError(f"the initial loss scale {self.initial:g} is below its minimum {self.minimum:g}")
        self.window = window
        self.hysteresis = hysteresis
        self.consecutive_hysteresis = consecutive_hysteresis
        self.raise_at_minimum = raise_at_minimum
        self._good_steps = 0  # since the last overflow
        self._tolerated = hysteresis  # the overflow after which the scale is halved, counted down

    @property
    def at_minimum(self) -> bool:
        return self.value <= self.minimum

    def _overflowed(self) -> None:
        self._good_steps = 0
        if self._tolerated > 1:
            self._tolerated -= 1
        elif self.at_minimum and self.raise_at_minimum:
            raise LossScaleError(
                f"gradients are not finite at the smallest loss scale, {self.minimum:g}: the model itself overflows or "
                f"has no finite loss"
            )
        else:
            self.value = max(self.value / self.FACTOR, self.minimum)

    def _went_well(self) -> None:
        if self.consecutive_hysteresis:
            self._tolerated = self.hysteresis
        if self._good_steps and self._good_steps % self.window == 0:
            self._tolerated = self.hysteresis
            self.value *= self.FACTOR
        self._good_steps += 1

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self._good_steps, "tolerated": self._tolerated, "stuck": self.stuck}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        if "good_steps" not in state_dict:
            return
        self.value = float(state_dict["value"])
        self._good_steps, self._tolerated = int(state_dict["good_steps"]), int(state_dict["tolerated"])
        self.stuck = int(state_dict["stuck"])

    def __repr__(self) -> str:
        return f"DynamicLossScale({self.value:g}, window={self.window}, hysteresis={self.hysteresis})"


def as_loss_scale(given: LossScale | float | None) -> LossScale | None:
    """What `zs_zero.shard` takes: a scale that is free, a number (a static one), or None. Raises ConfigError."""
    if given is None or not isinstance(given, LossScale):
        return None if given is None else StaticLossScale(given)
    if given.owner is not None:
        raise ConfigError(f"{given} scales the loss of another model: give each its own, or close() the other first")
    return given


def _positive(name: str, value: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} is a finite number above 0 (got {value!r})")
    return float(value)
