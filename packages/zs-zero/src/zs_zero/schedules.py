"""Learning-rate schedules with the names, parameters and values of DeepSpeed's five; each works on any torch optimizer.

A schedule counts optimizer steps: it writes its starting value when built; call ``step()`` after ``optimizer.step()``.
``last_batch_iteration`` is the last finished step, -1 before the first. A rate may be a list, one for each group.
"""

from __future__ import annotations

import math
import numbers
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from zs_comm import ConfigError
from zs_comm.config import Problem, config_error

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]


@dataclass(frozen=True)
class Range:
    """Annotation of a parameter: finite, from `least`, below `end`; `each`: may be a list, one for each group."""

    least: float
    end: float = math.inf
    whole: bool = False
    each: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError for a value outside, or no number."""
        for one in value if self.each and isinstance(value, list | tuple) else [value]:
            number = isinstance(one, numbers.Real | torch.Tensor) and not isinstance(one, bool)
            if not (number and self.least <= one < self.end and not (self.whole and one % 1)):
                text = f"must be a {'whole' if self.whole else 'finite'} number of at least {self.least:g}"
                text += f" and below {self.end:g}" if self.end < math.inf else ""
                raise ConfigError(f"{name}: {text} (got {one!r})")


Rate = Annotated[float | Sequence[float], Range(0, each=True)]
Momentum = Annotated[float | Sequence[float], Range(0, 1, each=True)]
Factor = Annotated[float, Range(0)]
Steps = Annotated[int, Range(1, whole=True)]
Count = Annotated[int, Range(0, whole=True)]
Last = Annotated[int, Range(-1, whole=True)]


@dataclass(eq=False)
class Schedule:
    """What the five share; ``optimizer`` is anything with ``param_groups``."""

    optimizer: Any

    def __post_init__(self) -> None:
        self.last_batch_iteration: int
        self._check()
        if self.last_batch_iteration == -1:
            self._apply()

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at ``last_batch_iteration``."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """The learning rates that stand in the optimizer now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go one step on (or to ``last_batch_iteration``) and write the values into the parameter groups."""
        self.last_batch_iteration += 1
        if last_batch_iteration is not None:
            self.last_batch_iteration = last_batch_iteration
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_batch_iteration = state_dict["last_batch_iteration"]

    def _apply(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group["lr"], torch.Tensor) else lr

    def _check(self) -> None:
        """Raises ConfigError for a parameter out of the range in its annotation."""
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            for part in (hint, *typing.get_args(hint)):  # the annotation itself, or one of a union's
                for mark in getattr(part, "__metadata__", ()) if getattr(self, name) is not None else ():
                    mark.check(name, getattr(self, name))

    def _each(self, name: str) -> list[float]:
        value, count = getattr(self, name), len(self.optimizer.param_groups)
        values = list(value) if isinstance(value, Sequence) else [value] * count
        if len(values) != count:
            raise ConfigError(f"{name}: {len(values)} values for {count} parameter groups")
        return values


@dataclass(eq=False)
class LRRangeTest(Schedule):
    """Grow without bound: ``min_lr * (1 + rate * (steps + 1) / step_size)``; whole steps in a staircase."""

    lr_range_test_min_lr: Rate = 1e-3
    lr_range_test_step_size: Steps = 2000
    lr_range_test_step_rate: Factor = 1.0
    lr_range_test_staircase: bool = False
    last_batch_iteration: Last = -1

    def get_lr(self) -> list[float]:
        interval = (self.last_batch_iteration + 1) / self.lr_range_test_step_size
        growth = self.lr_range_test_step_rate * (math.floor(interval) if self.lr_range_test_staircase else interval)
        return [lr * (1 + growth) for lr in self._each("lr_range_test_min_lr")]


@dataclass(eq=False)
class OneCycle(Schedule):
    """Up and down between two rates, then decay; the first beta runs the other way round (arXiv 1803.09820)."""

    cycle_min_lr: Rate
    cycle_max_lr: Rate
    decay_lr_rate: Factor = 0.0
    cycle_first_step_size: Steps = 2000
    cycle_second_step_size: Count | None = None
    cycle_first_stair_count: Count = 0
    cycle_second_stair_count: Count | None = None
    decay_step_size: Count = 0
    cycle_momentum: bool = True
    cycle_min_mom: Momentum = 0.8
    cycle_max_mom: Momentum = 0.9
    decay_mom_rate: Factor = 0.0
    last_batch_iteration: Last = -1

    def __post_init__(self) -> None:
        size, stairs = self.cycle_second_step_size, self.cycle_second_stair_count
        self._sizes = (self.cycle_first_step_size, self.cycle_first_step_size if size is None else size)
        self._stairs = (self.cycle_first_stair_count, self.cycle_first_stair_count if stairs is None else stairs)
        self.cycle_momentum = self.cycle_momentum and all("betas" in group for group in self.optimizer.param_groups)
        super().__post_init__()

    def _place(self, rate: float) -> tuple[float, float]:
        """The height on the triangle, 0 to 1, and the factor of the decay that comes after it."""
        total = sum(self._sizes)
        past = self.last_batch_iteration - total
        if past >= 0:
            return 0.0, 1 + rate * (past + 1) / self.decay_step_size if self.decay_step_size else 1.0
        at = (self.last_batch_iteration + 1) % total
        half, way = (0, at) if at <= self._sizes[0] else (1, total - at)
        size, stairs = self._sizes[half], self._stairs[half]
        return (math.floor(way * stairs / size) / stairs if stairs else way / size), 1.0

    def get_lr(self) -> list[float]:
        height, factor = self._place(self.decay_lr_rate)
        pairs = zip(self._each("cycle_min_lr"), self._each("cycle_max_lr"), strict=True)
        return [(low + (high - low) * height) / factor for low, high in pairs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each group; None where momentum is not cycled (always so without betas)."""
        height, factor = self._place(self.decay_mom_rate)
        if self.last_batch_iteration < 0:  # until the first step DeepSpeed sets the lower end
            height = 1.0
        pairs = zip(self._each("cycle_min_mom"), self._each("cycle_max_mom"), strict=True)
        return [((high - (high - low) * height) * factor, 0.99) for low, high in pairs] if self.cycle_momentum else None

    def _apply(self) -> None:
        super()._apply()
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or [], strict=False):
            group["betas"] = betas


@dataclass(eq=False)
class _Warmup(Schedule):
    def __post_init__(self) -> None:
        self.warmup_num_steps: int
        self.warmup_type: str
        self._check()  # of the steps before they are made two
        if self.warmup_type not in ("log", "linear"):
            raise ConfigError(f"warmup_type: must be 'log' or 'linear' (got {self.warmup_type!r})")
        self.warmup_num_steps = max(2, self.warmup_num_steps)
        super().__post_init__()

    def _way(self) -> float:
        """How far the rate stands above its minimum, 0 to 1."""
        done, total = max(0, self.last_batch_iteration), self.warmup_num_steps
        if done >= total:
            return self._after(done)
        return done / total if self.warmup_type == "linear" else math.log(done + 1) / math.log(total)

    def _after(self, done: int) -> float:
        return 1.0

    def get_lr(self) -> list[float]:
        pairs = zip(self._each("warmup_min_lr"), self._each("warmup_max_lr"), strict=True)
        return [low + (high - low) * self._way() for low, high in pairs]


@dataclass(eq=False)
class WarmupLR(_Warmup):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` (None: each group's rate), then constant."""

    warmup_min_lr: Rate = 0.0
    warmup_max_lr: Rate | None = None
    warmup_num_steps: Steps = 1000
    warmup_type: Literal["log", "linear"] = "log"
    last_batch_iteration: Last = -1

    def __post_init__(self) -> None:
        if self.warmup_max_lr is None:
            self.warmup_max_lr = self.get_last_lr()
        super().__post_init__()


@dataclass(eq=False)
class WarmupDecayLR(_Warmup):
    """Warm up, then fall in a straight line, reaching ``warmup_min_lr`` at ``total_num_steps``."""

    total_num_steps: Steps
    warmup_min_lr: Rate = 0.0
    warmup_max_lr: Rate = 0.001
    warmup_num_steps: Steps = 1000
    warmup_type: Literal["log", "linear"] = "log"
    last_batch_iteration: Last = -1

    def _after(self, done: int) -> float:
        return max(0.0, (self.total_num_steps - done) / max(1.0, self.total_num_steps - self.warmup_num_steps))


@dataclass(eq=False)
class WarmupCosineLR(_Warmup):
    """Ratios of each group's own rate: from ``warmup_min_ratio`` to 1, then half a cosine down to ``cos_min_ratio``."""

    total_num_steps: Steps
    warmup_min_ratio: Factor = 0.0
    warmup_num_steps: Steps = 1000
    cos_min_ratio: Factor = 0.0001
    warmup_type: Literal["log", "linear"] = "log"
    last_batch_iteration: Last = -1

    def __post_init__(self) -> None:
        self.org_lrs = self.get_last_lr()
        super().__post_init__()

    def _after(self, done: int) -> float:
        progress = (done - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps)
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def get_lr(self) -> list[float]:
        done, ratio = self.last_batch_iteration, self._way()
        if done < self.warmup_num_steps:  # the very first step is taken with zero, as in DeepSpeed
            ratio = self.warmup_min_ratio + ratio * (1 - self.warmup_min_ratio) if done >= 0 else 0.0
        return [lr * ratio for lr in self.org_lrs]


_LEAST = {"step_size": 1, "T_max": 1, "total_iters": 0, "gamma": 0, "power": 0, "eta_min": 0}


def first_step(schedule: Any) -> None:
    """Step a schedule, torch's or one of these, and its optimizer, once: what torch does not check shows then.

    Raises:
        ConfigError: a parameter that torch takes and cannot use, a step that fails, or a rate below 0 or not finite.
    """
    name = type(schedule).__name__
    low = {key: value for key in _LEAST if isinstance(value := getattr(schedule, key, None), int | float)}
    low = {key: value for key, value in low.items() if value < _LEAST[key]}
    if low:
        texts = {key: f"{name}: must be at least {_LEAST[key]} (got {value!r})" for key, value in low.items()}
        raise config_error([Problem(("params", key), text) for key, text in texts.items()])
    rates = schedule.get_last_lr()
    try:
        schedule.optimizer.step()
        schedule.step()
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise config_error([Problem(("params",), f"{name}: step() fails: {error}")]) from error
    for rate in map(float, [*rates, *schedule.get_last_lr()]):
        if not 0 <= rate < math.inf:
            raise config_error([Problem(("params",), f"{name}: a learning rate becomes {rate:g}")])
