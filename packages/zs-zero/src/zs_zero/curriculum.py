"""Curriculum learning by sequence length: short sequences first, as a function of the optimizer step.

Stability-efficiency dilemma (arXiv 2108.06084), section 4; the schedules, their rounding and the `curriculum_learning`
section are DeepSpeed's. The engine hands `curriculum_seqlen` to the model's forward, which cuts its batch to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from zs_comm import ConfigError
from zs_comm.keys import DeepSpeedSection

Count = Annotated[int, Field(ge=1)]
_NEEDED = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "custom": (),
}


class ScheduleConfig(DeepSpeedSection):
    """`curriculum_learning.schedule_config`: what the schedule's type needs, and nothing else."""

    total_curriculum_step: Count | None = Field(default=None, description="steps from the least to the greatest length")
    difficulty_step: Count | None = Field(default=None, description="tokens; every length is a multiple of it")
    root_degree: Count | None = Field(default=None, description="2: square root; 1: a straight line")
    difficulty: list[Count] | None = Field(default=None, description="tokens; the lengths in turn")
    max_step: list[Count] | None = Field(default=None, description="last step of each length but the last")

    @model_validator(mode="after")
    def _one_length_more(self) -> ScheduleConfig:
        if self.difficulty is not None and self.max_step is not None:
            if not self.max_step or len(self.difficulty) != len(self.max_step) + 1:
                sizes = f"{len(self.difficulty)} lengths and {len(self.max_step)} steps"
                raise ValueError(f"difficulty needs one entry more than max_step, which needs one (got {sizes})")
            if sorted(set(self.max_step)) != self.max_step:
                raise ValueError(f"max_step should grow (got {self.max_step})")
        return self


class CurriculumConfig(DeepSpeedSection):
    """`curriculum_learning` at the top level (DeepSpeed's legacy section; its newest releases want another one)."""

    enabled: bool = Field(default=False, description="hand curriculum_seqlen to the model's forward in training")
    curriculum_type: Literal["seqlen"] = Field(default="seqlen", description="what grows: the length of a sample")
    min_difficulty: Count | None = Field(default=None, description="tokens at the first step")
    max_difficulty: Count | None = Field(default=None, description="tokens at the end")
    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"] | None = Field(
        default=None, description="custom: Engine.set_custom_curriculum_learning_schedule"
    )
    schedule_config: ScheduleConfig = ScheduleConfig()

    @field_validator("max_difficulty", mode="after")
    @classmethod
    def _not_below_the_least(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_difficulty")
        if value is not None and least is not None and value < least:
            raise ValueError(f"Input should be at least min_difficulty, {least}")
        return value

    @model_validator(mode="after")
    def _complete(self) -> CurriculumConfig:
        if not self.enabled:
            return self
        missing = [k for k in ("min_difficulty", "max_difficulty", "schedule_type") if getattr(self, k) is None]
        needed = _NEEDED[self.schedule_type or "custom"]
        missing += [f"schedule_config.{key}" for key in needed if getattr(self.schedule_config, key) is None]
        if missing:
            kind = f"the schedule {self.schedule_type!r}" if self.schedule_type else "an enabled curriculum"
            raise ValueError(f"{kind} needs {', '.join(missing)}")
        return self

    def pacer(self) -> Curriculum | None:
        """The curriculum; None while it is not enabled."""
        if not self.enabled or self.min_difficulty is None or self.max_difficulty is None:
            return None
        given = {key: getattr(self.schedule_config, key) for key in _NEEDED[self.schedule_type or "custom"]}
        return Curriculum(self.min_difficulty, self.max_difficulty, self.schedule_type or "custom", **given)


class Curriculum:
    """The sequence length of each optimizer step.

    Steps count from 1, the first update. Linear and root: `min + (max - min) * (step / total) ** (1 / degree)`, rounded
    down to a multiple of `difficulty_step`, never under the first multiple from `min` on nor over `max`. Discrete:
    `difficulty[i]` up to and with step `max_step[i]`, then the last one. Once `max` is reached it stays.

    Attributes:
        current_difficulty: tokens, of the last step asked for.
    """

    needs: tuple[str, ...] = ("curriculum_seqlen",)

    def __init__(
        self,
        min_difficulty: int,
        max_difficulty: int,
        schedule_type: str,
        *,
        total_curriculum_step: int = 1,
        difficulty_step: int = 1,
        root_degree: int = 1,
        difficulty: list[int] | None = None,
        max_step: list[int] | None = None,
    ) -> None:
        self.min_difficulty, self.max_difficulty = min_difficulty, max_difficulty
        self.current_difficulty = min_difficulty
        self._total, self._multiple, self._degree = total_curriculum_step, difficulty_step, root_degree
        self._stairs = list(zip(max_step or [], difficulty or [], strict=False)), (difficulty or [max_difficulty])[-1]
        self._at: Callable[[int], int] | None = {
            "fixed_linear": self._root, "fixed_root": self._root, "fixed_discrete": self._discrete
        }.get(schedule_type)  # fmt: skip

    def set_custom_schedule(self, schedule: Callable[[int], int] | Mapping[str, Callable[[int], int]]) -> None:
        """`callable(step) -> tokens` (or `{"seqlen": callable}`) in the place of the configured schedule."""
        self._at = schedule["seqlen"] if isinstance(schedule, Mapping) else schedule

    def update_difficulty(self, step: int) -> int:
        """Tokens at `step` (1: the first update)."""
        if self._at is None:
            raise ConfigError(
                "curriculum_learning.schedule_type is 'custom': give the schedule to "
                "engine.set_custom_curriculum_learning_schedule({'seqlen': callable}) before the first forward"
            )
        if self.current_difficulty < self.max_difficulty:
            self.current_difficulty = self._at(step)
        return self.current_difficulty

    def arguments(self, done: int) -> dict[str, Any]:
        """What forward gets when `done` updates lie behind."""
        return {"curriculum_seqlen": self.update_difficulty(done + 1)}

    def state_dict(self) -> dict[str, Any]:
        return {"current_difficulty": self.current_difficulty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.current_difficulty = state["current_difficulty"]

    def _root(self, step: int) -> int:
        way: float = (step / self._total) ** (1.0 / self._degree)
        length = math.floor(way * (self.max_difficulty - self.min_difficulty) + self.min_difficulty)
        least = -(-self.min_difficulty // self._multiple) * self._multiple
        return min(max(length - length % self._multiple, least), self.max_difficulty)

    def _discrete(self, step: int) -> int:
        stairs, last = self._stairs
        return next((length for end, length in stairs if step <= end), last)
