"""The optimizer's half of `zs_zero.checkpoint`: its states by name, its hyper-parameters, an open window.

A state of a parameter's shape is cut like the parameter. One of no dimension (a step counter) is the same for all of a
parameter's pieces; it is given by the rank with the first. States of other shapes exist where parameters are whole.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from zs_comm import ConfigError, exchange

from .checkpoint import misfit, place_own, replica_of
from .flat import Flat
from .flat_pieces import HeldPiece, hollow, is_element_wise
from .parts import PROTOCOL, LazyPiece, Piece, TensorSpec, lazy_parts_of, parts_of, whole_part
from .runtime import Runtime
from .window import LOCAL, REDUCED, Window

if TYPE_CHECKING:
    from .optimizer import ZeroOptimizer

log = logging.getLogger("zs_zero")
Owned = tuple[Tensor, Flat, HeldPiece]
_RESERVED = (REDUCED, LOCAL, "local/")
_HOW = ("foreach", "fused", "capturable", "differentiable")  # how the step is computed here, no state of a training


class OptimizerState:
    """States, hyper-parameters and open window of a sharded model's optimizer."""

    PROTOCOL = PROTOCOL

    def __init__(self, runtime: Runtime, optimizer: ZeroOptimizer, owned: Sequence[Owned]) -> None:
        self._runtime = runtime
        self._optimizer, self._client = optimizer, optimizer.inner
        self._owned = owned
        self._window = Window(runtime)
        self._loaded: list[tuple[Tensor, str, Tensor]] = []  # (piece or parameter, state key, values)

    # -- save ---------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def pieces(self) -> Iterator[Piece | LazyPiece]:
        self._optimizer.check_usable()
        if self._client is None:
            return
        if self._runtime.tiers is not None:
            self._runtime.tiers.settle()
        replica, replicas = replica_of(self._runtime)
        for piece, flat, held in self._owned:
            spec = flat.plan.entries[held.piece.index].spec
            for key, value in self._states(piece) if spec.numel else ():  # that of no element exists on some ranks only
                full = f"{key}/{spec.name}"
                if self._in_files(flat, held) and is_element_wise(value, piece):
                    whole = TensorSpec(full, spec.shape, value.dtype)
                    source = _State(self._runtime, flat, held, piece, key)
                    yield from lazy_parts_of(
                        whole, held.piece.start, held.piece.stop, source, replica=replica, replicas=replicas
                    )
                    continue
                if value.shape == piece.shape or (value.dim() and value.numel() == piece.numel()):
                    part = value.detach().contiguous().view(-1)
                    whole = TensorSpec(full, spec.shape, value.dtype)
                    yield from parts_of(whole, held.piece.start, part, replica=replica, replicas=replicas)
                elif not value.dim() or self._runtime.whole_state or held.gathered is not None:
                    if held.piece.start == 0:
                        whole = TensorSpec(full, tuple(value.shape), value.dtype)
                        yield whole_part(whole, value.detach().contiguous(), replica=replica, replicas=replicas)
                else:
                    raise ConfigError(
                        f"state {key!r} of {spec.name!r} has shape {tuple(value.shape)}, which is no part of a "
                        f"parameter of shape {spec.shape}: it can be saved at stage 0 only"
                    )
        dp = self._runtime.groups.dp
        for name, param in self._runtime.ignored().items():
            for key, value in self._states(param):
                whole = TensorSpec(f"{key}/{name}", tuple(value.shape), value.dtype)
                data = value.detach().contiguous()
                if dp.rank == 0:
                    yield whole_part(whole, data)
                if dp.size > 1:
                    own = TensorSpec(f"local/{whole.name}", whole.shape, whole.dtype)
                    yield whole_part(own, data, scope="rank")
        yield from self._window.pieces((replica, replicas))

    def _states(self, key: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A parameter's states; numbers as 0-dim tensors."""
        for name, value in self._client.state.get(key, {}).items() if self._client is not None else ():
            if not isinstance(name, str) or "/" in name or f"{name}/" in _RESERVED:
                raise ConfigError(f"an optimizer state named {name!r} cannot be saved")
            if isinstance(value, bool | int | float):
                yield name, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            elif isinstance(value, Tensor):
                yield name, value
            elif value is not None:
                raise ConfigError(f"optimizer state {name!r} is a {type(value).__name__}, neither tensor nor number")

    def objects(self) -> Mapping[str, Any]:
        if self._client is None:
            return {"world": self._runtime.groups.dp.size}
        numbers: dict[str, str] = {}
        for state in self._client.state.values():
            numbers |= {key: type(v).__name__ for key, v in state.items() if isinstance(v, bool | int | float)}
        return {
            "world": self._runtime.groups.dp.size,
            "class": type(self._client).__name__,
            "updates": self._optimizer.wide.updates,
            "loss_scale": self._runtime.scaling.state_dict(),
            "numbers": dict(sorted(numbers.items())),
            "param_groups": [
                {"params": [names[id(p)] for p in group["params"]]} | _plain(group, number)
                for names in [self._names()]
                for number, group in enumerate(self._client.param_groups)
            ],
        }

    def _names(self) -> dict[int, str]:
        found = {id(param): name for name, param in self._runtime.ignored().items()}
        for flat in self._runtime.flats:
            pairs = zip(flat.params, flat.plan.entries, strict=True)
            found |= {id(param): entry.spec.name for param, entry in pairs}
        return found

    # -- load ---------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece | LazyPiece]:
        if self._client is None:
            return
        self._runtime.offloaded.check()
        self._match(saved, objects)
        if self._runtime.tiers is not None:
            self._runtime.tiers.settle()
        self._loaded, self._window = [], Window(self._runtime)
        by_name: dict[str, list[str]] = {}
        for full in saved:
            if not full.startswith(_RESERVED):
                key, _, name = full.partition("/")
                by_name.setdefault(name, []).append(key)
        groups = {id(param): group for group in self._client.param_groups for param in group["params"]}
        for piece, flat, held in self._owned:
            spec, group = flat.plan.entries[held.piece.index].spec, groups[id(held.param)]
            for key in by_name.get(spec.name, []):
                whole = saved[f"{key}/{spec.name}"]
                away = self._in_files(flat, held) and piece.dim() and key in self._owned_states(flat)
                if tuple(whole.shape) == spec.shape and away:
                    self._loaded.append((piece, key, hollow(piece.shape, flat.kept.state)))
                    part = TensorSpec(whole.name, spec.shape, flat.kept.state)
                    source = _State(self._runtime, flat, held, piece, key)
                    yield from lazy_parts_of(part, held.piece.start, held.piece.stop, source)
                elif tuple(whole.shape) == spec.shape:
                    value = self._place(piece, key, whole, piece.shape, group, flat.kept.state)
                    part = TensorSpec(whole.name, spec.shape, value.dtype)
                    yield from parts_of(part, held.piece.start, value.view(-1))
                else:
                    dtype = whole.dtype if flat.kept.widened else piece.dtype
                    value = self._place(piece, key, whole, whole.shape, group, dtype)
                    yield whole_part(TensorSpec(whole.name, tuple(whole.shape), value.dtype), value)
        same_world = objects.get("world") == self._runtime.groups.dp.size
        for name, param in self._runtime.ignored().items():
            for key in by_name.get(name, []):
                whole = saved[f"{key}/{name}"]
                value = self._place(param, key, whole, whole.shape, groups[id(param)], param.dtype)
                yield place_own(value, saved, whole.name, own=same_world)
        yield from self._window.places(saved, int(objects.get("world", 1)))

    def _owned_states(self, flat: Flat) -> Collection[str]:
        return () if flat.home is None else flat.home.blocks.owned

    def _in_files(self, flat: Flat, held: HeldPiece) -> bool:
        return self._runtime.tiers is not None and self._runtime.tiers.in_files(flat, held)

    def _place(
        self, key: Tensor, name: str, saved: TensorSpec, shape: Sequence[int], group: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The state that there is, or a new one: where torch's `load_state_dict` would make it; numbers in `dtype`."""
        value = self._client.state.get(key, {}).get(name) if self._client is not None else None
        if not isinstance(value, Tensor) or value.shape != torch.Size(shape) or not value.is_contiguous():
            device = key.device
            if name == "step":
                device = device if group.get("capturable") or group.get("fused") else torch.device("cpu")
            numbers = name != "step" and saved.dtype.is_floating_point and dtype.is_floating_point and len(saved.shape)
            value = torch.zeros(tuple(shape), dtype=dtype if numbers else saved.dtype, device=device)
        self._loaded.append((key, name, value))
        return value

    def _match(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> None:
        if "param_groups" not in objects or self._client is None:
            raise ConfigError("the checkpoint holds no optimizer state: load it without the optimizer")
        names = self._names()
        shapes = {entry.spec.name: entry.spec.shape for flat in self._runtime.flats for entry in flat.plan.entries}
        shapes |= {name: tuple(param.shape) for name, param in self._runtime.ignored().items()}
        problems = []
        theirs, mine = objects["param_groups"], self._client.param_groups
        if len(theirs) != len(mine):
            problems.append(f"{len(theirs)} parameter groups, the optimizer has {len(mine)}")
        frozen = self._runtime.plan.frozen  # they have no state, in whatever group they are
        cut = set() if self._runtime.whole_state else shapes.keys() - self._runtime.plan.owners
        for number, (there, here) in enumerate(zip(theirs, mine, strict=False)):
            own = {names[id(param)] for param in here["params"]} - frozen
            if differing := sorted(own ^ (set(there["params"]) - frozen)):
                side = "not in the checkpoint's" if differing[0] in own else "in the checkpoint's only"
                problems.append(f"parameter group {number}: {differing[0]} ({len(differing)} differ) is {side}")
        for full, spec in saved.items():
            _, _, name = full.partition("/")
            if full.startswith(_RESERVED):
                continue
            if name not in shapes:
                problems.append(f"{full}: there is no such parameter")
            elif tuple(spec.shape) not in ((), shapes[name]) and name in cut:
                problems.append(f"{full}: shape {tuple(spec.shape)} fits whole parameters only (stage 0)")
        if problems:
            raise misfit("the optimizer", problems)

    def begin(self) -> None:
        """The places are about to be filled: until `finish`, states are part old, part new."""
        if self._client is not None:
            self._optimizer.torn = True

    @torch.no_grad()
    def finish(self, objects: Mapping[str, Any]) -> None:
        """States, hyper-parameters and the window become the optimizer's; a torn one is whole again."""
        if self._client is None:
            return
        for piece, _, _ in self._owned:
            self._client.state.pop(piece, None)
        for param in self._runtime.ignored().values():
            self._client.state.pop(param, None)
        numbers = objects.get("numbers", {})
        kinds = {"int": int, "float": float, "bool": bool}
        for key, name, value in self._loaded:
            self._client.state[key][name] = kinds[numbers[name]](value.item()) if name in numbers else value
        for group, there in zip(self._client.param_groups, objects["param_groups"], strict=True):
            take_group(group, there)
        if objects.get("class") != type(self._client).__name__:
            log.warning("states of %s were loaded into %s", objects.get("class"), type(self._client).__name__)
        self._optimizer.wide.updates = int(objects.get("updates", 0))
        scaling, scaled = self._runtime.scaling, objects.get("loss_scale", {})
        scaling.load_state_dict(scaled)
        self._window.take(int(objects.get("world", 1)), scaling.value / scaled.get("value", 1.0))
        self._loaded = []
        self._optimizer.torn = False


class _State:
    """An element-wise state of a piece that is in files, as a checkpoint loads and stores it."""

    def __init__(self, runtime: Runtime, flat: Flat, held: HeldPiece, piece: Tensor, key: str) -> None:
        self._runtime, self._flat, self._held, self._piece, self._key = runtime, flat, held, piece, key

    def load(self, start: int, into: Tensor) -> None:
        if self._runtime.tiers is not None:
            values = self._runtime.tiers.read_state(self._flat, self._held, self._piece, self._key).view(-1)
            first = start - self._held.piece.start
            into.copy_(values[first : first + into.numel()])

    def store(self, start: int, values: Tensor) -> None:
        if self._runtime.tiers is not None:
            first = start - self._held.piece.start
            self._runtime.tiers.write_state(self._flat, self._held, self._key, values, start=first)


def whole_states(
    optimizer: ZeroOptimizer, client: torch.optim.Optimizer, runtime: Runtime, pieces: Sequence[Tensor]
) -> dict[Tensor, dict[str, Tensor]]:
    """The client's states as they would be unsharded, by parameter. Collective."""
    mine = {key for piece in pieces for key in client.state.get(piece, {})}
    known = exchange("\n".join(sorted(mine)).encode(), optimizer.group, label="names of states")
    keys = sorted({key for names in known for key in names.decode().split("\n") if key})
    ignored = {id(param) for param in runtime.ignored().values()}
    whole: dict[Tensor, dict[str, Tensor]] = {}
    for group in client.param_groups:
        for param in group["params"]:
            if id(param) not in ignored and param.requires_grad:
                states = {key: optimizer.full_state(param, key) for key in keys}
                whole[param] = {key: value for key, value in states.items() if value is not None}
    cut = {key for param, states in whole.items() for key, value in states.items() if is_element_wise(value, param)}
    for param, own in whole.items():
        kept = runtime.flat_of(param)[0].kept
        if kept.master == param.dtype:  # no masters are left behind: the client goes on with the parameter
            own |= {key: value.to(kept.state) for key, value in own.items() if key in cut}
    return {param: states for param, states in whole.items() if states}


def take_group(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Writes saved hyper-parameters into a live group; tensors (a learning rate, say) are filled in place."""
    for key, value in saved.items():
        if key == "params" or key in _HOW:
            continue
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


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
