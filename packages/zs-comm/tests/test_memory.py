"""Storage bytes: every one counted once, at the moment it is there."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from zs_comm.memory import StorageMeter, live_tensor_nbytes, memory_summary

MIB = 2**20


def test_summary_counts_a_tensor_once_whatever_views_it() -> None:
    before = memory_summary()
    kept = torch.zeros(MIB, dtype=torch.float32)
    views = [kept[:10], kept.view(2, -1), nn.Parameter(kept)]
    after = memory_summary()
    assert after.live_nbytes - before.live_nbytes == 4 * MIB
    assert after.live[torch.float32] - before.live.get(torch.float32, 0) == 4 * MIB
    assert len(views) == 3
    text = str(after)
    assert "host resident" in text
    assert "float32" in text


def test_resident_memory_grows_with_what_is_written() -> None:
    before = memory_summary()
    if before.rss_nbytes is None or before.peak_rss_nbytes is None:
        pytest.skip("this platform does not say")
    kept = torch.ones(8 * MIB)
    after = memory_summary()
    assert after.rss_nbytes is not None
    assert after.rss_nbytes - before.rss_nbytes > 0.8 * kept.nbytes
    assert after.peak_rss_nbytes is not None
    assert after.peak_rss_nbytes >= after.rss_nbytes * 0.99


def test_gradients_without_a_python_object_count() -> None:
    layer = nn.Linear(256, 256, bias=False)
    before = live_tensor_nbytes()
    layer(torch.ones(1, 256)).sum().backward()
    assert live_tensor_nbytes() - before == layer.weight.nbytes


def test_meter_follows_allocation_resize_and_release() -> None:
    outside = torch.empty(1000, dtype=torch.uint8)
    with StorageMeter() as meter:
        base = meter.start_nbytes

        def grown() -> tuple[int, int]:
            return meter.now_nbytes - base, meter.peak_nbytes - base

        flat = torch.empty(1000)
        assert grown() == (4000, 4000)
        view = flat[:10]
        assert grown() == (4000, 4000)
        flat.untyped_storage().resize_(0)
        assert grown() == (0, 4000)
        flat.untyped_storage().resize_(8000)
        assert grown() == (8000, 8000)
        other = torch.zeros(500)
        del flat
        assert grown() == (10000, 10000)  # `view` still holds the storage
        del view
        assert grown() == (2000, 10000)
        other.resize_(1000)
        assert grown() == (4000, 10000)
        del outside
        assert grown() == (3000, 10000)
        meter.reset_peak()
        assert meter.peak_nbytes - base == 3000
    assert meter.allocated_nbytes == 0
    del other
    assert meter.now_nbytes - base == 3000  # the block is over


def train(model: nn.Module, batch: torch.Tensor) -> None:
    model(batch).square().mean().backward()


def test_meter_of_a_training_step_by_hand() -> None:
    """Eight layers without bias: the gradient stays, and no activation is as large as a weight."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    nbytes = sum(p.nbytes for p in model.parameters())
    batch = torch.randn(2, 256)
    train(model, batch)
    model.zero_grad()
    with StorageMeter() as meter:
        train(model, batch)
        held = meter.now_nbytes
        model.zero_grad()
    assert held - meter.start_nbytes == nbytes
    assert 0 <= meter.peak_nbytes - meter.start_nbytes - nbytes < 0.1 * nbytes
    assert meter.now_nbytes == meter.start_nbytes
    assert meter.allocated_nbytes == meter.freed_nbytes


def profiled_allocations(step: object, *arguments: object) -> list[int]:
    """Every allocation (> 0) and release (< 0) that the CPU allocator itself reports."""
    gc.collect()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step(*arguments)  # type: ignore[operator]
    events = profile.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def pointwise(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y = y.relu() + x.sigmoid()
    y.add_(1.0)
    return torch.cat([y, y[:10]]).sum()


def test_meter_agrees_with_the_allocator() -> None:
    """On operators without scratch memory both counts are the same, allocation by allocation."""
    x = torch.randn(100_000)
    pointwise(x)
    reported = profiled_allocations(pointwise, x)
    with StorageMeter() as meter:
        pointwise(x)
    large = [nbytes for nbytes in reported if abs(nbytes) > 64]  # a Python number becomes a tensor inside the kernel
    assert meter.allocated_nbytes - sum(nbytes for nbytes in large if nbytes > 0) == 4  # the sum that is returned
    running = peak = 0
    for nbytes in large:
        running += nbytes
        peak = max(peak, running)
    assert meter.peak_nbytes - meter.start_nbytes == pytest.approx(peak, abs=64)


def test_meter_changes_no_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    batch = torch.randn(4, 8)
    train(model, batch)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with StorageMeter():
        train(model, batch)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True) if p.grad is not None)


def test_resizing_is_torchs_own_again_after_the_block() -> None:
    original = torch.UntypedStorage.resize_
    with pytest.raises(ZeroDivisionError), StorageMeter():
        raise ZeroDivisionError
    assert torch.UntypedStorage.resize_ is original
