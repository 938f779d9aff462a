"""What happens to a forward of a model on mixed precision: inputs cast, `torch.autocast` around it.

Both are hooks on the model itself, so they are there however its forward is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def install(
    model: nn.Module, device: torch.device, *, cast_inputs: torch.dtype | None, autocast: torch.dtype | None
) -> Iterator[Any]:
    """Puts the hooks there; their handles."""
    if cast_inputs is not None:
        yield model.register_forward_pre_hook(partial(_cast, cast_inputs), with_kwargs=True)
    if autocast is not None:
        around = _Autocast(device.type, autocast)
        yield model.register_forward_pre_hook(around.enter)
        yield model.register_forward_hook(around.leave, always_call=True)


def _cast(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Floating-point tensors of a forward's arguments, however nested, in `dtype`."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    cast_args, cast_kwargs = pytree.tree_map(cast, (args, kwargs))
    return cast_args, cast_kwargs


class _Autocast:
    """`torch.autocast` from the hook before a forward to the one after it, also where the forward raises."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self._how = (device_type, dtype)
        self._open: list[torch.autocast] = []

    def enter(self, *_: Any) -> None:
        context = torch.autocast(self._how[0], self._how[1])
        context.__enter__()
        self._open.append(context)

    def leave(self, *_: Any) -> None:
        if self._open:  # empty where a hook before `enter` raised
            self._open.pop().__exit__(None, None, None)
