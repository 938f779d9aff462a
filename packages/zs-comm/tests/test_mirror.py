"""A simulated group: every collective runs, and gives what ranks that all do the same would give."""

from __future__ import annotations

import pytest
import torch
from zs_comm import agreed, all_gather, all_reduce, barrier, broadcast, exchange, reduce_scatter, same_everywhere
from zs_comm.testing import mirrored_group

SIZES = [1, 2, 3, 8, 300]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("numel", [7, 40_000])
def test_a_sum_is_that_of_equal_terms(size: int, numel: int) -> None:
    group = mirrored_group(size)
    assert (group.size, group.rank) == (size, 0)
    mine = torch.arange(numel, dtype=torch.float32) + 1
    own = -(-numel // size)
    found = all_reduce(mine.clone(), group, op="mean")
    assert torch.equal(found[:own], mine[:own])


@pytest.mark.parametrize("size", SIZES)
def test_a_gather_has_this_rank_everywhere(size: int) -> None:
    flat = torch.zeros(size * 3)
    all_gather(flat, mirrored_group(size), shard=torch.tensor([1.0, 2.0, 3.0]))
    assert flat.tolist() == [1.0, 2.0, 3.0] * size


@pytest.mark.parametrize("size", SIZES)
def test_a_reduce_scatter_sums_this_ranks_slice(size: int) -> None:
    flat = torch.arange(size * 4, dtype=torch.float32)
    out = reduce_scatter(flat, mirrored_group(size), op="mean")
    assert out.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_agree(size: int) -> None:
    group = mirrored_group(size)
    assert exchange(b"x" * 400, group) == [b"x" * 400] * size
    same_everywhere("the same", group, what="a text")
    with agreed(group, "nothing"):
        barrier(group)
    assert broadcast(torch.ones(3), group).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="mine"), agreed(group, "a problem"):
        raise ValueError("mine")
