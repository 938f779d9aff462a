"""The global gradient norm: one formula over the plan's pieces, so that it is the same number at every stage.

Each slice's sum runs over its pieces in plan order (fp32 norms, squared and added in fp64); the slices' sums are added
in slice order. A rank that holds all slices computes them all; one that holds one exchanges sums of eight bytes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from zs_comm import Group, all_gather

from .flat import Flat


def global_norm(flats: Iterable[Flat], shard_group: Group, *, slices: int) -> Tensor:
    """2-norm of the mean gradient over all used parameters: a 0-dim fp32 tensor on the CPU."""
    by_slice: list[list[Tensor]] = []
    for flat in flats:
        by_slice = by_slice or [[] for _ in flat.held]
        used, shard_numel = flat.used, flat.plan.shard_numel
        for held in flat.held_pieces():
            if held.piece.index in used:
                by_slice[held.low // shard_numel].append(flat.gradient(held))
    sums = torch.zeros(slices, dtype=torch.float64)
    first = shard_group.rank if shard_group.size > 1 else 0
    for position, pieces in enumerate(by_slice):
        if pieces:
            dtype = torch.float32 if pieces[0].dtype in (torch.bfloat16, torch.float16) else None
            norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=dtype)).double()
            sums[first + position] = norms.square().sum().cpu()
    if shard_group.size > 1:
        all_gather(sums, shard_group, label="gradient norm")
    total = 0.0
    for value in sums.tolist():
        total += value
    return torch.tensor(total, dtype=torch.float64).sqrt().float()
