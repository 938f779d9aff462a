"""What changes with the step and reaches the model as arguments of its forward: a curriculum, dropped layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from zs_comm import ConfigError


class Pacer(Protocol):
    """One of them; `needs` are the arguments it hands on."""

    @property
    def needs(self) -> tuple[str, ...]: ...
    def arguments(self, done: int) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Pacing:
    """The pacers of a run by their configuration's sections; empty, and then free, in most.

    Raises:
        ConfigError: the model's forward does not take what a pacer hands it.
    """

    def __init__(self, pacers: Mapping[str, Pacer | None], module: nn.Module) -> None:
        self.pacers = {name: pacer for name, pacer in pacers.items() if pacer is not None}
        for name, pacer in self.pacers.items():
            taken = inspect.signature(module.forward).parameters.values()
            any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
            lacking = [] if any_name else [key for key in pacer.needs if key not in {p.name for p in taken}]
            if lacking:
                raise ConfigError(
                    f"{name}.enabled: the forward of {type(module).__name__} would be given {' and '.join(lacking)} "
                    f"and takes no such argument"
                )

    def __bool__(self) -> bool:
        return bool(self.pacers)

    def arguments(self, done: int) -> dict[str, Any]:
        """What a forward in training gets besides its own, when `done` updates lie behind."""
        found: dict[str, Any] = {}
        for pacer in self.pacers.values():
            found |= pacer.arguments(done)
        return found

    def set_custom_schedule(self, schedule: Any) -> None:
        """`{"seqlen": callable(step) -> tokens}` for a curriculum whose schedule type is "custom"."""
        curriculum: Any = self.pacers.get("curriculum_learning")
        if curriculum is None:
            raise ConfigError("set_custom_curriculum_learning_schedule: curriculum_learning is not enabled")
        curriculum.set_custom_schedule(schedule)

    def state_dict(self) -> dict[str, Any]:
        return {name: pacer.state_dict() for name, pacer in self.pacers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.pacers.keys() & state.keys():
            self.pacers[name].load_state_dict(state[name])
