"""The hyper-parameters of an optimizer's groups, which have to be the same on all ranks that share a parameter."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

_NAMES = ("lr", "betas", "momentum", "weight_decay", "eps")


class Settings:
    """Those of the groups that hold a parameter which is not `alone` (each rank's own, and so may its settings be)."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], alone: Callable[[nn.Parameter], bool]) -> None:
        self._all = list(groups)
        self._groups = [group for group in self._all if not all(alone(param) for param in group["params"])]

    def __str__(self) -> str:
        return repr([{name: _number(group[name]) for name in _NAMES if name in group} for group in self._groups])

    def everything(self) -> str:
        """All that an update may depend on, as text; waits for values on a device."""
        return repr([{k: _text(v) for k, v in group.items() if k != "params"} for group in self._all])


def _text(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _number(value: Any) -> Any:
    """A value as it reads; one on a device is not waited for, and says nothing."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" and value.numel() == 1 else None
    return value
