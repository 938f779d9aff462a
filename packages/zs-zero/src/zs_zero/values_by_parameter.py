"""Values of single parameters from the flats, and what is agreed about them."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, agreed, all_gather, all_reduce

from .flat import Flat
from .flat_reading import ParamState

if TYPE_CHECKING:
    from .offload_states import OffloadedStates
    from .reducer import Groups


class ValuesByParameter(abc.ABC):
    """What `Runtime` does by parameter."""

    groups: Groups
    flats: list[Flat]
    offloaded: OffloadedStates
    whole_state: bool
    _where: Mapping[int, tuple[Flat, int]]

    def whole_of(self, flat: Flat, param: nn.Parameter, held: Tensor) -> Tensor:
        """One parameter's values, whole, from every rank's `held` (held_numel,) tensor. Collective."""
        entry = flat.plan.entries[self._where[id(param)][1]]
        whole = self.whole_flat(flat, held, label=entry.spec.name)
        return whole[entry.offset : entry.stop].view(entry.spec.shape).clone()

    def whole_flat(self, flat: Flat, held: Tensor, *, label: str = "") -> Tensor:
        """(padded_numel,) from every rank's `held` (held_numel,) tensor; `held` itself where it is all. Collective."""
        if self.whole_state:
            return held
        whole = torch.empty(flat.plan.padded_numel, dtype=held.dtype, device=held.device)
        return all_gather(whole, self.groups.shard, shard=held, label=label or flat.name)

    def moving(self, flat: Flat) -> AbstractContextManager[None]:
        """Around what a rank reads from and writes to files in a call of all ranks: its error is an error on all."""
        return nullcontext() if flat.home is None else agreed(self.groups.dp, f"files of {flat.name}")

    def set_value(self, flat: Flat, param: nn.Parameter, value: Tensor) -> None:
        """Sets one parameter from its whole value (numel,) in the masters' dtype, the same on every rank."""
        if flat.state in (ParamState.READING, ParamState.GATHERING):
            flat.release()  # what was brought ahead are the old values
        with self.moving(flat):
            self.take_writes([flat])
            for held in flat.held_pieces():
                if held.param is param:
                    flat.store(held.low, held.high, value[held.piece.start : held.piece.stop])
        if flat.state is ParamState.WHOLE:
            param.data.view(-1).copy_(flat.in_model(value))
            flat.note_versions()

    def take_writes(self, flats: Iterable[Flat]) -> None:
        """Takes what the user wrote into whole parameters over into the masters."""
        self.offloaded.check()
        for flat in flats:
            if not flat.releasable:
                flat.reattach()
                flat.adopt_writes()

    def check_not_borrowed(self, call: str) -> None:
        for flat in self.flats:
            if flat.borrowers:
                raise ConfigError(f"{call} inside `with zs_zero.gathered(...)`: its end would put the old values back")

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Which flags are set on any rank. Collective."""
        message = torch.tensor([int(flag) for flag in flags], dtype=torch.uint8)
        all_reduce(message, self.groups.dp, op="max", label="flags")
        return [bool(flag) for flag in message.tolist()]

    def scalar_anywhere(self, value: Any) -> Tensor:
        """A 0-dim state that at least one rank knows (fp64 on the wire); equal where several do. Collective."""
        known = torch.tensor([float(value) if value is not None else -torch.inf], dtype=torch.float64)
        all_reduce(known, self.groups.dp, op="max", label="scalar state")
        return known[0].float()
