"""The section of a DeepSpeed configuration that names a learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import lr_scheduler
from zs_comm.config import Problem, config_error
from zs_comm.factory import TypeAndParams, classes_of

from . import schedules

_CODE = "its argument is a function, which a configuration cannot write"
_OBJECTS = "its argument is a list of schedules, which a configuration cannot write"
REFUSED: Mapping[str, str] = {
    "ReduceLROnPlateau": "its step() needs a metric, and the engine steps a schedule without one",
    "LambdaLR": _CODE,
    "MultiplicativeLR": _CODE,
    "SequentialLR": _OBJECTS,
    "ChainedScheduler": _OBJECTS,
}
"""Classes of torch.optim.lr_scheduler that a configuration cannot use, with the reason."""


class SchedulerConfig(TypeAndParams):
    """`scheduler`: one of zs_zero.schedules or a class of torch.optim.lr_scheduler."""

    def factory(self) -> Callable[[Any], Any] | None:
        """`callable(optimizer)`; None where no type is given. Raises ConfigError."""
        if self.type is None:
            return None
        if self.type in REFUSED:
            text = f"{self.type}: {REFUSED[self.type]}; make it and give it to initialize(lr_scheduler=...)"
            raise config_error([Problem(("type",), text, kind="refused")])
        five = {name: getattr(schedules, name) for name in schedules.__all__}
        known = classes_of(lr_scheduler, lr_scheduler.LRScheduler) | five
        return self.maker("scheduler", known, self.type, self.given)
