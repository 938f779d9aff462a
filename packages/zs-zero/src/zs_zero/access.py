"""Values of single parameters: masters, gradients and optimizer states, whole or this rank's part of them.

What is read is a copy in high precision: fp32 (or what is more precise), whatever the dtypes of model, masters and
states are; gradients are means over the ranks, without the loss scale. What is written goes where the next step looks.
Whole values come from every rank alike, which is checked, so that replicas cannot drift apart.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, Group, agreed, same_everywhere

from .flat import Flat
from .flat_gradients import scaled as scaled_by
from .flat_pieces import HeldPiece
from .sync import checksum

if TYPE_CHECKING:
    from .placement import Placement
    from .runtime import Runtime

GradUpdate = Callable[[Tensor, nn.Parameter], Tensor]


class ParameterAccess(abc.ABC):
    """What `ZeroOptimizer` does by parameter."""

    state: Any
    group: Group
    _runtime: Runtime
    _by_param: dict[int, list[tuple[Tensor, Flat, HeldPiece]]]
    _placement: Placement

    @abc.abstractmethod
    def check_usable(self) -> None: ...

    @abc.abstractmethod
    def _reduce(self) -> None: ...

    # -- parameters ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def full_param(self, param: nn.Parameter) -> Tensor:
        """`param`'s master value, whole, in fp32 or what is more precise. Collective."""
        flat, _ = self._flat_of(param)
        with self._runtime.moving(flat):
            held = self._values(flat).to(_precise(flat))
        return self._runtime.whole_of(flat, param, held)

    @torch.no_grad()
    def set_full_param(self, param: nn.Parameter, value: Tensor) -> None:
        """Sets `param` (master and model value) to `value`, the same on every rank. Collective."""
        flat, index = self._flat_of(param)
        value = self._alike(flat, index, value, "value")
        self._runtime.set_value(flat, param, value.to(flat.kept.value))

    @torch.no_grad()
    def local_param(self, param: nn.Parameter) -> Tensor:
        """The part of `param`'s master value that this rank owns: (n,), a copy, in fp32 or what is more precise."""
        flat, _ = self._flat_of(param)
        return self._local(flat, param, self._values(flat).to(_precise(flat)))

    @torch.no_grad()
    def set_local_param(self, param: nn.Parameter, value: Tensor) -> None:
        """Sets the part of `param` that this rank owns from `value` (n,), and spreads it. Collective."""
        flat, index = self._flat_of(param)
        self._runtime.check_not_borrowed("set_local_param()")
        part = self._part(flat, index, value, "value")
        with self._runtime.moving(flat):
            self._runtime.take_writes([flat])
            for held in _owned(flat, param):
                flat.store(held.low, held.high, part.to(flat.kept.value))
        self._runtime.spread([(flat, [index])])

    def local_slice(self, param: nn.Parameter) -> slice:
        """Which elements of the flattened `param` this rank owns; an empty slice where it owns none."""
        flat, _ = self._flat_of(param)
        for held in _owned(flat, param):
            return slice(held.piece.start, held.piece.stop)
        return slice(0, 0)

    # -- gradients ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def full_grad(self, param: nn.Parameter) -> Tensor | None:
        """`param`'s mean gradient over ranks and micro-steps, whole; None where it got none. Collective."""
        flat, index = self._flat_of(param)
        self._reduce()
        if not self._has_gradient(flat, index):
            return None
        with self._runtime.moving(flat):
            grads = self._gradients(flat, [index])
        return self._runtime.whole_of(flat, param, grads)

    @torch.no_grad()
    def set_full_grad(self, param: nn.Parameter, value: Tensor) -> None:
        """Replaces `param`'s mean gradient for the coming step, the same on every rank. Collective."""
        flat, index = self._flat_of(param)
        value = self._alike(flat, index, value, "gradient")
        self._reduce()
        self._write_gradient(flat, index, partial(_cut, value))

    @torch.no_grad()
    def local_grad(self, param: nn.Parameter) -> Tensor | None:
        """The part of `param`'s mean gradient that this rank owns: (n,), a copy; None where it got none. Collective."""
        flat, index = self._flat_of(param)
        self._reduce()
        return self._local(flat, param, self._gradients(flat, [index])) if self._has_gradient(flat, index) else None

    @torch.no_grad()
    def set_local_grad(self, param: nn.Parameter, value: Tensor) -> None:
        """Replaces this rank's part of `param`'s mean gradient for the coming step, from (n,). Collective."""
        flat, index = self._flat_of(param)
        part = self._part(flat, index, value, "gradient")
        self._reduce()
        self._write_gradient(flat, index, lambda held: part)

    @torch.no_grad()
    def update_grads(self, params: Iterable[nn.Parameter], update: GradUpdate) -> None:
        """Replaces each parameter's mean gradient by `update(gradient, param)`, gathered once per flat buffer.

        The gradient is whole, in `param`'s shape and in high precision, and may be changed in place; a parameter
        without one is left out. Every rank gives the same parameters and computes the same. Collective.
        """
        self.check_usable()
        chosen: dict[int, tuple[Flat, list[int]]] = {}
        for param in params:
            flat, index = self._runtime.flat_of(param)
            chosen.setdefault(id(flat), (flat, []))[1].append(index)
        self._reduce()
        for flat, indices in chosen.values():
            there = {index: flat.plan.entries[index] for index in indices if self._has_gradient(flat, index)}
            if not there:
                continue
            with self._runtime.moving(flat):
                grads = self._gradients(flat, list(there))
            whole = self._runtime.whole_flat(flat, grads)
            new: dict[int, Tensor] = {}
            with agreed(self.group, "the update of gradients"):
                for index, entry in there.items():
                    param, grad = flat.params[index], whole[entry.offset : entry.stop].view(entry.spec.shape)
                    new[index] = _flattened(update(grad.clone(), param), param, grad.dtype)
            sums = ", ".join(_checked(value) for value in new.values())
            same_everywhere(sums, self.group, what=f"the updated gradients of {flat.name!r}")
            for index, value in new.items():
                self._write_gradient(flat, index, partial(_cut, value))

    # -- optimizer states ---------------------------------------------------------------------------------------------
    @torch.no_grad()
    def full_state(self, param: nn.Parameter, key: str) -> Tensor | None:
        """The optimizer state `key` of `param`, whole in its shape, or a counter as a 0-dim tensor. Collective.

        None while the state does not exist (before the parameter's first update).
        """
        flat, _ = self._flat_of(param)
        self._settle()
        owner = self._placement.owner(param)
        if owner is not None:
            mine = [self._state_of(owned, key) for owned in self._by_param.get(id(param), [])]
            whole = self._placement.from_owner(mine[0] if mine else None, owner)
            return whole.to(_precise(flat)) if whole is not None and _is_cut(whole, param) else whole
        held_state = torch.zeros(flat.held_numel, dtype=_precise(flat), device=flat.whole.device)
        other: Any = None
        known = False
        with self._runtime.moving(flat):
            for owned in self._by_param.get(id(param), []):
                piece, _, held = owned
                value = self._state_of(owned, key)
                if _is_cut(value, piece):
                    held_state[held.low : held.high].copy_(value.reshape(-1))
                    known = True
                elif value is not None:
                    other = value
        flags = self._runtime.anywhere([known, other is not None])
        if flags[0]:
            return self._runtime.whole_of(flat, param, held_state)
        if isinstance(other, Tensor) and other.dim() and self._runtime.whole_state:
            return other.detach().clone()
        return self._runtime.scalar_anywhere(other) if flags[1] else None

    @torch.no_grad()
    def set_full_state(self, param: nn.Parameter, key: str, value: Tensor) -> None:
        """Sets the optimizer state `key` of `param` from a whole tensor, or a counter; the same on every rank.

        Collective. Raises ConfigError where that state does not exist.
        """
        flat, index = self._flat_of(param)
        self._settle()
        value = torch.as_tensor(value)
        cut = value.dim() > 0 and value.numel() == param.numel()
        if cut:
            value = self._alike(flat, index, value, f"state {key!r}")
        mine = self._by_param.get(id(param), [])
        kinds = [_is_cut(self.state[piece][key], piece) for piece, _, _ in mine if key in self.state.get(piece, {})]
        there, as_cut, otherwise = self._runtime.anywhere([bool(kinds), True in kinds, False in kinds])
        name = flat.plan.entries[index].spec.name
        if not there:
            raise ConfigError(f"the optimizer has no state {key!r} of {name!r}; before the first update it has none")
        if (as_cut and not cut) or (otherwise and cut and value.numel() > 1):
            raise ConfigError(f"state {key!r} of {name!r} has another shape than the value {tuple(value.shape)}")
        with self._runtime.moving(flat):
            for owned in mine:
                part = owned[2].piece
                self._fill_state(owned, key, value[part.start : part.stop] if as_cut else value.reshape(()))

    @torch.no_grad()
    def local_state(self, param: nn.Parameter, key: str) -> Tensor | None:
        """This rank's part of the optimizer state `key` of `param`: (n,), or 0-dim; None where it has none. A copy."""
        self._flat_of(param)
        self._settle()
        parts: list[Tensor] = []
        for owned in self._by_param.get(id(param), []):
            value = self._state_of(owned, key)
            if not _is_cut(value, owned[0]):
                return None if value is None else torch.as_tensor(value).detach().clone()
            parts.append(value.detach().reshape(-1).to(_precise(owned[1]), copy=True))
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None

    @torch.no_grad()
    def set_local_state(self, param: nn.Parameter, key: str, value: Tensor) -> None:
        """Sets this rank's part of the optimizer state `key` of `param` from `value` (n,), or 0-dim; local.

        Nothing is to be done on a rank that owns no element. Raises ConfigError where that state does not exist.
        """
        flat, index = self._flat_of(param)
        self._settle()
        name = flat.plan.entries[index].spec.name
        value = torch.as_tensor(value)
        mine, first = self._by_param.get(id(param), []), 0
        owns = sum(piece.numel() for piece, _, _ in mine)
        for piece, _, _ in mine:
            before = self.state.get(piece, {}).get(key)
            if before is None:
                raise ConfigError(
                    f"the optimizer has no state {key!r} of {name!r}; before the first update it has none"
                )
            if value.numel() != (owns if _is_cut(before, piece) else 1):
                raise ConfigError(f"state {key!r} of {name!r} has {owns} elements here, not {value.numel()}")
        for owned in mine:
            numel = owned[0].numel()
            if value.numel() == owns and value.dim():
                self._fill_state(owned, key, value.reshape(-1)[first : first + numel])
            else:
                self._fill_state(owned, key, value)
            first += numel

    # -- inside -------------------------------------------------------------------------------------------------------
    def _flat_of(self, param: nn.Parameter) -> tuple[Flat, int]:
        self.check_usable()
        return self._runtime.flat_of(param)

    def _settle(self) -> None:
        """The client's states are those after the last step, whatever was begun since."""
        if self._runtime.tiers is not None:
            self._runtime.tiers.settle()

    def _values(self, flat: Flat) -> Tensor:
        """(held_numel,): the masters, or what they amount to."""
        self._runtime.take_writes([flat])
        return flat.values()

    def _has_gradient(self, flat: Flat, index: int) -> bool:
        return index in flat.used and (flat.has_reduced or flat.params[index].grad is not None)

    def _gradients(self, flat: Flat, indices: list[int]) -> Tensor:
        """(held_numel,): those of `indices`, reduced and unscaled, in high precision."""
        reduced = flat.reduced()
        if reduced is not None:
            held = reduced.to(_precise(flat))
        else:  # one rank leaves them where autograd put them
            held = torch.zeros(flat.held_numel, dtype=_precise(flat), device=flat.whole.device)
            for index in indices:
                grad, entry = flat.params[index].grad, flat.plan.entries[index]
                if grad is not None:
                    held[entry.offset : entry.stop].copy_(scaled_by(grad.reshape(-1), flat.factors, flat.kept.grad))
        return self._runtime.scaling.unscaled(held)

    def _write_gradient(self, flat: Flat, index: int, part_of: Callable[[HeldPiece], Tensor]) -> None:
        """Replaces this rank's part of a gradient by `part_of` (its piece)."""
        param, scaled = flat.params[index], self._runtime.scaling.scaled
        flat.settle_factors()
        leaves = not flat.has_reduced and self.group.size == 1 and flat.leaves_gradients
        if leaves and flat.kept.grad != flat.plan.dtype:
            flat.collect()
        if leaves and flat.kept.grad == flat.plan.dtype:
            if param.grad is None:
                param.grad = torch.zeros(param.shape, dtype=param.dtype, device=flat.whole.device)
            for held in _owned(flat, param):
                param.grad.view(-1)[held.piece.start : held.piece.stop].copy_(scaled(part_of(held)))
        else:
            before = flat.reduced()
            total = flat.beside(flat.held_numel, flat.kept.grad) if before is None else before.to(flat.kept.grad)
            for held in _owned(flat, param):
                total[held.low : held.high].copy_(scaled(part_of(held)))
            flat.factors = []
            flat.set_reduced(total, exact=True)
        flat.used.add(index)

    def _local(self, flat: Flat, param: nn.Parameter, held_values: Tensor) -> Tensor:
        parts = [held_values[held.low : held.high] for held in _owned(flat, param)]
        return torch.cat(parts) if parts else held_values.new_empty(0)

    def _alike(self, flat: Flat, index: int, value: Tensor, what: str) -> Tensor:
        """The whole `value` (numel,), after the ranks found it to be one."""
        name = flat.plan.entries[index].spec.name
        with agreed(self.group, f"{what} of {name!r}"):
            value = _flattened(value, flat.params[index], _precise(flat))
        same_everywhere(_checked(value), self.group, what=f"the {what} given for {name!r}")
        return value

    def _part(self, flat: Flat, index: int, value: Tensor, what: str) -> Tensor:
        """This rank's `value` (n,); those that own the same part bring the same."""
        entry, param = flat.plan.entries[index], flat.params[index]
        owned = sum(held.piece.numel for held in _owned(flat, param))
        with agreed(self.group, f"{what} of {entry.spec.name!r}"):
            if value.numel() != owned:
                raise ConfigError(f"this rank owns {owned} elements of {entry.spec.name!r}, not {value.numel()}")
            value = value.detach().reshape(-1).to(flat.whole.device, _precise(flat))
        replicas = self.group if self._runtime.whole_state else self._runtime.groups.replicate
        same_everywhere(_checked(value), replicas, what=f"the {what} given for {entry.spec.name!r}")
        return value

    def _state_of(self, owned: tuple[Tensor, Flat, HeldPiece], key: str) -> Any:
        """A state of a piece: itself, or a copy of what is in files; None where there is none."""
        piece, flat, held = owned
        value = self.state.get(piece, {}).get(key)
        tiers = self._runtime.tiers
        if tiers is not None and _is_cut(value, piece) and tiers.in_files(flat, held):
            return tiers.read_state(flat, held, piece, key)
        return value

    def _fill_state(self, owned: tuple[Tensor, Flat, HeldPiece], key: str, value: Tensor) -> None:
        """In place and in the state's own dtype where it is a tensor."""
        piece, flat, held = owned
        before, tiers = self.state[piece][key], self._runtime.tiers
        if tiers is not None and _is_cut(before, piece) and tiers.in_files(flat, held):
            tiers.write_state(flat, held, key, value)
        elif isinstance(before, Tensor):
            before.copy_(value.reshape(before.shape))
        else:
            self.state[piece][key] = type(before)(value.item())


def _owned(flat: Flat, param: nn.Parameter) -> list[HeldPiece]:
    return [held for held in flat.owned_uncut() if held.param is param]


def _checked(value: Tensor) -> str:
    """What ranks compare, and read in the error if it differs."""
    return f"checksum {checksum(value):016x}"


def _cut(value: Tensor, held: HeldPiece) -> Tensor:
    return value[held.piece.start : held.piece.stop]


def _flattened(value: Tensor, param: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """A whole value of `param` (numel,) where that is. Raises ConfigError for its size."""
    if value.numel() != param.numel():
        raise ConfigError(f"value of shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}")
    return value.detach().reshape(-1).to(param.device, dtype)


def _precise(flat: Flat) -> torch.dtype:
    return torch.float32 if flat.plan.dtype in (torch.bfloat16, torch.float16) else flat.plan.dtype


def _is_cut(value: Any, piece: Tensor) -> bool:
    """A state that is cut as the parameter is, not a counter."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == piece.numel()
