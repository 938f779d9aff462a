"""The state of a sharded model and its optimizer as zs-ckpt's `Shardable`: pieces given and taken, nothing gathered.

    model       <name>                 fp32 masters where there are some, else the values; from every stage, whole boxes
                                       of each rank's own slice
                local/<name>           this rank's own buffers and ignored parameters where they may differ (scope rank)
    optimizer   <state>/<name>         each state of the client's optimizer, cut like its parameter; counters as 0-dim
                grad/<name>            an open window: the mean gradient so far, reduced
                local_grad/<name>      an open window: this rank's whole gradient that was not reduced yet (scope rank)

The names are those of `model.state_dict()`, the same at every stage and world size, so a checkpoint knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError

from .parts import PROTOCOL, LazyPiece, Piece, TensorSpec, lazy_parts_of, parts_of, whole_part

if TYPE_CHECKING:
    from .flat import Flat
    from .optimizer import ZeroOptimizer
    from .runtime import Runtime

AnyPiece = Piece | LazyPiece
_SHOWN = 8  # problems named in an error


class ShardableHook:
    """`model.__zs_shardable__` of a sharded model; a copy of the model is an ordinary one, so it has none (None)."""

    def __init__(self, make: Callable[[], ModelState]) -> None:
        self._make = make

    def __call__(self) -> ModelState:
        return self._make()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class ModelState:
    """Parameters (masters), persistent buffers and extra state of a sharded model."""

    PROTOCOL = PROTOCOL

    def __init__(self, runtime: Runtime, optimizer: ZeroOptimizer, *, strict: bool = True) -> None:
        self.strict = strict  # False: names on one side only are left alone
        self.exclude_frozen = False  # True: parameters that are not trained are neither saved nor missed
        self._runtime = runtime
        self._optimizer = optimizer
        self._torn = optimizer.torn
        self._dp = runtime.groups.dp
        self._copies: list[tuple[Tensor, Tensor]] = []  # (where to, from) of what is not contiguous
        self._sums: list[tuple[Flat, Tensor]] = []  # values of compensated flats, to be split

    # -- save ---------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def pieces(self) -> Iterator[AnyPiece]:
        self._optimizer.check_usable()
        self._runtime.take_writes(self._runtime.flats)
        for flat in self._runtime.flats:
            if flat.plan.trainable or not self.exclude_frozen:
                yield from self._of_flat(flat)
        for name, (value, differs) in self._local().items():
            data, spec = value.detach().contiguous(), TensorSpec(name, tuple(value.shape), value.dtype)
            if self._dp.rank == 0:
                yield whole_part(spec, data)
            if differs:
                yield whole_part(replace(spec, name=f"local/{name}"), data, scope="rank")

    def objects(self) -> Mapping[str, Any]:
        extra = {name: module.get_extra_state() for name, module in _with_extra_state(self._runtime.model)}
        without = sorted(self._runtime.plan.frozen) if self.exclude_frozen else []
        return {"world": self._dp.size, "tied": self._aliases(), "extra": extra, "without": without}

    def _of_flat(self, flat: Flat, saved: Mapping[str, str] | None = None) -> Iterator[AnyPiece]:
        """This rank's pieces; with `saved` ({name here: name there}) only of those, under the names there."""
        replica, replicas = replica_of(self._runtime)
        if flat.home is not None:
            yield from self._at_home(flat, saved, replica, replicas)
            return
        values = flat.values()
        if saved is not None and flat.rest is not None:
            self._sums.append((flat, values))
        for entry in flat.plan.entries:
            name = entry.spec.name if saved is None else saved.get(entry.spec.name)
            if name is not None and not entry.spec.numel:
                spec = TensorSpec(name, entry.spec.shape, values.dtype)
                yield whole_part(spec, values[:0], replica=self._dp.rank, replicas=self._dp.size)
        for held in flat.owned():
            entry = flat.plan.entries[held.piece.index]
            name = entry.spec.name if saved is None else saved.get(entry.spec.name)
            if name is not None:
                spec = TensorSpec(name, entry.spec.shape, values.dtype)
                part = values[held.low : held.high]
                yield from parts_of(spec, held.piece.start, part, replica=replica, replicas=replicas)

    def _at_home(self, flat: Flat, saved: Mapping[str, str] | None, replica: int, replicas: int) -> Iterator[AnyPiece]:
        """The same of a flat that is (partly) in files: its values come and go block by block."""
        dtype = flat.values(slice(0, 0)).dtype
        for entry in flat.plan.entries:
            name = entry.spec.name if saved is None else saved.get(entry.spec.name)
            if name is not None and not entry.spec.numel:
                spec = TensorSpec(name, entry.spec.shape, dtype)
                yield whole_part(spec, torch.empty(0, dtype=dtype), replica=self._dp.rank, replicas=self._dp.size)
        for held in flat.owned():
            entry = flat.plan.entries[held.piece.index]
            name = entry.spec.name if saved is None else saved.get(entry.spec.name)
            if name is not None:
                spec = TensorSpec(name, entry.spec.shape, dtype)
                source = Values(flat, held.low - held.piece.start)
                yield from lazy_parts_of(
                    spec, held.piece.start, held.piece.stop, source, replica=replica, replicas=replicas
                )

    # -- load ---------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[AnyPiece]:
        self._runtime.check_not_borrowed("loading a checkpoint")
        found = self._match(saved, dict(objects.get("tied", {})), objects.get("without", ()))
        self._runtime.take_writes(self._runtime.flats)
        self._sums = []
        for flat in self._runtime.flats:
            yield from self._of_flat(flat, found)
        same_world = objects.get("world") == self._dp.size
        self._copies = []
        for name, (value, differs) in self._local().items():
            if name in found:
                data = (
                    value if value.is_contiguous() else torch.empty_like(value, memory_format=torch.contiguous_format)
                )
                self._copies += [] if data is value else [(value, data)]
                yield place_own(data, saved, found[name], own=same_world and differs)

    def begin(self) -> None:
        """The places are about to be filled: until `finish`, values are part old, part new."""
        self._optimizer.torn = True

    @torch.no_grad()
    def finish(self, objects: Mapping[str, Any]) -> None:
        """Masters to the model's dtype, slices to every rank that keeps them whole. Collective."""
        for value, data in self._copies:
            value.copy_(data)
        for flat, values in self._sums:
            flat.store(0, flat.held_numel, values)
        self._runtime.spread((flat, range(len(flat.params))) for flat in self._runtime.flats)
        self._copies, self._sums = [], []
        extra = objects.get("extra", {})
        for name, module in _with_extra_state(self._runtime.model):
            if name in extra:
                module.set_extra_state(extra[name])
        if not self._torn:  # else it stays so, unless the optimizer's own state is loaded as well
            self._optimizer.torn = False

    def _match(
        self, saved: Mapping[str, TensorSpec], tied: Mapping[str, str], without: Collection[str]
    ) -> dict[str, str]:
        """{name of a tensor here: name of its values in the checkpoint}."""
        shapes = {e.spec.name: e.spec.shape for flat in self._runtime.flats for e in flat.plan.entries}
        shapes |= {name: tuple(value.shape) for name, (value, _) in self._local().items()}
        aliases = self._aliases()
        others = {name: [alias for alias, first in aliases.items() if first == name] for name in shapes}
        found, problems = {}, []
        for name, shape in shapes.items():
            candidates = [n for n in (name, *others[name], tied.get(name, name)) if n in saved]
            if not candidates:
                problems += [f"{name}: missing"] if self.strict and name not in without else []
            elif tuple(saved[candidates[0]].shape) != shape:
                problems.append(f"{name}: shape {tuple(saved[candidates[0]].shape)}, the model has {shape}")
            else:
                found[name] = candidates[0]
        if self.strict:
            known = {*shapes, *aliases, *found.values()}
            problems += [f"{n}: not in the model" for n in saved if n not in known and not n.startswith("local/")]
        if problems:
            raise misfit("the model", problems)
        return found

    # -- what is not sharded ------------------------------------------------------------------------------------------
    def local(self) -> dict[str, Tensor]:
        """What is whole on every rank: ignored parameters and persistent buffers, by name."""
        return {name: value for name, (value, _) in self._local().items()}

    def _local(self) -> dict[str, tuple[Tensor, bool]]:
        """Ignored parameters and persistent buffers, each once, and whether ranks may hold different values.

        Not where rank 0's buffers are sent around before every forward.
        """
        model = self._runtime.model
        several = self._dp.size > 1
        ignored = ((name, param.data) for name, param in model.named_parameters() if self._runtime.is_ignored(param))
        found = {name: (value, several) for name, value in ignored}
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set and id(buffer) not in seen:
                    seen.add(id(buffer))
                    differs = several and not self._runtime.options.broadcast_buffers
                    found[f"{prefix}.{key}" if prefix else key] = (buffer, differs)
        return found

    def _aliases(self) -> dict[str, str]:
        """{further name of a tied parameter or shared buffer: its first name}."""
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        model = self._runtime.model
        everything: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
        everything += list(model.named_buffers(remove_duplicate=False))
        for name, tensor in everything:
            if first.setdefault(id(tensor), name) != name:
                aliases[name] = first[id(tensor)]
        return aliases


class Values:
    """The values of a parameter whose first element is `low` of its flat, as a checkpoint loads and stores them.

    Of those before this rank's part `low` is counted backwards.
    """

    def __init__(self, flat: Flat, low: int) -> None:
        self._flat, self._low = flat, low

    def load(self, start: int, into: Tensor) -> None:
        at = self._low + start
        into.copy_(self._flat.values(slice(at, at + into.numel())))

    def store(self, start: int, values: Tensor) -> None:
        at = self._low + start
        self._flat.store(at, at + values.numel(), values.to(self._flat.kept.value))


def model_state(model: nn.Module) -> ModelState:
    """The Shardable of a sharded model, whose `strict` and `exclude_frozen` may be set. Raises ConfigError."""
    hook = vars(model).get("__zs_shardable__")
    if not isinstance(hook, ShardableHook):
        raise ConfigError(f"this {type(model).__name__} is not sharded: give it to zs_zero.shard first")
    return hook()


def replica_of(runtime: Runtime) -> tuple[int, int]:
    """Which of how many ranks that hold the same slice this one is."""
    group = runtime.groups.dp if runtime.whole_state else runtime.groups.replicate
    return group.rank, group.size


def misfit(what: str, problems: list[str]) -> ConfigError:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ConfigError(f"the checkpoint does not fit {what}: " + "; ".join(problems[:_SHOWN]) + more)


def place_own(data: Tensor, saved: Mapping[str, TensorSpec], name: str, *, own: bool) -> Piece:
    """All of a local tensor: this rank's own where that is asked for and there is one, else rank 0's."""
    own = own and f"local/{name}" in saved
    spec = saved[f"local/{name}" if own else name]
    return whole_part(TensorSpec(spec.name, tuple(spec.shape), data.dtype), data, scope="rank" if own else "")


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for prefix, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}._extra_state" if prefix else "_extra_state", module
