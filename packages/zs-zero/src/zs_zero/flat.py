"""One flat buffer of a unit at run time: the parameters are views of it, and this rank owns one slice.

    whole   (padded_numel,) parameter dtype. Stage 3: zero bytes while released.
    shard   (held_numel,)   this rank's slice. A view of `whole` where `whole` stays; storage of its own at stage 3.
    master  (held_numel,)   fp32 copies for 16-bit parameters; else the shard itself; None when frozen.
    rest    (held_numel,)   what compensated bf16 parameters lack (`rounding.split`); else None.
    grad    (held_numel,)   `grad_dtype` once reduced; None outside of a window.

`held_numel` is one slice, or all of them at stage 0 (every rank owns everything). A flat with a `home` has parameters,
masters or gradients in files: there `master` and `rest` are those of the first, resident elements, `shard` is empty
where the parameters are away, and `values`, `store` and `reduced` are how to reach them.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, Group, Work, agreed, all_gather

from .flat_gradients import FlatGradients
from .flat_pieces import HeldPiece, hollow, is_element_wise
from .flat_reading import FlatReading, ParamState
from .initialize import bring
from .plan import FlatPlan, Piece
from .precision import Kept, Precision
from .released import classes_of
from .rounding import join, split
from .tiers.blocks import MASTER, REST, cut_pieces

if TYPE_CHECKING:
    from .tiers.home import FlatHome


class Flat(FlatGradients, FlatReading):
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
        home: "FlatHome | None" = None,
        grad_dtype: torch.dtype | None = None,
        state_device: torch.device | None = None,
        apart: bool = False,
        pin_states: bool = True,
        pin_parameters: bool = True,
        told: Group | None = None,
    ) -> None:
        self.plan = plan
        self.home = home
        self.kept = kept or Precision().of(plan.dtype)
        self.params = params
        self.group = group
        self.told = told or group  # who has to know of a part that cannot be read
        self.held = held  # slices this rank owns
        self.releasable = releasable
        self.name = name
        self.state = ParamState.WHOLE
        self.borrowers = 0  # `gathered` blocks that need the whole values
        self.held_numel = plan.shard_numel * len(held)
        FlatGradients.__init__(self, grad_dtype=grad_dtype or self.kept.grad, state_device=state_device)
        self.pin_states, self.pin_parameters = pin_states, pin_parameters  # host memory that a device copies from or to
        FlatReading.__init__(self, apart=apart)
        self.whole = torch.empty(0)
        self.shard = torch.empty(0)
        self.master: Tensor | None = None
        self.rest: Tensor | None = None
        self.lent: Tensor | None = None  # the values when `gathered` gave them out, where the shard is no copy of them
        self.versions: list[int] = []
        self._held_pieces: tuple[HeldPiece, ...] | None = None
        self._work: Work | None = None
        self._classes: list[tuple[type[nn.Parameter], type[nn.Parameter]]] = []
        if releasable:
            self._classes = [classes_of(param) for param in params]
            for param, entry in zip(params, plan.entries, strict=True):
                param.__dict__["_zs_name"] = entry.spec.name

    @property
    def has_masters(self) -> bool:
        """Whether `values` are more exact than the parameters."""
        owned = self.home.blocks.owned.keys() if self.home is not None else set()
        kept = self.master is not None or bool(owned & {MASTER, REST})
        return kept and self.kept.value != self.plan.dtype

    # -- building -----------------------------------------------------------------------------------------------------
    def adopt(self, device: torch.device, *, want_master: bool) -> None:
        """Moves the parameters' present values into the flat buffer (and, before the cast, into the masters)."""
        self.whole = torch.zeros(self.plan.padded_numel, dtype=self.plan.dtype, device=device)
        trained = want_master and self.plan.trainable
        needs_copy = trained and self.kept.value != self.plan.dtype
        compensated = trained and self.kept.update == "kahan"
        master = self.beside(self.held_numel, self.kept.value) if needs_copy else None
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
        away = self.home is not None and self.home.parameters_away
        self.shard = own.new_empty(0) if away else own.clone() if self.releasable else own
        if self.home is not None:
            self.home.move_in(self, own, master, trained=trained)
        elif trained:
            self.master = self.shard if self.kept.master == self.plan.dtype else master
            if compensated and master is not None:
                self.rest = self.beside(self.held_numel, torch.int16)
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
        """The pieces the optimizer works on: as `held_pieces`, but whole parameters where all slices are held.

        Where a home has blocks, cut at their borders.
        """
        if self.home is not None:
            yield from (held for held, _ in cut_pieces(list(self.owned_uncut()), self.home.blocks.blocks))
            return
        yield from self.owned_uncut()

    def owned_uncut(self) -> Iterator[HeldPiece]:
        """As `owned`, without regard to blocks: one piece of a parameter, or none."""
        if len(self.held) < self.plan.slices:
            yield from self.held_pieces()
            return
        for index, (entry, param) in enumerate(zip(self.plan.entries, self.params, strict=True)):
            yield HeldPiece(param, Piece(index, 0, entry.spec.numel, entry.offset), entry.offset, entry.stop)

    def master_of(self, held: HeldPiece) -> Tensor:
        """(n,): what the client's optimizer holds of an owned piece; hollow where a home has the values."""
        if self.home is not None or self.state_device is not None:
            return hollow(torch.Size((held.high - held.low,)), self.kept.master)
        if self.master is None:
            raise RuntimeError(f"{self.name}: a trainable flat buffer without a master")
        return self.master[held.low : held.high]

    def like(self, param: nn.Parameter, value: Tensor) -> Tensor:
        """A whole value of `param` (numel,) where the masters are, in their dtype. Raises ConfigError for its size."""
        if value.numel() != param.numel():
            raise ConfigError(f"value of shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}")
        return value.detach().reshape(-1).to(param.device, self.kept.value)

    def values(self, at: slice = slice(None)) -> Tensor:
        """The parameters' exact values (held_numel,) in `kept.value`: the masters themselves, or made for you."""
        if self.home is not None:
            low, high, _ = at.indices(self.held_numel)
            return self.home.values(self, low, high)
        if self.rest is not None:
            return join(self.shard[at].to(self.rest.device), self.rest[at])
        return (self.master if self.master is not None else self.shard)[at]

    def store(self, low: int, high: int, values: Tensor) -> None:
        """Sets elements `[low, high)` of masters and shard to `values` (high - low,)."""
        if self.home is not None:
            self.home.store(self, low, high, values)
            return
        if self.rest is not None:
            self.shard[low:high], self.rest[low:high] = split(values)
            return
        for target in (self.master, self.shard):
            if target is not None:
                target[low:high].copy_(values)

    def in_model(self, values: Tensor) -> Tensor:
        """What the model has of exact values."""
        return split(values)[0] if self.kept.update == "kahan" else values

    def keep_state(self, state: dict[str, Any], piece: Tensor) -> None:
        """Element-wise states of `piece` in the dtype in which they are kept."""
        for key, value in state.items():
            if is_element_wise(value, piece):
                state[key] = value.to(self.kept.state)

    # -- whole and released -------------------------------------------------------------------------------------------
    def gather(self) -> None:
        """Starts bringing the whole values in (stage 3); nothing to do where they are.

        Raises OSError, on all ranks where one cannot read its part.
        """
        self.read_ahead()
        if self.state is ParamState.READING and self.told.size == 1:
            return
        if self.state is ParamState.READING:
            try:
                with agreed(self.told, f"reading {self.name}"):
                    self._finish_reading()
            except Exception:
                self.drop_values()
                raise
            if self.group.size == 1:  # all of it is here
                self.state = ParamState.GATHERING
                return
        if self.state is not ParamState.RELEASED:
            return
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.itemsize)
        self._work = all_gather(self.whole, self.group, shard=self.shard, label=self.name, async_op=True)
        self.state = ParamState.GATHERING

    def wait(self) -> None:
        """Waits for a gather under way and makes the parameters readable."""
        if self.state is ParamState.READING:
            self._finish_reading()
        elif self.state is ParamState.GATHERING:
            if self._work is not None:
                self._work.wait()
                self._work = None
            if self.home is not None and self.home.parameters_away:
                self.shard = self.whole.new_empty(0)
        else:
            return
        for param, (original, _) in zip(self.params, self._classes, strict=True):
            param.__class__ = original
        self.state = ParamState.WHOLE

    def release(self) -> None:
        """Drops the whole values (stage 3). Views saved by autograd are valid again after the next gather."""
        if not self.releasable or self.state in (ParamState.RELEASED, ParamState.OFFLOADED) or self.borrowers:
            return
        if self.state is ParamState.READING:  # read ahead in vain: the memory may go when nothing is on its way to it
            with contextlib.suppress(OSError, TimeoutError):
                self._finish_reading()
            self.drop_values()
            return
        self.wait()
        for param, (_, released) in zip(self.params, self._classes, strict=True):
            param.__class__ = released
        self.drop_values()
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
        if self.home is None and self.master is not None and self.master is not self.shard:
            self.shard.copy_(self.master)

    def publish(self) -> Work | None:
        """Spreads the updated slices to every rank where the whole values stay (stages 1 and 2)."""
        if self.releasable or self.held_numel == self.plan.padded_numel:
            return None
        return all_gather(self.whole, self.group, label=self.name, async_op=True)

    def lend(self) -> None:
        """The whole values are about to be given out for changing: `adopt_writes` will compare with those of now."""
        if self.kept.update == "kahan" and not self.releasable and self.lent is None:
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
        if self.home is not None:
            self.home.adopt(self, force=force)
            return
        if self.rest is not None:
            self._forget_rest(self.rest)
        if self.releasable:
            self.shard.copy_(self.own_slice())
        if self.master is None or self.master is self.shard:
            return
        if not force and self.versions == [param._version for param in self.params]:
            return
        written = self.shard.to(self.master.device)
        changed = self.master.to(self.plan.dtype) != written
        self.master[changed] = written[changed].float()
        self.note_versions()

    def _forget_rest(self, rest: Tensor) -> None:
        """What the user wrote is exact: nothing is missing there."""
        before = self.shard if self.releasable else self.lent
        if before is not None:
            rest.masked_fill_((before != self.own_slice()).to(rest.device), 0)
            self.lent = before if self.borrowers and not self.releasable else None
            self.note_versions()
            return
        for held in self.held_pieces():
            index = held.piece.index
            if not self.versions or self.versions[index] != self.params[index]._version:
                rest[held.low : held.high].zero_()
        self.note_versions()
