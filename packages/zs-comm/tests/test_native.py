"""The device path's own logic, over CPU tensors: the same calls of torch.distributed, the bits of the other path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zs_comm import Group, all_reduce, barrier, native, reduce_scatter
from zs_comm.deadline import Deadline
from zs_comm.testing import run_ranks

SOON = 5.0


def device_path(group: Group) -> None:
    size, rank = group.size, group.rank
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(rank)
        flat = torch.randn(size * 100).to(dtype)
        own = slice(rank * 100, (rank + 1) * 100)
        for pre, post in ((None, None), (None, 0.3), (1.5, 0.25)):
            out = torch.empty(100, dtype=dtype)
            work = native.reduce_scatter(flat, group, out, pre, post)
            assert work(Deadline(SOON)) is out
            expected = reduce_scatter(flat, group, op="sum", pre_factor=pre, post_factor=post)
            assert torch.equal(out, expected)
            assert work.poll()
        whole = torch.zeros_like(flat)
        whole[own] = out
        gathered = native.all_gather(whole, whole[own], group)(Deadline(SOON))
        assert torch.equal(gathered[own], out)
        for numel, small in ((7, True), (100, False), (101, False)):
            for op in ("sum", "max", "min"):
                tensor = torch.randn(numel).to(dtype)
                other = tensor.clone()
                reduce_bucket(group, tensor, small=small, op=op)
                assert torch.equal(tensor, all_reduce(other, group, op=op))
    tensor = torch.full((2, 3), float(rank))
    native.broadcast(tensor, group, size - 1)(Deadline(SOON))
    assert torch.equal(tensor, torch.full((2, 3), size - 1.0))
    part = torch.zeros(2, 2)
    native.scatter(torch.arange(4.0 * size) if rank == 0 else None, part, group, 0)(Deadline(SOON))
    assert part.view(-1).tolist() == [4.0 * rank + i for i in range(4)]
    source = torch.arange(float(size)) + 10 * rank
    target = torch.empty(size)
    native.all_to_all(target, target, source, group)(Deadline(SOON))
    assert target.tolist() == [rank + 10.0 * r for r in range(size)]
    barrier(group)


def reduce_bucket(group: Group, tensor: Tensor, *, small: bool, op: str) -> None:
    bucket = native.Bucket(group, tensor, small=small, op=op, pre=None, post=None)
    bucket.start()
    bucket.reduce(Deadline(SOON))
    bucket.finish(Deadline(SOON))


@pytest.mark.parametrize("world", [2, 3])
def test_the_device_path_has_the_bits_of_the_other(world: int) -> None:
    run_ranks(device_path, world)


def mixed_backend(group: Group) -> float:
    return float(all_reduce(torch.ones(1), group, op="sum"))


def test_cpu_tensors_under_a_backend_for_each_device() -> None:
    assert run_ranks(mixed_backend, 2, backend="cpu:gloo") == [2.0, 2.0]
