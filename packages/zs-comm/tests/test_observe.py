"""Observers, spans and the collective log; and the log against the theory and the kernel's own count."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile
from zs_comm import (
    CollectiveLog,
    Group,
    Observers,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    exchange,
    reduce_scatter,
    scatter,
)
from zs_comm.testing import loopback_nbytes, run_ranks, socket_nbytes


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def span_begin(self, name: str, label: str) -> None:
        self.seen.append(("begin", name, label))

    def span_end(self, name: str, label: str, seconds: float) -> None:
        self.seen.append(("end", name, label))

    def scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))


def test_spans_and_scalars_reach_observers() -> None:
    observers, recorder = Observers(), Recorder()
    assert not observers.active
    observers.add(recorder)
    observers.add(recorder)
    with observers.span("forward", "blocks.0"), observers.span("gather"):
        observers.scalar("loss", 1.5, 3)
    observers.collective("barrier", "dp", "", 0, 1)  # the recorder has no such method
    assert recorder.seen == [
        ("begin", "forward", "blocks.0"),
        ("begin", "gather", ""),
        ("loss", 1.5, 3),
        ("end", "gather", ""),
        ("end", "forward", "blocks.0"),
    ]
    observers.remove(recorder)
    observers.remove(recorder)
    assert not observers.active


class Broken:
    def scalar(self, name: str, value: float, step: int) -> None:
        raise ZeroDivisionError


def test_a_failing_observer_is_logged_once_and_removed(caplog: pytest.LogCaptureFixture) -> None:
    observers, recorder = Observers(), Recorder()
    observers.add(Broken())
    observers.add(recorder)
    with caplog.at_level(logging.ERROR):
        observers.scalar("loss", 1.0, 0)
        observers.scalar("loss", 2.0, 1)
    assert len(caplog.records) == 1
    assert len(recorder.seen) == 2
    assert len(observers) == 1


def test_spans_are_profiler_labels() -> None:
    observers = Observers()
    with profile(use_kineto=False) as prof, observers.span("forward", "blocks.0"):
        torch.ones(2).add(1)
    assert "forward blocks.0" in {event.name for event in prof.function_events}


def spanned(group: Group) -> list[tuple[Any, ...]]:
    recorder = Recorder()
    group.observers.add(recorder)
    work = all_gather(torch.ones(2), group, label="unit", async_op=True)
    assert not recorder.seen
    work.wait()
    work.wait()
    return recorder.seen


def test_a_collective_is_a_span() -> None:
    assert run_ranks(spanned, 2) == [[("begin", "all_gather", "unit"), ("end", "all_gather", "unit")]] * 2


def counted(group: Group, numel: int, itemsize: int) -> dict[str, tuple[int, int, int]]:
    """Bytes by op: sent by the log, sent by this rank's sockets, carried by the loopback device for all ranks."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[itemsize]
    flat = torch.zeros(numel, dtype=dtype)
    log = CollectiveLog()
    group.observers.add(log)
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: all_gather(flat, group),
        "reduce_scatter": lambda: reduce_scatter(flat, group),
        "all_reduce": lambda: all_reduce(flat, group),
        "broadcast": lambda: broadcast(flat, group),
        "scatter": lambda: scatter(flat if group.rank == 0 else None, flat[: numel // group.size].clone(), group),
    }
    counts = {}
    for name, call in calls.items():
        barrier(group)
        device, sockets = loopback_nbytes(), socket_nbytes()
        barrier(group)  # nobody begins before everybody has read the counters
        call()
        barrier(group)
        counts[name] = (log.counts[name, "world"].wire_nbytes, socket_nbytes() - sockets, loopback_nbytes() - device)
    assert log.counts["all_gather", "world"].nbytes == numel * itemsize
    assert f"{log.counts['all_reduce', 'world'].wire_nbytes:,}" in log.table()
    assert log.total_wire_nbytes >= sum(sent for sent, _, _ in counts.values())
    log.reset()
    assert not log.counts
    return counts


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the kernel's counters are Linux's")
@pytest.mark.parametrize(("world", "itemsize"), [(2, 4), (3, 4), (4, 2)])
def test_bytes_on_the_wire_are_the_theory(world: int, itemsize: int) -> None:
    numel = world * 1_000_000
    whole, part = numel * itemsize, numel * itemsize // world
    ranks = run_ranks(counted, world, numel, itemsize)
    for rank, counts in enumerate(ranks):
        theory = {
            "all_gather": (world - 1) * part,
            "reduce_scatter": (world - 1) * part,
            "all_reduce": 2 * (world - 1) * part,
            "broadcast": whole * (world - 1) if rank == 0 else 0,
            "scatter": part * (world - 1) if rank == 0 else 0,
        }
        for op, nbytes in theory.items():
            sent, by_sockets, _ = counts[op]
            assert nbytes <= sent <= nbytes + 64, op  # slices of a bucket are rounded up to whole elements
            assert sent <= by_sockets <= sent * 1.01 + 10_000, op
    for op in ranks[0]:
        total = sum(counts[op][0] for counts in ranks)
        assert min(counts[op][2] for counts in ranks) >= total * 0.97, op  # what others send is in it: no upper bound


def odd_sizes(group: Group) -> list[int]:
    log = CollectiveLog()
    group.observers.add(log)
    all_reduce(torch.zeros(100_001), group)
    all_reduce(torch.zeros(10), group)
    exchange(b"x" * 300, group)
    group.checked = True
    barrier(group)
    return [log.counts[op, "world"].wire_nbytes for op in ("all_reduce", "exchange", "barrier")]


def test_the_log_counts_what_is_sent_in_odd_cases() -> None:
    first, _, last = run_ranks(odd_sizes, 3)
    assert first == [4 * (66_667 + 2 * 33_334 + 2 * 10), 2 * (256 + 52), 2 * (1 + 64)]
    assert last[0] == 4 * (66_668 + 2 * 33_333 + 2 * 10)
