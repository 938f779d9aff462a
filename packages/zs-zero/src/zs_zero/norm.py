"""The global gradient norm: one formula over the plan's pieces, so that it is the same number at every stage.

Each slice's sum runs over its pieces in plan order (fp32 norms, squared and added in fp64); the slices' sums are added
in slice order. A rank that holds all slices computes them all; one that holds one exchanges sums of eight bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from zs_comm import Group, all_gather

if TYPE_CHECKING:
    from .flat import Flat


SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def global_norm(flats: Iterable[Flat], shard_group: Group, *, slices: int) -> Tensor:
    """2-norm of the mean gradient over all used parameters: a 0-dim fp32 tensor on the CPU."""
    by_slice: list[list[Tensor | None]] = []
    together: list[tuple[list[Tensor | None], int, Tensor]] = []  # (where its norm goes, gradient)
    for flat in flats:
        by_slice = by_slice or [[] for _ in flat.held]
        used, shard_numel = flat.used, flat.plan.shard_numel
        for position, held in enumerate(flat.held_pieces()):
            if held.piece.index in used:
                known = flat.norms.get(position) if not flat.factors else None  # as it arrived
                mine = by_slice[held.low // shard_numel]
                if known is None and (flat.factors or flat.grad_away):
                    known = norm_of(flat.gradient(held))  # a copy, which goes again
                if known is None:
                    together.append((mine, len(mine), flat.gradient(held)))
                mine.append(known)
    for short in (True, False):  # one call for all that stand here
        chosen = [one for one in together if (one[2].dtype in SIXTEEN_BIT) is short]
        norms = (
            []
            if not chosen
            else torch._foreach_norm([grad for _, _, grad in chosen], 2, dtype=torch.float32 if short else None)
        )
        for (mine, place, _), norm in zip(chosen, norms, strict=True):
            mine[place] = norm
    sums = torch.zeros(slices, dtype=torch.float64)
    first = shard_group.rank if shard_group.size > 1 else 0
    for position, pieces in enumerate(by_slice):
        if pieces:
            found = torch.stack([norm.cpu() for norm in pieces if norm is not None]).double()
            sums[first + position] = found.square().sum()
    if shard_group.size > 1:
        all_gather(sums, shard_group, label="gradient norm")
    total = 0.0
    for value in sums.tolist():
        total += value
    return torch.tensor(total, dtype=torch.float64).sqrt().float()


def norm_of(grad: Tensor) -> Tensor:
    """The 2-norm of a piece's gradient (n,), in fp32 for one of 16 bits; 0-dim."""
    return torch._foreach_norm([grad], 2, dtype=torch.float32 if grad.dtype in SIXTEEN_BIT else None)[0]
