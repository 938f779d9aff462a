"""One flat buffer of a unit at run time: the parameters are views of it, and this rank owns one slice.

    whole   (padded_numel,) parameter dtype. Stage 3: zero bytes while released.
    shard   (held_numel,)   this rank's slice. A view of `whole` where `whole` stays; storage of its own at stage 3.
    master  (held_numel,)   fp32 copies for 16-bit parameters; else the shard itself; None when frozen.
    grad    (held_numel,)   in the masters' dtype once reduced; None outside of a window.

`held_numel` is one slice, or all of them at stage 0 (every rank owns everything).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, Group, Work, all_gather

from .initialize import bring
from .plan import FlatPlan, Piece
from .released import classes_of


class ParamState(Enum):
    """Where the values of a flat are, and what that costs this rank."""

    RELEASED = "released"  # the shard only: numel / slices elements
    GATHERING = "gathering"  # shard and whole; the values are on their way
    WHOLE = "whole"  # shard and whole (stage 3), or whole alone (stages 0-2)


@dataclass(frozen=True)
class HeldPiece:
    """A piece this rank owns: `param.view(-1)[piece.start:piece.stop]` is `held[low:high]` of its flat."""

    param: nn.Parameter
    piece: Piece
    low: int
    high: int

    def cut(self, value: Any, like: Tensor) -> Any:
        """The part that belongs to this piece of a state of the whole parameter, shaped as `like`; a copy."""
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == self.param.numel():
            return value.reshape(-1)[self.piece.start : self.piece.stop].reshape(like.shape).clone()
        return value.clone() if isinstance(value, Tensor) else value


class Flat:
    """The values, masters and reduced gradients of one `FlatPlan` on this rank."""

    def __init__(
        self,
        plan: FlatPlan,
        params: list[nn.Parameter],
        group: Group,
        *,
        held: range,
        releasable: bool,
        name: str,
    ) -> None:
        self.plan = plan
        self.params = params
        self.group = group
        self.held = held  # slices this rank owns
        self.releasable = releasable
        self.name = name
        self.state = ParamState.WHOLE
        self.borrowers = 0  # `gathered` blocks that need the whole values
        self.held_numel = plan.shard_numel * len(held)
        self.sixteen_bit = plan.dtype in (torch.bfloat16, torch.float16)
        self.master_dtype = torch.float32 if self.sixteen_bit else plan.dtype
        self.whole = torch.empty(0)
        self.shard = torch.empty(0)
        self.master: Tensor | None = None
        self.grad: Tensor | None = None
        self.used: set[int] = set()  # parameters that got a gradient in this window, on any rank
        self.versions: list[int] = []
        self._work: Work | None = None
        self._classes: list[tuple[type[nn.Parameter], type[nn.Parameter]]] = []
        if releasable:
            self._classes = [classes_of(param) for param in params]
            for param, entry in zip(params, plan.entries, strict=True):
                param.__dict__["_zs_name"] = entry.spec.name

    # -- building -----------------------------------------------------------------------------------------------------
    def adopt(self, device: torch.device, *, want_master: bool) -> None:
        """Moves the parameters' present values into the flat buffer (and, before the cast, into the masters)."""
        self.whole = torch.zeros(self.plan.padded_numel, dtype=self.plan.dtype, device=device)
        needs_copy = want_master and self.plan.trainable and self.sixteen_bit
        master = torch.zeros(self.held_numel, dtype=torch.float32, device=device) if needs_copy else None
        base = self.held.start * self.plan.shard_numel
        for entry, param in zip(self.plan.entries, self.params, strict=True):
            bring(param)
            source = param.detach().to(device).reshape(-1)
            view = self.whole[entry.offset : entry.stop]
            view.copy_(source)
            if master is not None:
                low, high = max(entry.offset, base), min(entry.stop, base + self.held_numel)
                if low < high:
                    master[low - base : high - base].copy_(source[low - entry.offset : high - entry.offset])
            # `.data =` keeps identity, names and hooks, and gives the parameter a version counter of its own: as a view
            # created the ordinary way it would share the buffer's, and a gather would look like an in-place change
            param.data = view.view(entry.spec.shape)
        own = self.whole[base : base + self.held_numel]
        self.shard = own.clone() if self.releasable else own
        self.master = master if needs_copy else (self.shard if want_master and self.plan.trainable else None)
        self.note_versions()

    def held_pieces(self) -> Iterator[HeldPiece]:
        """The pieces of this rank in order, slice by slice."""
        for position, slice_index in enumerate(self.held):
            base = position * self.plan.shard_numel
            for piece in self.plan.pieces(slice_index):
                yield HeldPiece(self.params[piece.index], piece, base + piece.shard_start, base + piece.shard_stop)

    def owned(self) -> Iterator[HeldPiece]:
        """The pieces the optimizer works on: as `held_pieces`, but whole parameters where all slices are held."""
        if len(self.held) < self.plan.slices:
            yield from self.held_pieces()
            return
        for index, (entry, param) in enumerate(zip(self.plan.entries, self.params, strict=True)):
            yield HeldPiece(param, Piece(index, 0, entry.spec.numel, entry.offset), entry.offset, entry.stop)

    def gradient(self, held: HeldPiece) -> Tensor:
        """The reduced gradient of a held piece (1-d); on one rank fp32 gradients stay where autograd put them."""
        if self.grad is not None:
            return self.grad[held.low : held.high]
        if held.param.grad is None:
            raise RuntimeError(f"{self.name}: a parameter counted as used has no gradient")
        return held.param.grad.reshape(-1)[held.piece.start : held.piece.stop]

    def like(self, param: nn.Parameter, value: Tensor) -> Tensor:
        """A whole value of `param` (numel,) where the masters are, in their dtype. Raises ConfigError for its size."""
        if value.numel() != param.numel():
            raise ConfigError(f"value of shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}")
        return value.detach().reshape(-1).to(param.device, self.master_dtype)

    # -- whole and released -------------------------------------------------------------------------------------------
    def gather(self) -> None:
        """Starts bringing the whole values in (stage 3); nothing to do where they are."""
        if self.state is not ParamState.RELEASED:
            return
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.itemsize)
        self._work = all_gather(self.whole, self.group, shard=self.shard, label=self.name, async_op=True)
        self.state = ParamState.GATHERING

    def wait(self) -> None:
        """Waits for a gather under way and makes the parameters readable."""
        if self.state is not ParamState.GATHERING:
            return
        if self._work is not None:
            self._work.wait()
            self._work = None
        for param, (original, _) in zip(self.params, self._classes, strict=True):
            param.__class__ = original
        self.state = ParamState.WHOLE

    def release(self) -> None:
        """Drops the whole values (stage 3). Views saved by autograd are valid again after the next gather."""
        if not self.releasable or self.state is ParamState.RELEASED or self.borrowers:
            return
        self.wait()
        for param, (_, released) in zip(self.params, self._classes, strict=True):
            param.__class__ = released
        self.whole.untyped_storage().resize_(0)
        self.state = ParamState.RELEASED

    def own_slice(self) -> Tensor:
        """This rank's part of `whole` (held_numel,)."""
        base = self.held.start * self.plan.shard_numel
        return self.whole[base : base + self.held_numel]

    # -- values from masters, masters from values ---------------------------------------------------------------------
    def write_back(self) -> None:
        """Masters to the model's dtype, after the optimizer changed them."""
        if self.master is not None and self.master is not self.shard:
            self.shard.copy_(self.master)

    def publish(self) -> Work | None:
        """Spreads the updated slices to every rank where the whole values stay (stages 1 and 2)."""
        if self.releasable or self.held_numel == self.plan.padded_numel:
            return None
        return all_gather(self.whole, self.group, label=self.name, async_op=True)

    def reattach(self) -> None:
        """Takes over values of parameters that were given other storage (`p.data = ...`), and gives them ours again.

        Raises:
            ConfigError: when that has another dtype, shape or device.
        """
        for entry, param in zip(self.plan.entries, self.params, strict=True):
            view = self.whole[entry.offset : entry.stop].view(entry.spec.shape)
            if not param.numel() or param.data_ptr() == view.data_ptr():
                continue
            if (param.dtype, param.shape, param.device) != (view.dtype, view.shape, view.device):
                raise ConfigError(
                    f"{entry.spec.name!r} was replaced by {tuple(param.shape)} {param.dtype} on {param.device} after "
                    f"the model was sharded: convert or move a model before zs_zero.shard"
                )
            view.copy_(param.data)
            param.data = view
            self.versions = []

    def note_versions(self) -> None:
        self.versions = [param._version for param in self.params]

    def bump_versions(self, indices: Iterable[int]) -> None:
        """Tells autograd that the values changed: a backward through the old ones then raises, as in plain torch."""
        for index in indices:
            torch.autograd.graph.increment_version(self.params[index])
        self.note_versions()

    def adopt_writes(self, *, force: bool = False) -> None:
        """Takes values that the user wrote into 16-bit parameters over into the masters, element by element.

        An element that was not written keeps its (more precise) master.
        """
        if self.releasable:
            self.shard.copy_(self.own_slice())
        if self.master is None or self.master is self.shard:
            return
        if not force and self.versions == [param._version for param in self.params]:
            return
        changed = self.master.to(self.plan.dtype) != self.shard
        self.master[changed] = self.shard[changed].float()
        self.note_versions()
