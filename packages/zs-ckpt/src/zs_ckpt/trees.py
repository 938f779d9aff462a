"""Plain values as a Shardable: a tensor, or dictionaries and lists of tensors and of values that JSON can hold.

Every rank has the same values; they share the writing. Loading fills the tensors in place and sets the other leaves in
their containers; an empty dictionary is filled with everything that was saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from zs_comm import ConfigError, Group

from .boxes import whole
from .dtensors import local, piece_of
from .shardable import PROTOCOL, Piece, TensorSpec

Keys = tuple[Any, ...]


class Tree:
    """`value` of the state's `key`, held alike by all ranks of `group`."""

    PROTOCOL = PROTOCOL

    def __init__(self, key: str, value: Any, group: Group, *, strict: bool = True) -> None:
        self._key, self._value, self._group, self._strict = key, value, group, strict
        self._after: list[tuple[Tensor, Tensor]] = []  # (from, to), for places that are not contiguous
        self._made: list[tuple[Keys, Tensor]] = []

    def pieces(self) -> Iterator[Piece]:
        for name, (_, tensor) in self._tensors.items():
            yield from self._pieces(name, tensor, Tensor.contiguous)

    def objects(self) -> Mapping[str, Any]:
        leaves = [[list(keys), leaf] for keys, leaf in self._leaves if not isinstance(leaf, Tensor)]
        paths = {name: list(keys) for name, (keys, _) in self._tensors.items()}
        return {"leaves": leaves, "paths": paths}

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        self._after, self._made = [], []
        if isinstance(self._value, dict) and not self._value:
            for name, spec in saved.items():
                tensor = torch.empty(spec.shape, dtype=spec.dtype)
                self._made.append((tuple(objects["paths"].get(name, [name])), tensor))
                yield Piece(spec, whole(spec.shape), tensor)
            return
        mine = {name: tensor for name, (_, tensor) in self._tensors.items()}
        self._check(mine, saved)
        for name in mine:
            if name in saved:
                yield from self._pieces(name, mine[name], self._place)

    def finish(self, objects: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for made, tensor in self._after:
                tensor.copy_(made)
        fill = isinstance(self._value, dict) and not self._value
        for keys, tensor in self._made:
            _set(self._value, keys, tensor, make=True)
        for keys, leaf in objects["leaves"]:
            if keys:
                _set(self._value, tuple(keys), leaf, make=fill)
        self._after, self._made = [], []

    @functools.cached_property
    def _leaves(self) -> list[tuple[Keys, Any]]:
        return list(_leaves(self._value, ()))

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[Keys, Tensor]]:
        found: dict[str, tuple[Keys, Tensor]] = {}
        for keys, leaf in self._leaves:
            if isinstance(leaf, Tensor):
                name = "/".join(str(key) for key in keys)
                if name in found:
                    raise ConfigError(f"state[{self._key!r}]: two tensors are called {name!r}")
                if leaf.layout != torch.strided or leaf.is_quantized:
                    raise ConfigError(f"state[{self._key!r}]: the tensor {name!r} is {leaf.layout}, not strided")
                found[name] = keys, leaf
        return found

    def _pieces(self, name: str, tensor: Tensor, data: Callable[[Tensor], Tensor]) -> Iterator[Piece]:
        piece = piece_of(name, tensor, data(local(tensor)), rank=self._group.rank, world=self._group.size)
        if piece is not None:
            yield piece

    def _place(self, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return tensor
        made = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._after.append((made, tensor))
        return made

    def _check(self, mine: Mapping[str, Tensor], saved: Mapping[str, TensorSpec]) -> None:
        problems = [
            f"{name}: {tuple(tensor.shape)} here and {saved[name].shape} in the checkpoint"
            for name, tensor in mine.items()
            if name in saved and tuple(tensor.shape) != saved[name].shape
        ]
        if self._strict:
            problems += [f"{name}: not in the checkpoint" for name in mine if name not in saved]
            problems += [f"{name}: in the checkpoint and not here" for name in saved if name not in mine]
        if problems:
            raise ConfigError(f"state[{self._key!r}] does not match the checkpoint:\n  " + "\n  ".join(problems[:20]))


def _leaves(value: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    if isinstance(value, Tensor):
        yield keys, value
    elif isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*keys, key))
    elif isinstance(value, list | tuple) and any(_has_tensor(item) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*keys, index))
    else:
        yield keys, value


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensor, value)))


def _set(root: Any, keys: Keys, value: Any, *, make: bool) -> None:
    """Put a leaf where it belongs; where its container is not there, or cannot be changed, it stays as it is."""
    for key in keys[:-1]:
        if make and isinstance(root, MutableMapping):
            root = root.setdefault(key, {})
        else:
            try:
                root = root[key]
            except (KeyError, IndexError, TypeError):
                return
    if isinstance(root, MutableMapping) or (isinstance(root, list) and keys[-1] < len(root)):
        root[keys[-1]] = value
