"""Every collective against torch's own, in worlds of one to four, in every dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from zs_comm import (
    ConfigError,
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    exchange,
    reduce_scatter,
    scatter,
)
from zs_comm.testing import run_ranks

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WORLDS = (1, 2, 3, 4)


def everyones(group: Group, numel: int, dtype: torch.dtype) -> list[Tensor]:
    """Each rank's input, known to all of them."""
    return [torch.randn(numel, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(group.size)]


def in_rank_order(
    pieces: list[Tensor], dtype: torch.dtype, *, pre: float | None = None, post: float | None = None
) -> Tensor:
    """The specification: fp32 (or fp64), rank 0 first, rounded once."""
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.zeros(pieces[0].shape, dtype=acc_dtype)
    for i, piece in enumerate(pieces):
        value = piece.to(acc_dtype) * (1.0 if pre is None else pre)
        total = value if i == 0 else total + value
    return (total * (1.0 if post is None else post)).to(dtype)


def gathers(group: Group) -> None:
    for dtype in (*FLOATS, torch.int64, torch.uint8, torch.bool):
        for n in (0, 1, 257, 70_001):
            shards = [(torch.arange(n) % 5 + r).to(dtype) for r in range(group.size)]
            flat = torch.zeros(n * group.size, dtype=dtype)
            assert all_gather(flat, group, shard=shards[group.rank]) is flat
            assert torch.equal(flat, torch.cat(shards))
            in_place = torch.zeros(n * group.size, dtype=dtype)
            in_place[group.rank * n : (group.rank + 1) * n] = shards[group.rank]
            assert all_gather(in_place, group, async_op=True).wait() is in_place
            assert torch.equal(in_place, flat)


@pytest.mark.parametrize("world", WORLDS)
def test_all_gather(world: int) -> None:
    run_ranks(gathers, world)


def reduce_scatters(group: Group) -> None:
    for dtype in FLOATS:
        for n in (0, 1, 257, 70_001):
            inputs = everyones(group, n * group.size, dtype)
            mine = inputs[group.rank].clone()
            own = slice(group.rank * n, (group.rank + 1) * n)
            pieces = [flat[own] for flat in inputs]
            mean = in_rank_order(pieces, dtype, post=1 / group.size)
            assert torch.equal(reduce_scatter(mine, group), mean)
            assert torch.equal(mine, inputs[group.rank]), "the input is left as it was"
            result = reduce_scatter(mine, group, async_op=True).wait()
            assert result is not None
            assert torch.equal(result, mean)
            assert torch.equal(reduce_scatter(mine, group, op="sum"), in_rank_order(pieces, dtype))
            scaled = reduce_scatter(mine, group, pre_factor=0.3, post_factor=1.7)
            assert torch.equal(scaled, in_rank_order(pieces, dtype, pre=0.3, post=1.7))
            out = torch.empty(n, dtype=dtype)
            assert reduce_scatter(mine, group, out=out) is out
            assert torch.equal(out, mean)
            reduce_scatter(mine, group, out=mine[own])
            assert torch.equal(mine[own], mean), "the result may take the place of this rank's own slice"


@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter_sums_in_rank_order_and_rounds_once(world: int) -> None:
    run_ranks(reduce_scatters, world)


def large_reduce_scatter(group: Group, n: int) -> bool:
    inputs = everyones(group, n * group.size, torch.float32)
    pieces = [flat[group.rank * n : (group.rank + 1) * n] for flat in inputs]
    same = torch.equal(reduce_scatter(inputs[group.rank], group), in_rank_order(pieces, torch.float32, post=0.25))
    work = reduce_scatter(inputs[group.rank].bfloat16(), group, async_op=True)
    expected = in_rank_order([piece.bfloat16() for piece in pieces], torch.bfloat16, post=0.25)
    return same and torch.equal(work.wait(), expected)  # type: ignore[arg-type]


def test_reduce_scatter_in_many_parts() -> None:
    assert run_ranks(large_reduce_scatter, 4, 2_500_003) == [True] * 4


def like_ddp(group: Group) -> bool:
    torch.manual_seed(group.rank)
    flat = torch.randn(100_000)
    divided = flat / group.size  # DDP divides first and adds then
    dist.all_reduce(divided)
    own = slice(group.rank * 50_000, (group.rank + 1) * 50_000)
    return torch.equal(reduce_scatter(flat, group), divided[own])


def test_mean_of_two_ranks_has_the_bits_of_ddp() -> None:
    assert run_ranks(like_ddp, 2) == [True, True]


def half_precision(group: Group) -> None:
    largest = torch.full((group.size,), 65504.0, dtype=torch.float16)
    assert reduce_scatter(largest, group).item() == 65504.0  # a sum in fp16 would be inf
    tiny = torch.full((group.size,), 6e-8, dtype=torch.float16)  # a subnormal: halving it in fp16 would round it
    assert torch.equal(reduce_scatter(tiny, group), tiny[:1])
    ulp = torch.full((group.size,), 1.0 if group.rank == 0 else 2**-9, dtype=torch.bfloat16)
    assert reduce_scatter(ulp, group, op="sum").item() == (1.0 if group.size < 4 else 1.0078125)  # rounded at the end


@pytest.mark.parametrize("world", [2, 4])
def test_sixteen_bit_sums_are_rounded_once(world: int) -> None:
    run_ranks(half_precision, world)


def all_reduces(group: Group) -> None:
    for dtype in FLOATS:
        for numel in (1, 5, 1000, 70_001):
            inputs = everyones(group, numel, dtype)
            expected = in_rank_order(inputs, dtype, post=1 / group.size)
            tensor = inputs[group.rank].clone()
            assert all_reduce(tensor, group) is tensor
            assert torch.equal(tensor, expected)
            tensor = inputs[group.rank].clone()
            assert all_reduce(tensor, group, bucket_numel=999, async_op=True).wait() is tensor
            assert torch.equal(tensor, expected)
            for op, reference in (("max", torch.maximum), ("min", torch.minimum)):
                tensor, best = inputs[group.rank].clone(), inputs[0]
                for other in inputs[1:]:
                    best = reference(best, other)
                assert torch.equal(all_reduce(tensor, group, op=op), best)
    counts = torch.tensor([group.rank, 10])
    assert all_reduce(counts, group, op="sum").tolist() == [sum(range(group.size)), 10 * group.size]
    assert all_reduce([], group) == []


@pytest.mark.parametrize("world", WORLDS)
def test_all_reduce(world: int) -> None:
    run_ranks(all_reduces, world)


def several(group: Group) -> None:
    shapes = [(3, 4), (), (17,), (0,), (5, 5, 5), (40_000,), (2, 3)]
    inputs = [[t.view(s) for t in everyones(group, torch.Size(s).numel(), torch.float32)] for s in shapes]
    expected = [in_rank_order(ranks, torch.float32, post=1 / group.size) for ranks in inputs]
    for bucket_numel in (None, 100, 977, 39_999, 10**6):
        tensors = [ranks[group.rank].clone() for ranks in inputs]
        tensors[4] = tensors[4].transpose(0, 2).contiguous().transpose(0, 2)  # not contiguous
        tensors.append(torch.full((9,), float(group.rank), dtype=torch.float64))
        assert all_reduce(tensors, group, bucket_numel=bucket_numel) is tensors
        for got, want in zip(tensors, expected, strict=False):
            assert torch.equal(got, want), f"{bucket_numel=} {got.shape}"
        assert torch.equal(tensors[-1], torch.full((9,), (group.size - 1) / 2, dtype=torch.float64))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_bucketed_and_unbucketed_all_reduce_have_the_same_bits(world: int) -> None:
    run_ranks(several, world)


def not_a_number(group: Group) -> list[float]:
    tensor = torch.tensor([float("nan") if group.rank == 1 else 1.0, float("inf") if group.rank == 0 else 2.0])
    return all_reduce(tensor, group, op="max").tolist()


def test_not_a_number_is_the_largest_and_the_smallest() -> None:
    for values in run_ranks(not_a_number, 3):
        assert values[0] != values[0]
        assert values[1] == float("inf")


def movers(group: Group) -> None:
    size, rank = group.size, group.rank
    for src in range(size):
        tensor = torch.full((3, 5), float(rank), dtype=torch.bfloat16)
        assert broadcast(tensor, group, src=src) is tensor
        assert torch.equal(tensor, torch.full((3, 5), float(src), dtype=torch.bfloat16))
        out = torch.zeros(4)
        flat = torch.arange(4.0 * size) if rank == src else None
        assert scatter(flat, out, group, src=src) is out
        assert out.tolist() == [4.0 * rank + i for i in range(4)]
    inp = torch.arange(2 * size * 3).view(2 * size, 3) + 1000 * rank
    out = torch.zeros_like(inp)
    all_to_all(out, inp, group)
    expected = torch.cat([torch.arange(6).view(2, 3) + 6 * rank + 1000 * r for r in range(size)])
    assert torch.equal(out, expected)
    assert broadcast(torch.ones(2), group, async_op=True).wait() is not None
    barrier(group)


@pytest.mark.parametrize("world", WORLDS)
def test_broadcast_scatter_all_to_all(world: int) -> None:
    run_ranks(movers, world)


def exchanges(group: Group) -> None:
    for nbytes in (0, 1, 247, 248, 249, 70_000):
        payloads = [bytes([r]) * (nbytes if r % 2 == 0 else 3) for r in range(group.size)]
        assert exchange(payloads[group.rank], group) == payloads


@pytest.mark.parametrize("world", WORLDS)
def test_exchange(world: int) -> None:
    run_ranks(exchanges, world)


def out_of_order(group: Group) -> None:
    n = 1000
    works = []
    flats = [torch.full((n * group.size,), float(i)) for i in range(8)]
    for i, flat in enumerate(flats):
        works.append(
            reduce_scatter(flat, group, label=str(i), async_op=True)
            if i % 2
            else all_gather(flat, group, label=str(i), async_op=True)
        )
    order = range(8) if group.rank == 0 else reversed(range(8))
    for i in order:
        result = works[i].wait()
        assert result is not None
        assert bool((result == i).all())
    assert not group.in_flight


def test_works_may_be_waited_for_in_any_order() -> None:
    run_ranks(out_of_order, 3)


def test_one_process_needs_no_process_group() -> None:
    group = Group.single()
    assert not dist.is_initialized()
    flat = torch.arange(4.0)
    assert all_gather(flat, group) is flat
    assert reduce_scatter(flat, group).tolist() == flat.tolist()
    assert reduce_scatter(flat, group, out=flat) is flat
    assert reduce_scatter(flat, group, pre_factor=2.0, post_factor=0.5, async_op=True).wait() is not None
    assert all_reduce([flat, flat[:2]], group)[0] is flat
    assert all_reduce(flat, group, post_factor=0.5).tolist() == [0.0, 0.5, 1.0, 1.5]
    assert broadcast(flat, group) is flat
    assert exchange(b"x", group) == [b"x"]
    barrier(group)
    assert all_gather(flat, group, async_op=True).done


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda g: all_gather(torch.ones(2, 2), g), "1-d contiguous"),
        (lambda g: all_gather(torch.ones(8)[::2], g), "1-d contiguous"),
        (lambda g: all_gather(torch.ones(2), g, shard=torch.ones(3)), "shard has 3 elements"),
        (lambda g: reduce_scatter(torch.ones(2), g, op="max"), "is for all_reduce"),
        (lambda g: reduce_scatter(torch.ones(2), g, op="median"), "op is 'median'"),
        (lambda g: reduce_scatter(torch.ones(2), g, out=torch.ones(3)), "it must be"),
        (lambda g: reduce_scatter(torch.ones(2, dtype=torch.int32), g, post_factor=0.5), "cannot be scaled"),
        (lambda g: all_reduce(torch.ones(2), g, bucket_numel=0), "must be positive"),
        (lambda g: all_reduce(torch.ones(2), g, op="max", post_factor=2.0), "takes no factors"),
        (lambda g: broadcast(torch.ones(2), g, src=1), "position in the group"),
        (lambda g: scatter(None, torch.ones(2), g), "source rank must give"),
        (lambda g: scatter(torch.ones(3), torch.ones(2), g), "3 elements"),
        (lambda g: all_to_all(torch.ones(2), torch.ones(3), g), "same numel"),
    ],
)
def test_what_cannot_be_is_refused(call, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=text):
        call(Group.single())


def indivisible(group: Group) -> str:
    with pytest.raises(ConfigError) as caught:
        reduce_scatter(torch.ones(7), group)
    return str(caught.value)


def test_a_flat_tensor_must_divide() -> None:
    assert run_ranks(indivisible, 2)[0] == "reduce_scatter: 7 elements do not divide by 2 ranks of axis world"


def crossed(group: Group) -> None:
    flat = torch.ones(group.size * 3_000_000, dtype=torch.bfloat16)
    first = reduce_scatter(flat, group, label="first", async_op=True)
    second = reduce_scatter(flat, group, label="second", async_op=True)
    for work in (first, second) if group.rank % 2 else (second, first):
        assert work.wait() is not None


def test_large_reduce_scatters_may_be_waited_for_in_any_order() -> None:
    run_ranks(crossed, 4)


def crossed_all_reduces(group: Group) -> None:
    first = all_reduce(torch.ones(100_000), group, op="sum", label="first", async_op=True)
    second = all_reduce(torch.ones(100_000), group, op="sum", label="second", async_op=True)
    if group.rank == 0:
        first.wait()
        barrier(group)
    else:
        barrier(group)
        second.wait()
    for work in (second, first):
        result = work.wait()
        assert result is not None
        assert result[0] == group.size


def test_an_all_reduce_in_flight_holds_nobody_up() -> None:
    run_ranks(crossed_all_reduces, 3)
