"""The state that a caller passes, as Shardables by key."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from zs_comm import ConfigError, Group

from .names import check_key
from .nested import Nested, holds_state
from .shardable import PROTOCOL, Shardable
from .trees import Tree


def shardables(state: Mapping[str, Any], group: Group, *, strict: bool = True) -> dict[str, Shardable]:
    """One Shardable for each key.

    A value that has `__zs_shardable__()` gives its own; modules, optimizers and whatever has a `state_dict` are adapted
    (`plain`); tensors, dictionaries, lists and JSON values are taken as they are (`trees`).

    Raises:
        ConfigError: a key is no str or has a `/` in it, a value is none of these, or its Shardable keeps another
            version of the contract.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f"state is a {type(state).__name__}; it is a dictionary of what to save by name")
    return {check_key(key): _shardable(key, value, group, strict, state) for key, value in state.items()}


def full_name(key: str, name: str) -> str:
    """A tensor's name in the checkpoint: `<key>/<name>`; a bare tensor's is its key."""
    return f"{key}/{name}" if name else key


def _shardable(key: str, value: Any, group: Group, strict: bool, state: Mapping[str, Any]) -> Shardable:
    made: Any = None
    if callable(make := getattr(value, "__zs_shardable__", None)):  # None in a copy of a sharded model
        made = make()
        if not strict and hasattr(made, "strict"):
            made.strict = False
    elif isinstance(value, Shardable):
        made = value
    elif isinstance(value, Mapping) and holds_state(value):
        around = {**state, **value}  # in which optimizers find their parameters
        made = Nested(value, lambda name, item: _shardable(check_key(name), item, group, strict, around))
    elif not isinstance(value, Tensor | Mapping | list | tuple) and importlib.util.find_spec(f"{__package__}.plain"):
        plain = importlib.import_module(f"{__package__}.plain")
        made = plain.shardable_of(value, group=group, strict=strict, state=state)
    if made is None:
        return Tree(key, value, group, strict=strict)
    version = getattr(made, "PROTOCOL", None)
    if version != PROTOCOL:
        raise ConfigError(
            f"state[{key!r}]: {type(made).__name__} keeps version {version} of Shardable; version {PROTOCOL} is needed"
        )
    return made  # type: ignore[no-any-return]
