"""The tiers of one sharded model: its files, who is where, what was moved. The step over them is `block_step`'s."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from zs_comm import Group, agreed, same_everywhere
from zs_comm.resident import reset_peak, resident

from ..flat_pieces import HeldPiece, hollow, is_element_wise
from ..plan import Plan
from .block_step import BlockStep
from .blocks import Block
from .budget import Setting, TierPlan, plan_tiers
from .files import TierFiles
from .folder import TierFolder
from .home import FlatHome
from .opening import open_host_optimizer, open_store
from .policy import Files, Offload
from .report import OffloadReport, Traffic, bound_heap
from .slots import Slot, slot_nbytes
from .update import BlockUpdate

if TYPE_CHECKING:
    from ..flat import Flat
    from ..gatherer import Gatherer

Owned = tuple[Tensor, "Flat", HeldPiece]
__all__ = ["Setting", "Tiers", "codecs_of"]
_UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg", "acc_delta", "exp_inf")  # never negative


class Tiers:
    """Where the numbers of a sharded model live, and their step."""

    def __init__(self, plan: Plan, offload: Offload, setting: Setting, *, group: Group) -> None:
        self.offload = offload
        self.group = group
        self.told: Group | None = None  # the ranks that agree on reads of parameters
        with agreed(group, "planning tiers"):
            self.plan: TierPlan = plan_tiers(plan, offload, setting)
        decided = (self.plan.parameters_away, self.plan.gradients_away, [flat.resident for flat in self.plan.flats])
        same_everywhere(repr(decided), group, what="the plan of tiers (limits, stores)")
        self._codecs = setting.codecs
        self._folders: dict[str, TierFolder] = {}
        self.files: dict[str, TierFiles] = {}
        self.store = "memory"
        self.traffic = Traffic()
        self.homes: list[FlatHome | None] = []
        self.flats: list[Flat] = []
        self.pieces: dict[Block, list[Owned]] = {}  # of the client's optimizer
        self.block_step: BlockStep | None = None
        self._number_of: dict[int, int] = {}
        self._reduced: set[int] = set()  # flats with gradients in this window
        self._slots: list[Slot] | None = None
        if offload.host_memory_limit is not None:
            bound_heap()
        self._base = resident()
        reset_peak()
        try:
            self._open(setting)
        except BaseException:
            self.close()
            raise

    # -- building -----------------------------------------------------------------------------------------------------
    def _open(self, setting: Setting) -> None:
        offload, plan = self.offload, self.plan
        wanted: dict[str, Files | None] = {}
        if any(plan.parameters_away):
            wanted["parameters"] = offload.parameter_files
        if offload.optimizer.tier == "files" and any(
            flat.resident < flat.held_numel for flat in plan.flats if flat.owned
        ):
            wanted["optimizer"] = offload.optimizer_files
        if plan.gradients_away:
            wanted["gradients"] = offload.optimizer_files
        for kind, files in wanted.items():
            if files is None:
                raise RuntimeError(f"{kind} in files, and no folder is given")
            if files.folder not in self._folders:
                self._folders[files.folder] = TierFolder(files.folder, job=files.job, group=self.group)
            with agreed(self.group, f"opening files for {kind}"):
                folder = self._folders[files.folder]
                store, self.store = open_store(files, folder, kind, bounded_cache=offload.host_memory_limit is not None)
                path = str(getattr(store, "path", folder.path))
                self.files[kind] = TierFiles(store, kind=kind, name=path)
        for blocks, away in zip(plan.flats, plan.parameters_away, strict=True):
            own = {kind: self.files[kind] for kind in ("parameters",) if away and kind in self.files}
            if blocks.grad is not None:
                own |= {kind: self.files[kind] for kind in ("optimizer", "gradients") if kind in self.files}
            codecs = {name: kind for name, kind in self._codecs.items() if name in blocks.owned}
            self.homes.append(FlatHome(blocks, own, codecs=codecs, changed=self._forget) if own else None)
        for kind, files_of_kind in self.files.items():
            with agreed(self.group, f"reserving space for {kind}"):
                reserved: dict[str, int] = {}
                for home in self.homes:
                    if home is not None and kind in home.files:
                        reserved |= home.reservations(kind)
                files_of_kind.reserve(reserved, slots=1 if kind == "gradients" else 2)

    def attach(self, flats: Sequence[Flat], *, by_blocks: bool) -> None:
        """The flats that were built. `by_blocks`: whether the step is one over blocks."""
        self.flats = list(flats)
        self._number_of = {id(flat): number for number, flat in enumerate(flats)}
        for flat in flats:
            if flat.plan.trainable and by_blocks:
                flat.deferred = (
                    flat.grad_dtype != flat.kept.grad
                    or self.plan.gradients_away
                    or self.offload.optimizer.early
                    or flat.state_device is not None
                )
        self.traffic.forget(self.files)

    def own(
        self, client: torch.optim.Optimizer, owned: Sequence[Owned],
        groups: Sequence[tuple[dict[str, Any], Sequence[Tensor]]], *, seed: int,
    ) -> None:  # fmt: skip
        """The client's pieces, cut at the borders of blocks, and the groups that they belong to."""
        update = BlockUpdate(client, open_host_optimizer(), seed)
        update.listed(groups, blocks=[piece for piece, _, _ in owned])
        self.block_step = BlockStep(self, client, update)
        for piece, flat, held in owned:
            blocks = self.plan.flats[self._number_of[id(flat)]]
            for block, _, _ in blocks.over(held.low, held.high):  # one, or none for a parameter without elements
                self.pieces.setdefault(block, []).append((piece, flat, held))
        with agreed(self.group, "moving states to files"):
            self.take_states(client, owned)
        self.traffic.forget(self.files)  # building is no step's

    def take_states(self, client: torch.optim.Optimizer, owned: Iterable[Owned]) -> None:
        """Moves states that a client has in memory (it has stepped before, or loaded them) to files."""
        for piece, flat, held in owned:
            state = client.state.get(piece, {}) if self.in_files(flat, held) else {}
            for key, value in state.items():
                if is_element_wise(value, piece) and flat.home is not None and key in flat.home.blocks.owned:
                    self.write_state(flat, held, key, value)
                    state[key] = hollow(piece.shape, flat.kept.state)

    @property
    def early(self) -> bool:
        return self.offload.optimizer.early

    @property
    def reduces_in_backward(self) -> bool:
        """Whether gradients are taken from their parameters as a backward proceeds, on one rank too."""
        return self.plan.gradients_away or self.early or any(self.plan.parameters_away)

    @property
    def slots(self) -> list[Slot]:
        """The slots, made at the first use."""
        if self._slots is None:
            sizes = self.plan.slot_sizes
            make = next(iter(self.files.values())).buffer if self.files else bytearray
            buffers = [memoryview(make(slot_nbytes(sizes))) for _ in range(self.plan.slots)]
            self._slots = [Slot(buffer, sizes) for buffer in buffers]
        return self._slots

    def settle(self) -> None:
        """Discards an early trial: before what it has changed is read, and after what it rests on was changed."""
        if self.block_step is not None:
            self.block_step.discard()

    def _forget(self, block: Block) -> None:
        self.settle()
        for slot in self._slots or ():
            if slot.block == block:
                slot.forget()

    # -- the window ---------------------------------------------------------------------------------------------------
    def step(self, *, updates: int, premise: str, torn: Callable[[], None]) -> None:
        """See `BlockStep.step`."""
        if self.block_step is None:
            raise RuntimeError("there is no optimizer to step")
        self.block_step.step(updates=updates, premise=premise, torn=torn)

    def dropped(self) -> None:
        """The window was dropped: what it moved is no step's."""
        if self.block_step is None:
            return
        if self.block_step.open_window:
            self.traffic.forget(self.files)
        self._reduced.clear()
        self.block_step.drop_window()

    def stepped(self, step_s: float) -> None:
        """A step was committed and spread."""
        self.traffic.end(self.files, step_s)
        for name, value in self.report().scalars().items():
            self.group.observers.scalar(name, value, self.traffic.steps)
        self._reduced.clear()

    def arrived(
        self, flat: Flat, used: set[int], *, updates: int, factors: list[float], premise: Callable[[], str]
    ) -> None:
        """See `BlockStep.arrived`."""
        if self.block_step is not None:
            number = self._number_of[id(flat)]
            self.block_step.arrived(number, used, updates=updates, factors=factors, premise=premise)

    def end_backward(self, gatherer: Gatherer) -> None:
        """A backward ended whose gradients were reduced."""
        if self.block_step is not None:
            self.block_step.end_backward()
        self._plan_traffic(gatherer)

    def _plan_traffic(self, gatherer: Gatherer) -> None:
        """What the plan says of a backward and its forward: each unit in files is read for both, but for the unit
        that is kept between them; gradients in files are written, and read before where there were some."""
        turn = gatherer.order.turn
        for unit in gatherer.units:
            for flat in unit.flats:
                home = flat.home
                if home is None:
                    continue
                nbytes = home.blocks.held_numel * flat.plan.dtype.itemsize
                if home.parameters_away:
                    self.traffic.expect("parameters", read=nbytes * (1 if unit.index in turn else 2))
                if home.gradients_away and flat.used:
                    nbytes = home.blocks.held_numel * flat.grad_dtype.itemsize
                    self.traffic.expect("gradients", written=nbytes, read=nbytes if id(flat) in self._reduced else 0)
                    self._reduced.add(id(flat))

    # -- outside of a step --------------------------------------------------------------------------------------------
    def read_state(self, flat: Flat, held: HeldPiece, piece: Tensor, key: str) -> Tensor:
        """A copy of an element-wise state of a piece that is in files, in the piece's shape."""
        home, block = self._block_of(flat, held)
        return home.read(block, key)[held.low - block.low : held.high - block.low].view(piece.shape)

    def write_state(self, flat: Flat, held: HeldPiece, key: str, values: Tensor, *, start: int = 0) -> None:
        """Makes `values` (n,) the elements from `start` on of an element-wise state of a piece that is in files."""
        home, block = self._block_of(flat, held)
        whole = values.reshape(-1)
        if whole.numel() < block.numel:
            whole = home.read(block, key)
            first = held.low - block.low + start
            whole[first : first + values.numel()] = values.reshape(-1)
        home.write(block, key, whole)

    def in_files(self, flat: Flat, held: HeldPiece) -> bool:
        """Whether a piece's element-wise states are in files."""
        home = flat.home
        return home is not None and home.states_away and held.low >= home.blocks.resident

    def _block_of(self, flat: Flat, held: HeldPiece) -> tuple[FlatHome, Block]:
        home = flat.home
        if home is None:
            raise RuntimeError(f"{flat.name}: nothing of it is in files")
        return home, next(block for block, _, _ in home.blocks.over(held.low, held.high))

    def report(self) -> OffloadReport:
        """See `OffloadReport`."""
        memory, now = resident(), self.traffic
        return OffloadReport(
            store=self.store,
            planned=self.plan.needs,
            limit=self.plan.limit,
            peak_nbytes=None if memory is None or self._base is None else memory.growth_since(self._base),
            resident=self.plan.resident,
            steps=now.steps,
            read=now.read,
            written=now.written,
            expected_read=now.expected_read,
            expected_written=now.expected_written,
            stall_s=now.stall_s,
            io_s=now.io_s,
            step_s=now.step_s,
            wall_s=now.wall_s,
        )

    def close(self) -> None:
        """Gives all files and folders back. May be called again."""
        self._slots = None
        with contextlib.ExitStack() as stack:  # all of them, whatever one raises; folders last
            for folder in self._folders.values():
                stack.callback(folder.close)
            for files in self.files.values():
                stack.callback(files.close)


def codecs_of(states: Iterable[str]) -> dict[str, str]:
    """{state: how it is kept in 8 bits}."""
    return {name: "unsigned" if name in _UNSIGNED else "signed" for name in states}
