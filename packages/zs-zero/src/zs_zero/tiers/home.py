"""The numbers of one flat that are not in its own tensors: its blocks in files, read and written by range.

This is what everything but the step goes through: building a model, values set or asked for by parameter, checkpoints.
What it reads is a copy; what it writes is current at once, and whatever a slot had of the block is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from zs_comm.views import bytes_of

from ..block_store import Ticket
from ..rounding import join, split
from .blocks import GRAD, MASTER, PARAM, REST, Block, FlatBlocks
from .eightbit import decode, encode, encoded_nbytes
from .slots import begun, wait_for_all

if TYPE_CHECKING:
    from ..flat import Flat
    from .files import TierFiles


def _kind(region: str) -> str:
    """Of the files that a region is in."""
    return {PARAM: "parameters", GRAD: "gradients"}.get(region, "optimizer")


class FlatHome:
    """Where the numbers of one flat are. `files` by kind; a kind that is missing is in memory."""

    def __init__(
        self, blocks: FlatBlocks, files: dict[str, TierFiles], *, codecs: dict[str, str],
        changed: Callable[[Block], None],
    ) -> None:  # fmt: skip
        self.blocks = blocks
        self.files = files
        self.codecs = codecs  # {state: kind of its 8-bit code}
        self._changed = changed

    # -- what is where ------------------------------------------------------------------------------------------------
    @property
    def parameters_away(self) -> bool:
        """Whether the parameters are in files."""
        return "parameters" in self.files

    @property
    def states_away(self) -> bool:
        """Whether masters and states of some elements are in files."""
        return "optimizer" in self.files and self.blocks.resident < self.blocks.held_numel

    def owned_away(self, block: Block) -> bool:
        """Whether masters and states of a block are in files."""
        return "optimizer" in self.files and not block.resident

    @property
    def gradients_away(self) -> bool:
        return "gradients" in self.files and self.blocks.grad is not None

    def file_of(self, region: str) -> TierFiles:
        return self.files[_kind(region)]

    def stored_nbytes(self, block: Block, region: str) -> int:
        """Bytes of a region as it is stored."""
        if region in self.codecs:
            return encoded_nbytes(block.numel)
        return self.blocks.nbytes(block, region)

    def dtype(self, region: str) -> torch.dtype:
        dtype = (
            self.blocks.param if region == PARAM else self.blocks.grad if region == GRAD else self.blocks.owned[region]
        )
        if dtype is None:
            raise RuntimeError(f"flat {self.blocks.flat}: frozen parameters have no {region}")
        return dtype

    def in_files(self, block: Block) -> Iterator[str]:
        """The regions of a block that are in files."""
        if self.parameters_away:
            yield PARAM
        if self.owned_away(block):
            yield from self.blocks.owned
        if self.gradients_away:
            yield GRAD

    def reservations(self, kind: str) -> dict[str, int]:
        """{key: bytes} of this flat in the files of `kind`."""
        return {
            block.key(region): self.stored_nbytes(block, region)
            for block in self.blocks.blocks
            for region in self.in_files(block)
            if _kind(region) == kind
        }

    # -- building -----------------------------------------------------------------------------------------------------
    def move_in(self, flat: Flat, own: Tensor, values: Tensor | None, *, trained: bool) -> None:
        """Parameters `own` (held_numel,), masters and rests to where they are from now on.

        `values`: exact ones, if any.
        """
        owned = self.blocks.owned if trained else {}
        resident = self.blocks.resident
        rest = split(values)[1] if REST in owned and values is not None else None
        for block in self.blocks.blocks:
            at = slice(block.low, block.high)
            if self.parameters_away:
                self.write(block, PARAM, own[at])
            if not block.resident and MASTER in owned and values is not None:
                self.write(block, MASTER, values[at])
            if not block.resident and rest is not None:
                self.write(block, REST, rest[at])
        if resident and MASTER in owned and values is not None:
            flat.master = values if resident == self.blocks.held_numel else values[:resident].clone()
        if resident and rest is not None:
            flat.rest = rest if resident == self.blocks.held_numel else rest[:resident].clone()

    # -- one region ---------------------------------------------------------------------------------------------------
    def read(self, block: Block, region: str) -> Tensor:
        """A copy of a region, (block.numel,); zeros where nothing was ever stored."""
        files, key = self.file_of(region), block.key(region)
        if not files.has(key):
            return torch.zeros(block.numel, dtype=self.dtype(region))
        data = torch.empty(self.stored_nbytes(block, region), dtype=torch.uint8)
        files.read(key, bytes_of(data)).wait()
        return (
            decode(data, block.numel, self.codecs[region]) if region in self.codecs else data.view(self.dtype(region))
        )

    def write(self, block: Block, region: str, values: Tensor) -> None:
        """Makes `values` (block.numel,) a region's content."""
        data = values.to("cpu").contiguous()
        coded = (
            encode(data, self.codecs[region])
            if region in self.codecs
            else data.to(self.dtype(region)).view(torch.uint8)
        )
        self._changed(block)
        self.file_of(region).overwrite(block.key(region), bytes_of(coded)).wait()

    # -- values by range ----------------------------------------------------------------------------------------------
    def value_dtype(self, flat: Flat) -> torch.dtype:
        """Of exact values: frozen parameters have none beside themselves."""
        return flat.kept.value if self.blocks.owned.keys() & {MASTER, REST} else self.blocks.param

    def values(self, flat: Flat, low: int, high: int) -> Tensor:
        """The parameters' exact values of elements `[low, high)`, a copy."""
        out = torch.empty(high - low, dtype=self.value_dtype(flat))
        for block, first, last in self.blocks.over(low, high):
            at = slice(first - block.low, last - block.low)
            out[first - low : last - low] = self._value(flat, block)[at]
        return out

    def _value(self, flat: Flat, block: Block) -> Tensor:
        where = slice(block.low, block.high)
        away = self.owned_away(block)
        if MASTER in self.blocks.owned:
            if away:
                return self.read(block, MASTER)
            if flat.master is not None:
                return flat.master[where]
        param = self.read(block, PARAM) if self.parameters_away else flat.shard[where].to("cpu")
        if REST in self.blocks.owned:
            if away:
                return join(param, self.read(block, REST))
            if flat.rest is not None:
                return join(param, flat.rest[where])
        return param

    def store(self, flat: Flat, low: int, high: int, values: Tensor) -> None:
        """Sets elements `[low, high)` of masters and parameters to `values` (high - low,)."""
        for block, first, last in self.blocks.over(low, high):
            new = values[first - low : last - low]
            if last - first < block.numel:
                whole = self._value(flat, block).to(new.dtype, copy=True)
                whole[first - block.low : last - block.low] = new
                new = whole
            self._store(flat, block, new)

    def changed(self) -> None:
        """Parameters in memory were changed by the user: what was computed from them is void."""
        for block in self.blocks.blocks:
            self._changed(block)

    def _store(self, flat: Flat, block: Block, values: Tensor) -> None:
        self._changed(block)
        where = slice(block.low, block.high)
        away = self.owned_away(block)
        param = values
        if REST in self.blocks.owned:
            param, rest = split(values)
            if away:
                self.write(block, REST, rest)
            elif flat.rest is not None:
                flat.rest[where] = rest
        elif MASTER in self.blocks.owned:
            if away:
                self.write(block, MASTER, values)
            elif flat.master is not None:
                flat.master[where] = values
        if self.parameters_away:
            self.write(block, PARAM, param)
        else:
            flat.shard[where] = param

    def adopt_writes(
        self, flat: Flat, now: Tensor, *, before: Tensor | None = None, touched: Iterable[tuple[int, int]] = ()
    ) -> None:  # fmt: skip
        """Takes values `now` (held_numel,) that the user wrote into the model over, element by element.

        An element that was not written keeps what is more precise about it. What was written is told by `before`, what
        files and masters say, or, where none of them says anything, it is all of the ranges `touched`.
        """
        ranges = list(touched)
        for block in self.blocks.blocks:
            new = now[block.low : block.high].to("cpu")
            changed = torch.zeros(block.numel, dtype=torch.bool)
            if self.parameters_away or before is not None or MASTER in self.blocks.owned:
                if self.parameters_away:
                    old = self.read(block, PARAM)
                elif before is not None:
                    old = before[block.low : block.high].to("cpu")
                else:
                    old = self._value(flat, block).to(new.dtype)
                changed = old.ne(new)  # a number that is not one counts as written: it stays what it is
            else:
                for low, high in ranges:
                    changed[max(low - block.low, 0) : max(high - block.low, 0)] = True
            if bool(changed.any()):
                values = self._value(flat, block).to(flat.kept.value, copy=True)
                values[changed] = new[changed].to(flat.kept.value)
                self._store(flat, block, values)

    def adopt(self, flat: Flat, *, force: bool) -> None:
        """`adopt_writes`, from where the flat's values are."""
        if flat.releasable:
            before = None if self.parameters_away else flat.shard.clone()
            self.adopt_writes(flat, flat.own_slice(), before=before)
            return
        now = [param._version for param in flat.params]
        if flat.versions == now and not force:
            return
        touched = [
            (held.low, held.high)
            for held in flat.held_pieces()
            if not flat.versions or flat.versions[held.piece.index] != now[held.piece.index]
        ]
        lent, flat.lent = flat.lent, None
        if self.blocks.owned.keys() & {MASTER, REST}:
            self.adopt_writes(flat, flat.own_slice().clone(), before=lent, touched=touched)
        else:
            self.changed()
        flat.lent = lent if flat.borrowers else None
        flat.note_versions()

    # -- reduced gradients --------------------------------------------------------------------------------------------
    def put_gradient(self, grad: Tensor) -> None:
        """Makes `grad` (held_numel,) the content of all blocks, and waits for it."""
        files, data, size = self.files["gradients"], bytes_of(grad), grad.itemsize
        wait_for_all(
            [
                begun(files.overwrite, block.key(GRAD), data[block.low * size : block.high * size])
                for block in self.blocks.blocks
            ]
        )

    def gradient(self, low: int, high: int) -> Tensor:
        """A copy of elements `[low, high)`."""
        out = torch.empty(high - low, dtype=self.dtype(GRAD))
        for block, first, last in self.blocks.over(low, high):
            out[first - low : last - low] = self.read(block, GRAD)[first - block.low : last - block.low]
        return out

    # -- the whole flat, for a unit that runs -------------------------------------------------------------------------
    def start_reading(self, target: Tensor) -> list[Ticket]:
        """Starts filling `target` (held_numel,) with the parameters; what is to be waited for tells all errors."""
        files, data = self.files["parameters"], bytes_of(target)
        size = target.itemsize
        return [
            begun(files.read, block.key(PARAM), data[block.low * size : block.high * size])
            for block in self.blocks.blocks
        ]
