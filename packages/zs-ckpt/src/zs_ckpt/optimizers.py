"""A torch optimizer as a Shardable: states by the names of parameters, hyper-parameters as objects.

`<state>/<parameter>`, as zs-zero names them, so that either loads what the other saved. The names come from the modules
of the same `state`; a parameter of none of them is called by its number in the optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, Group

from .dtensors import is_dtensor, local, piece_of
from .modules import misfit, unwrapped
from .shardable import PROTOCOL, Piece, TensorSpec

_log = logging.getLogger("zs_ckpt")
_WINDOW = ("grad/", "local_grad/", "local/")  # of a sharded optimizer: an open window, and what was one rank's own
_HOW = ("foreach", "fused", "capturable", "differentiable")  # how the step is computed here, no state of a training


class OptimizerState:
    """States and hyper-parameters of `optimizer`. A load makes states that do not exist yet."""

    PROTOCOL = PROTOCOL

    def __init__(
        self, optimizer: torch.optim.Optimizer, group: Group, *, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        self.strict = strict
        self._optimizer = optimizer
        self._rank, self._world = group.rank, group.size
        self._names = names_of(optimizer, state)
        self._loaded: list[tuple[Tensor, str, Tensor, Tensor]] = []  # (parameter, key, state, what was filled)

    # -- save ---------------------------------------------------------------------------------------------------------
    def pieces(self) -> Iterator[Piece]:
        for name, param in self._names.items():
            for key, value in self._optimizer.state.get(param, {}).items():
                tensor = _as_tensor(key, value)
                if tensor is not None:
                    data = local(tensor).contiguous()
                    piece = piece_of(f"{key}/{name}", tensor, data, rank=self._rank, world=self._world)
                    if piece is not None:
                        yield piece

    def objects(self) -> Mapping[str, Any]:
        numbers: dict[str, str] = {}
        for state in self._optimizer.state.values():
            numbers |= {key: type(v).__name__ for key, v in state.items() if isinstance(v, bool | int | float)}
        by_id = {id(param): name for name, param in self._names.items()}
        groups = [
            {"params": [by_id[id(param)] for param in group["params"]]} | _plain(group, number)
            for number, group in enumerate(self._optimizer.param_groups)
        ]
        kind = type(self._optimizer).__name__
        return {"world": self._world, "class": kind, "numbers": dict(sorted(numbers.items())), "param_groups": groups}

    # -- load ---------------------------------------------------------------------------------------------------------
    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        self._match(saved, objects)
        self._loaded = []
        groups = {id(param): group for group in self._optimizer.param_groups for param in group["params"]}
        for full, spec in saved.items():
            if full.startswith(_WINDOW):
                continue
            key, _, name = full.partition("/")
            param = self._names[name]
            value = self._state_for(param, key, spec, groups[id(param)])
            data = local(value)
            data = data if data.is_contiguous() else torch.empty_like(data, memory_format=torch.contiguous_format)
            self._loaded.append((param, key, value, data))
            piece = piece_of(full, value, data, spec=TensorSpec(full, tuple(value.shape), data.dtype))
            if piece is not None:
                yield piece

    def _state_for(self, param: Tensor, key: str, saved: TensorSpec, group: Mapping[str, Any]) -> Tensor:
        """The state that there is, or a new one: where and in what dtype torch's `load_state_dict` would make it."""
        value = self._optimizer.state.get(param, {}).get(key)
        if isinstance(value, Tensor) and tuple(value.shape) == tuple(saved.shape):
            return value
        dtype, device = saved.dtype, param.device
        if key == "step":
            device = device if group.get("capturable") or group.get("fused") else torch.device("cpu")
        elif dtype.is_floating_point and param.is_floating_point() and saved.shape:
            dtype = param.dtype
        if tuple(saved.shape) == tuple(param.shape) and (saved.shape or key != "step"):
            with torch.no_grad():
                return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return torch.zeros(tuple(saved.shape), dtype=dtype, device=device)

    def _match(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> None:
        if "param_groups" not in objects:
            raise ConfigError("the checkpoint holds no optimizer state: load it without the optimizer")
        theirs, mine = objects["param_groups"], self._optimizer.param_groups
        by_id = {id(param): name for name, param in self._names.items()}
        problems = [f"{len(theirs)} parameter groups, the optimizer has {len(mine)}"] * (len(theirs) != len(mine))
        frozen = {name for name, param in self._names.items() if not param.requires_grad}  # they have no state
        for number, (there, here) in enumerate(zip(theirs, mine, strict=False)):
            own = {by_id[id(param)] for param in here["params"]} - frozen
            if differing := sorted(own ^ (set(there["params"]) - frozen)):
                side = "not in the checkpoint's" if differing[0] in own else "in the checkpoint's only"
                problems.append(f"parameter group {number}: {differing[0]} ({len(differing)} differ) is {side}")
        for full, spec in saved.items():
            _, _, name = full.partition("/")
            if full.startswith(_WINDOW):
                continue
            if name not in self._names:
                problems.append(f"{full}: there is no such parameter")
            elif is_dtensor(self._names[name]) and tuple(spec.shape) not in ((), tuple(self._names[name].shape)):
                problems.append(f"{full}: shape {tuple(spec.shape)} fits whole parameters only")
        if problems:
            raise misfit("the optimizer", problems)
        if any(full.startswith(("grad/", "local_grad/")) for full in saved):
            _log.warning("the checkpoint was taken inside an accumulation window, whose gradients are left out here")

    def finish(self, objects: Mapping[str, Any]) -> None:
        numbers = objects.get("numbers", {})
        kinds = {"int": int, "float": float, "bool": bool}
        for param in self._names.values():
            self._optimizer.state.pop(param, None)
        with torch.no_grad():
            for param, key, value, data in self._loaded:
                if local(value).data_ptr() != data.data_ptr():
                    local(value).copy_(data)
                self._optimizer.state[param][key] = kinds[numbers[key]](value.item()) if key in numbers else value
        for group, there in zip(self._optimizer.param_groups, objects["param_groups"], strict=True):
            for key, value in there.items():
                if key == "params" or key in _HOW:
                    continue
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value
        self._loaded = []


def names_of(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The optimizer's parameters by name; two modules with a name in common lend theirs with their key before it."""
    modules = {key: unwrapped(value) for key, value in state.items() if isinstance(value, nn.Module)}
    found: dict[int, list[tuple[str, str]]] = {}
    for key, module in modules.items():
        for name, param in module.named_parameters():
            found.setdefault(id(param), []).append((key, name))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    plain = [found[id(param)][0][1] for param in params if id(param) in found]
    several = len(set(plain)) < len(plain)
    names: dict[str, Tensor] = {}
    for number, param in enumerate(params):
        key, name = found.get(id(param), [("", str(number))])[0]
        names[f"{key}.{name}" if several and key else name] = param
    return names


def _as_tensor(key: Any, value: Any) -> Tensor | None:
    if not isinstance(key, str) or "/" in key or f"{key}/" in _WINDOW:
        raise ConfigError(f"an optimizer state named {key!r} cannot be saved")
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if value is None or isinstance(value, Tensor):
        return value
    raise ConfigError(f"optimizer state {key!r} is a {type(value).__name__}, neither tensor nor number")


def _plain(group: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A group's hyper-parameters; 0-dim tensors as numbers, which in fp64 they are exactly."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ConfigError(f"param_groups[{number}][{key!r}] is a tensor of shape {tuple(value.shape)}")
            value = value.item()
        found[key] = value
    return found
