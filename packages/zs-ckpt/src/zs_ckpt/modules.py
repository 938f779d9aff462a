"""A plain module as a Shardable: also under DDP, compiled, or with DTensor parameters (FSDP2, tensor parallelism).

Parameters are the same on every rank, or DTensors. Buffers may differ (batch statistics): rank 0's are everybody's, and
each rank's own are kept beside them (`local/<name>`) for a load by as many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, Group

from .boxes import whole
from .dtensors import is_dtensor, local, piece_of
from .shardable import PROTOCOL, Piece, TensorSpec

_SHOWN = 8  # problems named in an error


class ModuleState:
    """Parameters (tied ones once), persistent buffers and extra state."""

    PROTOCOL = PROTOCOL

    def __init__(self, module: nn.Module, group: Group, *, strict: bool = True) -> None:
        self.strict = strict
        self._module = unwrapped(module)
        self._rank, self._world = group.rank, group.size
        self._copies: list[tuple[Tensor, Tensor]] = []  # (where to, from)
        self._by_hooks: dict[str, Tensor] = {}
        for part in self._module.modules():
            if type(part).__name__ == "FullyShardedDataParallel":
                raise ConfigError("FullyShardedDataParallel (FSDP1) hides its parameters: use fully_shard, or zs_zero")

    # -- save ---------------------------------------------------------------------------------------------------------
    def pieces(self) -> Iterator[Piece]:
        tensors, _ = self._tensors()
        for name, tensor in tensors.items():
            data = local(tensor).contiguous()
            if isinstance(tensor, nn.Parameter) or is_dtensor(tensor):
                piece = piece_of(name, tensor, data, rank=self._rank, world=self._world)
                if piece is not None:
                    yield piece
                continue
            spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
            if self._rank == 0:
                yield Piece(spec, whole(spec.shape), data)
            if self._world > 1:
                own = TensorSpec(f"local/{name}", spec.shape, spec.dtype)
                yield Piece(own, whole(spec.shape), data, scope="rank")

    def objects(self) -> Mapping[str, Any]:
        _, tied = self._tensors()
        extra = {name: value for name, value in self._state().items() if name.endswith("_extra_state")}
        return {"world": self._world, "tied": tied, "extra": extra}

    def _state(self) -> dict[str, Any]:
        return dict(self._module.state_dict(keep_vars=True))

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Each tensor under its first name, and {further name: first name}."""
        first: dict[int, str] = {}
        found: dict[str, Tensor] = {}
        tied: dict[str, str] = {}
        for name, value in self._state().items():
            if name.endswith("_extra_state"):
                continue
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"state_dict() of {type(self._module).__name__} has a {type(value).__name__} {name!r}"
                )
            if first.setdefault(id(value), name) == name:
                found[name] = value
            else:
                tied[name] = first[id(value)]
        return found, tied

    # -- load ---------------------------------------------------------------------------------------------------------
    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        tensors, tied = self._tensors()
        found = self._match(saved, tensors, tied, objects.get("tied", {}))
        live = {id(tensor) for tensor in (*self._module.parameters(), *self._module.buffers())}
        same_world = objects.get("world") == self._world
        self._copies, self._by_hooks = [], {}
        for name, source in found.items():
            tensor = tensors[name]
            data = held = local(tensor)
            if id(tensor) not in live:  # made by a hook: the module takes it back by load_state_dict
                self._by_hooks[name] = data = torch.empty_like(held, memory_format=torch.contiguous_format)
            elif not held.is_contiguous():
                data = torch.empty_like(held, memory_format=torch.contiguous_format)
                self._copies.append((held, data))
            spec = TensorSpec(source, tuple(tensor.shape), data.dtype)
            buffer = not isinstance(tensor, nn.Parameter) and not is_dtensor(tensor)
            if buffer and same_world and f"local/{source}" in saved:
                own = TensorSpec(f"local/{source}", spec.shape, spec.dtype)
                yield Piece(own, whole(spec.shape), data, scope="rank")
                continue
            piece = piece_of(source, tensor, data, spec=spec)
            if piece is not None:
                yield piece

    def finish(self, objects: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for held, data in self._copies:
                held.copy_(data)
        extra = {name: value for name, value in objects.get("extra", {}).items() if name in self._state()}
        if self._by_hooks or extra:
            self._module.load_state_dict({**self._by_hooks, **extra}, strict=False)
        self._copies, self._by_hooks = [], {}

    def _match(
        self, saved: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor], tied: Mapping[str, str],
        theirs: Mapping[str, str],
    ) -> dict[str, str]:  # fmt: skip
        """{name of a tensor here: name of its values in the checkpoint}."""
        others: dict[str, list[str]] = {name: [] for name in tensors}
        for alias, first in tied.items():
            others[first].append(alias)
        found, problems = {}, []
        for name, tensor in tensors.items():
            candidates = [n for n in (name, *others[name], theirs.get(name, name)) if n in saved]
            if not candidates:
                problems += [f"{name}: missing"] if self.strict else []
            elif tuple(saved[candidates[0]].shape) != tuple(tensor.shape):
                there, here = tuple(saved[candidates[0]].shape), tuple(tensor.shape)
                problems.append(f"{name}: shape {there}, the model has {here}")
            else:
                found[name] = candidates[0]
        if self.strict:
            known = {*tensors, *tied, *found.values()}
            problems += [f"{n}: not in the model" for n in saved if n not in known and not n.startswith("local/")]
        if problems:
            raise misfit("the model", problems)
        return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The client's own module, whose names the checkpoint has: without DDP's and the compiler's wrapping."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif isinstance(inner := vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def misfit(what: str, problems: list[str]) -> ConfigError:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ConfigError(f"the checkpoint does not fit {what}: " + "; ".join(problems[:_SHOWN]) + more)
