"""How a flat buffer's elements are cut into blocks, and what is kept of each. Pure arithmetic: no tensor's memory here.

    held elements of a flat   |  resident  | block k | block k+1 | ... |
                              0            r = a multiple of the block   held_numel

    regions of a block        values in the model's dtype ("param"), and of trained flats what the optimizer owns:
                              "master" or "rest" (see `precision.Kept`), its element-wise states, and "grad"

A region of a block is one key of a store. Masters and states of the resident elements stay in memory; their parameters
may be in files all the same. Borders are multiples of `policy.ALIGN_NUMEL`, so whole vectors (torch's fused optimizers
round differently in an odd tail) and whole cache lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..flat_pieces import HeldPiece
from ..plan import FlatPlan
from ..precision import Kept
from .policy import ALIGN_NUMEL

PARAM, MASTER, REST, GRAD = "param", "master", "rest", "grad"


@dataclass(frozen=True)
class Block:
    """Elements `[low, high)` of what this rank holds of a flat."""

    flat: int  # position among the plan's flats
    index: int
    low: int
    high: int
    resident: bool  # masters and states stay in memory

    @property
    def numel(self) -> int:
        return self.high - self.low

    def key(self, region: str) -> str:
        """Of a region in its store."""
        return f"{self.flat}.{self.index}.{region}"


@dataclass(frozen=True)
class FlatBlocks:
    """The blocks of one flat on this rank, and the dtypes of their regions."""

    flat: int
    held_numel: int
    resident: int  # elements whose masters and states stay in memory: whole blocks, or all
    blocks: tuple[Block, ...]
    owned: Mapping[str, torch.dtype]  # regions that belong to the optimizer: master or rest, and states
    param: torch.dtype
    grad: torch.dtype | None  # None: not trained

    def nbytes(self, block: Block, region: str) -> int:
        dtype = self.param if region == PARAM else self.grad if region == GRAD else self.owned[region]
        if dtype is None:
            raise RuntimeError(f"block {block.key(region)}: frozen parameters have no gradients")
        return block.numel * dtype.itemsize

    def over(self, low: int, high: int) -> Iterator[tuple[Block, int, int]]:
        """The blocks with elements of `[low, high)`, and which of these each has."""
        for block in self.blocks:
            first, last = max(low, block.low), min(high, block.high)
            if first < last:
                yield block, first, last


def owned_regions(kept: Kept, states: Sequence[str]) -> dict[str, torch.dtype]:
    """{region: dtype} of what the optimizer keeps of each element, in the order in which it is stored."""
    if kept.update == "kahan":
        first = {REST: torch.int16}
    else:
        first = {} if kept.master == kept.param else {MASTER: kept.master}
    return first | dict.fromkeys(states, kept.state)


def cut(
    number: int, plan: FlatPlan, *, slices: int, block_numel: int, resident: int, owned: Mapping[str, torch.dtype],
    grad: torch.dtype | None,
) -> FlatBlocks:  # fmt: skip
    """The blocks of a flat of which this rank holds `slices` slices, the first `resident` elements of it in memory."""
    held, size = plan.shard_numel * slices, block_size(block_numel)
    resident = held if resident >= held else resident // size * size
    borders = [*range(0, held, size), held]
    blocks = tuple(
        Block(number, index, low, high, low < resident) for index, (low, high) in enumerate(pairwise(borders))
    )
    return FlatBlocks(number, held, resident, blocks, owned if plan.trainable else {}, plan.dtype, grad)


def block_size(block_numel: int) -> int:
    """The next multiple of the alignment."""
    return max(ALIGN_NUMEL, -(-block_numel // ALIGN_NUMEL) * ALIGN_NUMEL)


def cut_pieces(pieces: Sequence[HeldPiece], blocks: Sequence[Block]) -> Iterator[tuple[HeldPiece, Block]]:
    """`pieces` cut at the borders of `blocks`; both in order."""
    for held in pieces:
        for block in blocks:
            low, high = max(held.low, block.low), min(held.high, block.high)
            if low < high:
                start = held.piece.start + low - held.low
                piece = replace(held.piece, start=start, stop=start + high - low)
                yield replace(held, piece=piece, low=low, high=high), block


def probe_states(client: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the element-wise states that `client` will make, found by a step of a copy of it on a few elements.

    Raises:
        RuntimeError: where that copy cannot be made or stepped.
    """
    numel = 2 * ALIGN_NUMEL
    probe: Any = type(client).__new__(type(client))
    probe.__dict__.update(client.__dict__)
    for name in list(vars(probe)):
        if name.endswith("_hooks"):
            setattr(probe, name, type(getattr(probe, name))())
    probe.state = type(client.state)(client.state.default_factory)
    probe.param_groups = []
    for group in client.param_groups:
        param = torch.nn.Parameter(torch.ones(numel))
        param.grad = torch.ones(numel)
        probe.param_groups.append({**group, "params": [param]})
    type(client).step(probe)  # not its own `step`: a schedule puts one there that steps the client
    names: dict[str, None] = {}
    for state in probe.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() == numel and value.is_floating_point():
                names[name] = None
    return tuple(names)
