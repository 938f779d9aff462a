"""Tensors inside whatever a module takes or returns: tuples, dicts, named tuples, dataclasses, registered pytrees."""

import dataclasses
from collections.abc import Iterator
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
