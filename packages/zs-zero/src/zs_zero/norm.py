"""The global gradient norm: one formula over the plan's pieces, so that it is the same number at every stage.

Each slice's sum runs over its pieces in plan order (fp32 norms, squared and added in fp64); the slices' sums are added
in slice order. A rank that holds all slices computes them all; one that holds one exchanges sums of eight bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from zs_comm import Group, all_gather

if TYPE_CHECKING:
    from .flat import Flat


SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def global_norm(flats: Iterable[Flat], shard_group: Group, *, slices: int) -> Tensor:
    """2-norm of the mean gradient over all used parameters: a 0-dim fp32 tensor on the CPU."""
    found: list[Tensor] = []  # gradients where they stand, norms of those that are elsewhere or to be multiplied
    standing: list[int] = []
    places: list[int] = []
    for flat in flats:
        for position, held in enumerate(flat.held_pieces()):
            if held.piece.index not in flat.used:
                continue
            places.append(held.low // flat.plan.shard_numel)
            if flat.norms and not flat.factors:
                found.append(flat.norms[position])  # as it arrived
            elif flat.factors or flat.grad_away:
                found += norms_of([flat.gradient(held)])  # of a copy, which goes again
            else:
                standing.append(len(found))
                found.append(flat.gradient(held))
    for at, norm in zip(standing, norms_of([found[at] for at in standing]), strict=True):
        found[at] = norm
    sums = torch.zeros(slices, dtype=torch.float64)
    first = shard_group.rank if shard_group.size > 1 else 0
    by_slice: dict[int, list[Tensor]] = {}
    for place, norm in zip(places, found, strict=True):
        by_slice.setdefault(place, []).append(norm)
    for place, norms in by_slice.items():
        sums[first + place] = torch.stack(norms).double().square().sum().cpu()
    if shard_group.size > 1:
        all_gather(sums, shard_group, label="gradient norm")
    total = 0.0
    for value in sums.tolist():
        total += value
    return torch.tensor(total, dtype=torch.float64).sqrt().float()


def norms_of(grads: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norms of pieces' gradients, in fp32 for those of 16 bits; 0-dim each."""
    norms = list(grads)
    for short in (True, False):
        at = [index for index, grad in enumerate(grads) if (grad.dtype in SIXTEEN_BIT) is short]
        made = torch._foreach_norm([grads[i] for i in at], 2, dtype=torch.float32 if short else None) if at else ()
        for index, norm in zip(at, made, strict=True):
            norms[index] = norm
    return norms
