"""One flat buffer of a unit at run time: the parameters are views of it, and this rank owns one slice.

    whole   (padded_numel,) parameter dtype. Stage 3: zero bytes while released.
    shard   (held_numel,)   this rank's slice. A view of `whole` where `whole` stays; storage of its own at stage 3.
    master  (held_numel,)   fp32 copies for 16-bit parameters; else the shard itself; None when frozen.
    rest    (held_numel,)   what compensated bf16 parameters lack (`rounding.split`); else None.
    grad    (held_numel,)   `kept.grad` once reduced; None outside of a window.

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
from .precision import Kept, Precision
from .released import classes_of
from .rounding import join, split


class ParamState(Enum):
    """Where the values of a flat are, and what that costs this rank."""

    RELEASED = "released"  # the shard only: numel / slices elements
    GATHERING = "gathering"  # shard and whole; the values are on their way
    WHOLE = "whole"  # shard and whole (stage 3), or whole alone (stages 0-2)
    OFFLOADED = "offloaded"  # nothing on the device, by `offload_states`


@dataclass(frozen=True)
class HeldPiece:
    """A piece this rank owns: `param.view(-1)[piece.start:piece.stop]` is `held[low:high]` of its flat."""

    param: nn.Parameter
    piece: Piece
    low: int
    high: int
    gathered: Tensor | None = None  # (numel,): the gradient of a parameter that this rank updates whole (`placement`)

    def cut(self, value: Any, like: Tensor) -> Any:
        """The part that belongs to this piece of a state of the whole parameter, shaped as `like`; a copy."""
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == self.param.numel():
            return value.reshape(-1)[self.piece.start : self.piece.stop].reshape(like.shape).clone()
        return value.clone() if isinstance(value, Tensor) else value


def is_element_wise(state: Any, piece: Tensor) -> bool:
    """Whether an optimizer's state has a floating-point number for each element of `piece`."""
    whole = isinstance(state, Tensor) and state.dim() > 0 and state.numel() == piece.numel()
    return whole and state.is_floating_point()


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
        kept: Kept | None = None,
    ) -> None:
        self.plan = plan
        self.kept = kept or Precision().of(plan.dtype)
        self.params = params
        self.group = group
        self.held = held  # slices this rank owns
        self.releasable = releasable
        self.name = name
        self.state = ParamState.WHOLE
        self.borrowers = 0  # `gathered` blocks that need the whole values
        self.held_numel = plan.shard_numel * len(held)
        self.sixteen_bit = plan.dtype in (torch.bfloat16, torch.float16)
        self.master_dtype, self.grad_dtype = self.kept.master, self.kept.grad
        self.whole = torch.empty(0)
        self.shard = torch.empty(0)
        self.master: Tensor | None = None
        self.rest: Tensor | None = None
        self.lent: Tensor | None = None  # the values when `gathered` gave them out, where the shard is no copy of them
        self.grad: Tensor | None = None
        self.used: set[int] = set()  # parameters that got a gradient in this window, on any rank
        self.versions: list[int] = []
        self._held_pieces: tuple[HeldPiece, ...] | None = None
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
        trained = want_master and self.plan.trainable
        needs_copy = trained and self.kept.value != self.plan.dtype
        compensated = trained and self.kept.update == "kahan"
        master = torch.zeros(self.held_numel, dtype=self.kept.value, device=device) if needs_copy else None
        base = self.held.start * self.plan.shard_numel
        for entry, param in zip(self.plan.entries, self.params, strict=True):
            bring(param)
            source = param.detach().to(device).reshape(-1)
            view = self.whole[entry.offset : entry.stop]
            view.copy_(split(source.float())[0] if compensated else source)
            if master is not None:
                low, high = max(entry.offset, base), min(entry.stop, base + self.held_numel)
                if low < high:
                    master[low - base : high - base].copy_(source[low - entry.offset : high - entry.offset])
            # `.data =` keeps identity, names and hooks, and gives the parameter a version counter of its own: as a view
            # created the ordinary way it would share the buffer's, and a gather would look like an in-place change
            param.data = view.view(entry.spec.shape)
        own = self.whole[base : base + self.held_numel]
        self.shard = own.clone() if self.releasable else own
        if trained:
            self.master = self.shard if self.kept.master == self.plan.dtype else master
        if compensated and master is not None:
            self.rest = torch.zeros_like(self.shard, dtype=torch.int16)
            self.store(0, self.held_numel, master)
        self.note_versions()

    def held_pieces(self) -> tuple[HeldPiece, ...]:
        """The pieces of this rank in order, slice by slice."""
        if self._held_pieces is None:  # made once: they are asked for several times in a step
            starts = [(slice_index, position * self.plan.shard_numel) for position, slice_index in enumerate(self.held)]
            self._held_pieces = tuple(
                HeldPiece(self.params[piece.index], piece, base + piece.shard_start, base + piece.shard_stop)
                for slice_index, base in starts
                for piece in self.plan.pieces(slice_index)
            )
        return self._held_pieces

    def owned(self) -> Iterator[HeldPiece]:
        """The pieces the optimizer works on: as `held_pieces`, but whole parameters where all slices are held."""
        if len(self.held) < self.plan.slices:
            yield from self.held_pieces()
            return
        for index, (entry, param) in enumerate(zip(self.plan.entries, self.params, strict=True)):
            yield HeldPiece(param, Piece(index, 0, entry.spec.numel, entry.offset), entry.offset, entry.stop)

    def gradient(self, held: HeldPiece) -> Tensor:
        """The reduced gradient of a held piece, 1-d, or as autograd made it: one rank leaves fp32 ones there."""
        if held.gathered is not None:
            return held.gathered
        if self.grad is not None:
            return self.grad[held.low : held.high]
        grad = held.param.grad
        if grad is None:
            raise RuntimeError(f"{self.name}: a parameter counted as used has no gradient")
        return grad if grad.numel() == held.piece.numel else grad.reshape(-1)[held.piece.start : held.piece.stop]

    def like(self, param: nn.Parameter, value: Tensor) -> Tensor:
        """A whole value of `param` (numel,) where the masters are, in their dtype. Raises ConfigError for its size."""
        if value.numel() != param.numel():
            raise ConfigError(f"value of shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}")
        return value.detach().reshape(-1).to(param.device, self.kept.value)

    def values(self, at: slice = slice(None)) -> Tensor:
        """The parameters' exact values (held_numel,) in `kept.value`: the masters themselves, or sums made for you."""
        if self.rest is not None:
            return join(self.shard[at], self.rest[at])
        return (self.master if self.master is not None else self.shard)[at]

    def store(self, low: int, high: int, values: Tensor) -> None:
        """Sets elements `[low, high)` of masters and shard to `values` (high - low,)."""
        if self.rest is not None:
            self.shard[low:high], self.rest[low:high] = split(values)
            return
        for target in (self.master, self.shard):
            if target is not None:
                target[low:high].copy_(values)

    def in_model(self, values: Tensor) -> Tensor:
        """What the model has of exact values."""
        return values if self.rest is None else split(values)[0]

    def keep_state(self, state: dict[str, Any], piece: Tensor) -> None:
        """Element-wise states of `piece` in the dtype in which they are kept."""
        for key, value in state.items():
            if is_element_wise(value, piece):
                state[key] = value.to(self.kept.state)

    @property
    def leaves_gradients(self) -> bool:
        """Whether gradients may stay where autograd put them, on one rank."""
        return self.kept.accum == self.kept.grad == self.plan.dtype

    def round_gradient(self) -> None:
        """After an addition of micro-steps, which torch does in their own dtype: its digits are left."""
        if self.grad is not None and self.grad.dtype != self.kept.accum:
            self.grad.copy_(self.grad.to(self.kept.accum))

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
        if not self.releasable or self.state in (ParamState.RELEASED, ParamState.OFFLOADED) or self.borrowers:
            return
        self.wait()
        for param, (_, released) in zip(self.params, self._classes, strict=True):
            param.__class__ = released
        self.whole.untyped_storage().resize_(0)
        self.state = ParamState.RELEASED

    def leave(self) -> None:
        """The values are about to leave the device: until `come_back` whoever touches a parameter gets an error."""
        self.bump_versions(range(len(self.params)))  # a backward through values that are gone raises
        for param, entry in zip(self.params, self.plan.entries, strict=True):
            param.__dict__["_zs_name"] = entry.spec.name
            param.__dict__["_zs_gone"] = "is in host memory until reload_states()"
            param.__class__ = classes_of(param)[1]
        self.state = ParamState.OFFLOADED

    def come_back(self) -> None:
        """The values are on the device again."""
        if self.state is not ParamState.OFFLOADED:
            return
        for param in self.params:
            del param.__dict__["_zs_gone"]
            if not self.releasable:
                param.__class__ = classes_of(param)[0]
        self.state = ParamState.RELEASED if self.releasable else ParamState.WHOLE

    def own_slice(self) -> Tensor:
        """This rank's part of `whole` (held_numel,)."""
        base = self.held.start * self.plan.shard_numel
        return self.whole[base : base + self.held_numel]

    def close(self) -> None:
        """Leaves the parameters their values where they are whole, and nothing else."""
        self.releasable = False
        self.master = self.rest = self.grad = self.lent = None
        self.shard = self.whole
        for param in self.params:
            del param.__dict__["_zs_flat"]
            if self.state is not ParamState.WHOLE:
                param.__dict__["_zs_gone"] = "lost its values by close(parameters=False)"

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

    def lend(self) -> None:
        """The whole values are about to be given out for changing: `adopt_writes` will compare with those of now."""
        if self.rest is not None and not self.releasable and self.lent is None:
            self.lent = self.own_slice().clone()

    def reattach(self) -> None:
        """Takes over values of parameters that were given other storage (`p.data = ...`), and gives them ours again.

        Raises:
            ConfigError: when that has another dtype, shape or device.
        """
        base, itemsize = self.whole.data_ptr(), self.whole.itemsize
        for entry, param in zip(self.plan.entries, self.params, strict=True):
            if param.data_ptr() == base + entry.offset * itemsize or not param.numel():
                continue
            view = self.whole[entry.offset : entry.stop].view(entry.spec.shape)
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
        torch.autograd.graph.increment_version([self.params[index] for index in indices])
        self.note_versions()

    def adopt_writes(self, *, force: bool = False) -> None:
        """Takes values that the user wrote into 16-bit parameters over into the masters, element by element.

        An element that was not written keeps its (more precise) master, or what compensates it.
        """
        if self.rest is not None:
            self._forget_rest(self.rest)
        if self.releasable:
            self.shard.copy_(self.own_slice())
        if self.master is None or self.master is self.shard:
            return
        if not force and self.versions == [param._version for param in self.params]:
            return
        changed = self.master.to(self.plan.dtype) != self.shard
        self.master[changed] = self.shard[changed].float()
        self.note_versions()

    def _forget_rest(self, rest: Tensor) -> None:
        """What the user wrote is exact: nothing is missing there."""
        before = self.shard if self.releasable else self.lent
        if before is not None:
            rest.masked_fill_(before != self.own_slice(), 0)
            self.lent = before if self.borrowers and not self.releasable else None
            self.note_versions()
            return
        for held in self.held_pieces():
            index = held.piece.index
            if not self.versions or self.versions[index] != self.params[index]._version:
                rest[held.low : held.high].zero_()
        self.note_versions()
