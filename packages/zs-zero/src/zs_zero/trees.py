"""Tensors inside whatever a module takes or returns: tuples, dicts, named tuples, dataclasses, registered pytrees."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor of `tree`, depth first."""
    if isinstance(tree, torch.Tensor):  # the common case, without a pytree walk
        yield tree
        return
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from tensors_in(getattr(leaf, field.name, None))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, torch.nn.Module | type) and not callable(leaf):
            yield from tensors_in(dict(vars(leaf)))


def argument_elsewhere(
    module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> str | None:
    """In words, the first tensor of a forward's arguments that is on another device than the model."""
    names = [name for name in inspect.signature(module.forward).parameters if name not in kwargs]
    names += [f"#{i}" for i in range(len(names), len(inputs))]
    for name, argument in [*zip(names, inputs, strict=False), *kwargs.items()]:
        for path, leaf in pytree.tree_flatten_with_path(argument)[0]:
            if isinstance(leaf, torch.Tensor) and leaf.device != device:
                return f"argument {name}{pytree.keystr(path)} of forward is on {leaf.device}"
    return None
