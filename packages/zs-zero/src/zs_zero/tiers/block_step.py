"""The step over blocks that come and go.

    trial     every block with a gradient that has something in files: read, updated, written to second slots;
              new values of parameters in memory are parked, in the memory of the gradients that made them
    agree     whether all ranks came through; if not, everything is as before the step
    commit    slots switch, parked values move in (neither can fail), then what is resident is updated in place

Where masters and states are resident and their parameters in files, the trial works on copies and the commit repeats
it in place: the same numbers, for a pass over memory instead of one through the files.

An early trial begins while the backward runs that ended the last window: as gradients arrive, blocks are updated whose
reads are through. It assumes what was so last time and is plausible now: no more backwards, no clipping, the same
parameters used, the learning rates of now. The step takes over what it finds true, and discards the rest by a rollback.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from zs_comm import agreed

from ..flat_pieces import is_element_wise
from .blocks import GRAD, MASTER, PARAM, REST, Block
from .eightbit import decode, encode
from .slots import Slot
from .sweep import Sweep
from .update import AtHand, BlockUpdate, Todo

if TYPE_CHECKING:
    from ..flat import Flat
    from .home import FlatHome
    from .tiers import Owned, Tiers


class BlockStep:
    """The steps of one client's optimizer over the blocks of `tiers`."""

    def __init__(self, tiers: Tiers, client: torch.optim.Optimizer, update: BlockUpdate) -> None:
        self._tiers, self._client, self._update = tiers, client, update
        self._forward = True  # the direction of the next sweep
        self._sweep: Sweep | None = None
        self._parked: list[tuple[Tensor, Tensor]] = []  # (where to, new values)
        self._before: list[tuple[Tensor, dict[str, Any]]] = []  # states of updated pieces that are no blocks
        self._updates = 0
        self._cached: set[Block] = set()  # blocks that were in slots when the sweep began
        self._stored: set[Block] = set()  # blocks whose states were written by a step
        # of an early trial
        # by flat: the parameters taken for used, and how often its gradients changed
        self._assumed: dict[int, tuple[set[int], int]] = {}
        self._factors: list[float] | None = None  # what gradients are taken to be multiplied by
        self._premise = ""  # what else it rests on
        self._failure: Exception | None = None
        self._backwards, self._usual_backwards = 0, 1

    # -- the step -----------------------------------------------------------------------------------------------------
    def step(self, *, updates: int, premise: str, torn: Callable[[], None]) -> None:
        """Updates everything with a gradient in this window. `torn`: called where there is no way back any more.

        `premise`: what updates depend on besides gradients; an early trial that rested on something else is repeated.
        Raises what failed, on all ranks; before `torn` was called everything but the gradients is as before.
        """
        try:
            with agreed(self._tiers.group, "optimizer step"):
                self._finish_trial(updates, premise)
        except BaseException:  # an interrupt is this rank's alone
            self.rollback()
            raise
        torn()
        with agreed(self._tiers.group, "optimizer step"):  # the client's optimizer may raise, on what is resident
            self._commit()

    def _finish_trial(self, updates: int, premise: str) -> None:
        blocks = [block for block in self._blocks() if self._streams(block)]
        if self._failure is not None:
            raise self._failure
        if self._sweep is not None and self._premise == premise and self._holds(blocks):
            self._sweep.finish()
            return
        if self._sweep is not None:
            self.rollback()
        self._updates, self._factors = updates, None
        if not self._forward:
            blocks.reverse()
        if blocks:
            self._assumed = {block.flat: self._gradients_of(block.flat) for block in blocks}
            self._begin(blocks)
            self._sweep_now.finish()

    def _holds(self, blocks: Sequence[Block]) -> bool:
        """Whether an early trial was given the gradients, and the factors, that the step has."""
        same = all(self._gradients_of(number) == then for number, then in self._assumed.items())
        factors = all(self._flat(number).factors == self._factors for number in self._assumed)
        return same and factors and {block.flat for block in blocks} <= self._assumed.keys()

    def _gradients_of(self, number: int) -> tuple[set[int], int]:
        flat = self._flat(number)
        return set(flat.used), flat.gradient_changes

    @property
    def _sweep_now(self) -> Sweep:
        if self._sweep is None:
            raise RuntimeError("no sweep is under way")
        return self._sweep

    def _begin(self, blocks: Sequence[Block]) -> None:
        slots = self._tiers.slots
        self._cached = set(blocks[: len(slots)]) & {slot.block for slot in slots if slot.block is not None}
        coming = set(blocks[: len(slots)])
        for slot in slots:
            if slot.block not in coming:
                slot.forget()  # it may be taken before its block's turn comes: then nothing is known of it anyway
        self._sweep = Sweep(
            slots, start=self._start, update=self._update_block, ready=lambda block: block.flat in self._assumed
        )
        self._sweep.queue(blocks)

    def discard(self) -> None:
        """Rolls an early trial back, if one is under way; the step makes another."""
        if self._sweep is not None:
            self.rollback()

    def rollback(self) -> None:
        """Everything but gradients as it was before the trial."""
        if self._sweep is not None:
            self._sweep.drain()
        for files in self._tiers.files.values():
            files.rollback()
        for slot in self._tiers.slots if self._sweep is not None else ():
            slot.forget()
        for piece, state in reversed(self._before):
            self._set_state(piece, state)
        self._forget_trial()

    def _forget_trial(self) -> None:
        self._sweep, self._failure, self._premise, self._factors = None, None, "", None
        self._parked.clear()
        self._before.clear()
        self._assumed.clear()

    def _commit(self) -> None:
        done = [] if self._sweep is None else self._sweep.done
        again = {id(piece) for block in done if not self._in_files(block) for piece, _, _ in self._pieces(block)}
        for piece, state in self._before:
            if id(piece) in again:  # what was done to copies is undone, and done in place
                self._set_state(piece, state)
        self._plan_traffic(done)
        for files in self._tiers.files.values():
            files.commit()
        for target, values in self._parked:
            target.copy_(values)
        self._forget_trial()
        self._forward = not self._forward
        self._usual_backwards, self._backwards = max(1, self._backwards), 0
        for block in self._blocks():
            if not self._in_files(block):
                self._update_in_place(block)
        self._update.apart()

    def _plan_traffic(self, done: Sequence[Block]) -> None:
        """What the plan says that this sweep moves: every region once each way, but for the slots' blocks."""
        for block in done:
            home, traffic = self._home(block), self._tiers.traffic
            known = block in self._stored
            for region in (*self._tiers.plan.flats[block.flat].owned, PARAM):
                if not self._away(block, region):
                    continue
                kind, nbytes = home.file_of(region).kind, home.stored_nbytes(block, region)
                traffic.expect(kind, written=nbytes)
                read = region in self._regions(block) and (known or region in (MASTER, REST, PARAM))
                if read and not (block in self._cached and region not in home.codecs):
                    traffic.expect(kind, read=nbytes)
            if self._flat(block.flat).grad_away:
                traffic.expect("gradients", read=home.stored_nbytes(block, GRAD))
            if self._in_files(block):
                self._stored.add(block)

    def _set_state(self, piece: Tensor, state: dict[str, Any]) -> None:
        self._client.state.pop(piece, None)
        if state:
            self._client.state[piece] = state

    # -- before the step ----------------------------------------------------------------------------------------------
    def arrived(
        self, flat: int, used: set[int], *, updates: int, factors: list[float], premise: Callable[[], str]
    ) -> None:
        """Gradients of a flat were reduced, of the parameters `used`: its blocks may be updated on trial.

        `factors`, `premise`: as the step will have them if nothing happens until then.
        """
        if self._failure is not None or self._backwards + 1 < self._usual_backwards:
            return
        try:
            if flat in self._assumed:  # more gradients than were thought of
                self.rollback()
                self._usual_backwards = self._backwards + 2  # no second try in this window
                return
            if self._sweep is None:
                self._updates, self._factors, self._premise = updates, list(factors), premise()
                ahead = [block for blocks in reversed(self._tiers.plan.flats) for block in blocks.blocks]
                self._begin([block for block in ahead if self._pieces(block) and self._streams(block)])
            self._assumed[flat] = (set(used), self._flat(flat).gradient_changes)
            self._sweep_now.advance()
        except Exception as error:  # other ranks are in the middle of a backward: they are told at the step
            self._failure = error

    def end_backward(self) -> None:
        """A backward ended whose gradients were reduced."""
        self._backwards += 1

    @property
    def open_window(self) -> bool:
        """Whether there was a backward since the last step."""
        return self._backwards > 0 or self._sweep is not None

    def drop_window(self) -> None:
        """The window's gradients were dropped."""
        self.discard()
        self._failure, self._backwards = None, 0

    # -- which blocks -------------------------------------------------------------------------------------------------
    def _flat(self, number: int) -> Flat:
        return self._tiers.flats[number]

    def _pieces(self, block: Block) -> list[Owned]:
        return self._tiers.pieces.get(block, [])

    def _blocks(self) -> Iterator[Block]:
        """Those with a gradient in this window, in the plan's order."""
        for blocks in self._tiers.plan.flats:
            flat = self._flat(blocks.flat)
            for block in blocks.blocks if flat.plan.trainable and flat.used else ():
                if any(held.piece.index in flat.used for _, _, held in self._pieces(block)):
                    yield block

    def _streams(self, block: Block) -> bool:
        home = self._tiers.homes[block.flat]
        return home is not None and (home.parameters_away or self._in_files(block))

    def _in_files(self, block: Block) -> bool:
        home = self._tiers.homes[block.flat]
        if home is None:
            return False
        own = home.parameters_away and MASTER not in home.blocks.owned  # parameters that are their own masters
        return own or home.owned_away(block)

    def _home(self, block: Block) -> FlatHome:
        home = self._tiers.homes[block.flat]
        if home is None:
            raise RuntimeError(f"block {block} is all in memory")
        return home

    def _away(self, block: Block, region: str) -> bool:
        return self._home(block).parameters_away if region == PARAM else self._in_files(block)

    def _regions(self, block: Block) -> list[str]:
        """What an update of a block has to be given."""
        owned = self._tiers.plan.flats[block.flat].owned
        return [*owned, *(() if MASTER in owned else (PARAM,))]

    # -- one block that streams ---------------------------------------------------------------------------------------
    def _start(self, block: Block, slot: Slot) -> None:
        """Begins to bring a block's regions into a slot."""
        home = self._home(block)
        for region in self._regions(block):
            target = slot.tensor(region, block.numel, home.dtype(region))
            if not self._away(block, region):
                self._copy_from_memory(target, block, region)
            elif region in slot.valid:
                continue
            elif not home.file_of(region).has(block.key(region)):
                target.zero_()
            else:
                view = slot.view(_place(home, region), home.stored_nbytes(block, region))
                slot.tickets.append(home.file_of(region).read(block.key(region), view))

    def _copy_from_memory(self, target: Tensor, block: Block, region: str) -> None:
        """Fills `target` (block.numel,) with a region that is resident."""
        flat = self._flat(block.flat)
        source = {PARAM: flat.shard, MASTER: flat.master, REST: flat.rest}.get(region)
        if source is not None:
            target.copy_(source[block.low : block.high])
            return
        for piece, _, held in self._pieces(block):
            state = self._client.state.get(piece, {}).get(region)
            if state is not None:
                target[held.low - block.low : held.high - block.low] = state.reshape(-1)

    def _update_block(self, block: Block, slot: Slot) -> None:
        """The block is in the slot: computes, and begins to write what is new."""
        home, flat = self._home(block), self._flat(block.flat)
        for region, kind in home.codecs.items() if self._in_files(block) else ():
            if home.file_of(region).has(block.key(region)):
                coded = slot.tensor(_place(home, region), home.stored_nbytes(block, region), torch.uint8)
                decode(coded, block.numel, kind, out=slot.tensor(region, block.numel, torch.float32))
        regions = {region: slot.tensor(region, block.numel, home.dtype(region)) for region in self._regions(block)}
        regions[PARAM] = slot.tensor(PARAM, block.numel, home.dtype(PARAM))
        todo = list(self._todo(block, self._gradient_of(block, slot)))
        if MASTER in regions and home.parameters_away and sum(one.grad.numel() for one in todo) < block.numel:
            regions[PARAM].copy_(regions[MASTER])  # of what is not updated, and of padding
        self._remember(todo)
        factors = flat.factors if self._factors is None else self._factors
        self._update(AtHand(flat, block, regions), todo, factors, updates=self._updates, keep=False)
        slot.valid = set()
        for region in (*self._tiers.plan.flats[block.flat].owned, PARAM):
            if self._away(block, region):
                self._write(block, slot, region)
        if not home.parameters_away:
            self._park(flat, block, regions[PARAM], todo)

    def _gradient_of(self, block: Block, slot: Slot) -> Tensor | None:
        """The block's gradients where they are in files: the last thing to be read, as they may arrive as late."""
        home = self._home(block)
        if not self._flat(block.flat).grad_away:
            return None
        view = slot.view(GRAD, home.stored_nbytes(block, GRAD))
        home.files["gradients"].read(block.key(GRAD), view).wait()
        return slot.tensor(GRAD, block.numel, home.dtype(GRAD))

    def _write(self, block: Block, slot: Slot, region: str) -> None:
        home = self._home(block)
        view = slot.view(_place(home, region), home.stored_nbytes(block, region))
        if region in home.codecs:
            seed = zlib.crc32(f"{block.key(region)} {self._updates}".encode())  # rounds by chance: see `eightbit`
            values, coded = (
                slot.tensor(region, block.numel, torch.float32),
                slot.tensor(_place(home, region), view.nbytes, torch.uint8),
            )
            encode(values, home.codecs[region], out=coded, seed=seed)
        else:
            slot.valid.add(region)
        slot.tickets.append(home.file_of(region).write(block.key(region), view))

    def _park(self, flat: Flat, block: Block, values: Tensor, todo: Sequence[Todo]) -> None:
        """Keeps new values of parameters in memory until the commit, where their gradients are that nobody needs."""
        keeps = self._tiers.plan.gradients_away or self._tiers.early
        for one in todo:
            new = values[one.held.low - block.low : one.held.high - block.low]
            if one.grad.is_contiguous() and one.grad.itemsize >= new.itemsize and not keeps:
                parked = one.grad.view(-1).view(torch.uint8)[: new.nbytes].view(new.dtype)
                parked.copy_(new)
            else:
                parked = new.clone()
            self._parked.append((flat.shard[one.held.low : one.held.high], parked))

    def _todo(self, block: Block, grads: Tensor | None) -> Iterator[Todo]:
        """Pieces of a block with a gradient. `grads`: the block's, where they are in files."""
        used, _ = self._assumed.get(block.flat) or self._gradients_of(block.flat)
        for piece, flat, held in self._pieces(block):
            if held.piece.index in used and (flat.has_reduced or held.param.grad is not None):
                grad = flat.raw_gradient(held) if grads is None else grads[held.low - block.low : held.high - block.low]
                yield Todo(piece, held, grad)

    def _remember(self, todo: Sequence[Todo]) -> None:
        for one in todo:
            state = self._client.state.get(one.piece, {})
            before = {k: _kept_for_rollback(v, one.piece) for k, v in state.items()}
            self._before.append((one.piece, before))

    # -- one block that stays -----------------------------------------------------------------------------------------
    def _update_in_place(self, block: Block) -> None:
        flat, home = self._flat(block.flat), self._tiers.homes[block.flat]
        at = slice(block.low, block.high)
        regions = {}
        if flat.master is not None and MASTER in self._tiers.plan.flats[block.flat].owned:
            regions[MASTER] = flat.master[at]
        if flat.rest is not None:
            regions[REST] = flat.rest[at]
        away = home is not None and home.parameters_away
        if away and MASTER not in regions:
            raise RuntimeError(f"{flat.name}: resident states of parameters in files have no masters")
        apart = not away and flat.state_device is not None
        regions[PARAM] = torch.empty(block.numel, dtype=flat.plan.dtype) if away or apart else flat.shard[at]
        if apart:
            regions[PARAM].copy_(flat.shard[at])
        todo = list(self._todo(block, None))
        self._update(AtHand(flat, block, regions), todo, flat.factors, updates=self._updates, keep=True)
        if apart:
            flat.shard[at].copy_(regions[PARAM])


def _kept_for_rollback(value: Any, piece: Tensor) -> Any:
    """Element-wise states are in files, or updated on copies; whatever else there is may be changed in place."""
    changes = isinstance(value, Tensor) and (value.numel() == 1 or not is_element_wise(value, piece))
    return value.clone() if changes else value


def _place(home: FlatHome, region: str) -> str:
    """The part of a slot from which a region is written and to which it is read."""
    return f"{region} in 8 bits" if region in home.codecs else region
