"""What is not sharded, as Shardables: modules, optimizers, and whatever has `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from zs_comm import ConfigError, Group

from .modules import ModuleState
from .optimizers import OptimizerState
from .shardable import PROTOCOL, Piece, Shardable, TensorSpec


def shardable_of(
    value: Any, *, group: Group, strict: bool = True, state: Mapping[str, Any] | None = None
) -> Shardable | None:
    """The Shardable for a module, an optimizer or anything with a `state_dict`; None for what is none of these.

    Args:
        group: the ranks that save or load.
        strict: whether a module's names on one side only are an error.
        state: the dictionary that `value` is in: optimizers find the names of their parameters in its modules.

    Raises:
        ConfigError: for FSDP1's wrapper, and for a thing that gives its state and does not take it back.
    """
    if isinstance(value, nn.Module):
        return ModuleState(value, group, strict=strict)
    if isinstance(value, torch.optim.Optimizer):
        return OptimizerState(value, group, state=state or {}, strict=strict)
    if callable(getattr(value, "state_dict", None)):
        if not callable(getattr(value, "load_state_dict", None)):
            raise ConfigError(f"a {type(value).__name__} has state_dict() and no load_state_dict()")
        return Stateful(value)
    return None


class Stateful:
    """The state of a scheduler, a scaler, a loader or a sampler: values that JSON (and little tensors) can hold."""

    PROTOCOL = PROTOCOL

    def __init__(self, value: Any) -> None:
        self._value = value

    def pieces(self) -> Iterator[Piece]:
        return iter(())

    def objects(self) -> Mapping[str, Any]:
        return {"class": type(self._value).__name__, "state": self._value.state_dict()}

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        if "state" not in objects:
            raise ConfigError(f"the checkpoint holds no state of a {type(self._value).__name__}")
        return iter(())

    def finish(self, objects: Mapping[str, Any]) -> None:
        self._value.load_state_dict(objects["state"])
