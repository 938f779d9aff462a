"""The observers that say where time and memory go."""

from __future__ import annotations

import re

import pytest
import torch
from zs_comm import Observers, breakdown
from zs_comm.breakdown import MemoryBreakdown, TimeBreakdown


class Clock:
    """Stands in for the `time` module: a second passes where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(breakdown, "time", made)
    return made


def test_times_add_up_by_phase(clock: Clock) -> None:
    observers, times = Observers(), TimeBreakdown()
    observers.add(times)
    for _ in range(2):
        with observers.span("forward"):
            clock.now += 1.0
            with observers.span("gather", "blocks.0"):
                clock.now += 0.25
    with observers.span("step"):
        clock.now += 0.5
    assert times.seconds == {"forward": 2.5, "step": 0.5}
    assert times.inner == {"gather": 0.5}
    assert times.milliseconds() == {"forward": 2500.0, "gather": 500.0, "step": 500.0}
    assert times.line() == "time (ms) | forward 2500.00 | step 500.00 | in these: gather 500.00"
    times.reset()
    assert (times.seconds, times.inner, times.line()) == ({}, {}, "time (ms)")


def test_a_span_that_began_before_it_is_left_out(clock: Clock) -> None:
    observers, times = Observers(), TimeBreakdown()
    observers.add(waker := _Nothing())
    with observers.span("forward"):
        observers.add(times)
    observers.remove(waker)
    assert times.seconds == {}


class _Nothing:
    def span_begin(self, name: str, label: str) -> None:
        pass


def test_observers_nest_as_context_managers_do(clock: Clock) -> None:
    class Slow(_Nothing):
        def span_begin(self, name: str, label: str) -> None:
            clock.now += 100.0

        def span_end(self, name: str, label: str, seconds: float) -> None:
            clock.now += 100.0

    observers, times = Observers(), TimeBreakdown()
    observers.add(Slow())
    observers.add(times)
    with observers.span("forward"):
        clock.now += 1.0
    assert times.seconds == {"forward": 1.0}


def test_memory_before_and_after() -> None:
    lines: list[str] = []
    observers = Observers()
    observers.add(MemoryBreakdown(lines.append, ("forward",)))
    kept = []
    with observers.span("forward"):
        kept.append(torch.zeros(3 << 20))  # 12 MiB
    with observers.span("other"):
        pass
    assert [line.split(" | ")[0] for line in lines] == ["memory before forward", "memory after forward"]
    tensors = [float(re.search(r"tensors ([\d,.]+) MiB", line)[1].replace(",", "")) for line in lines]  # type: ignore[index]
    assert tensors[1] - tensors[0] == pytest.approx(12.0, abs=0.11)
    assert "host resident" in lines[0] and "peak" in lines[0]


def test_who_wants_what() -> None:
    observers = Observers()
    assert not observers.wants("scalar")
    observers.add(TimeBreakdown())
    assert observers.wants("span_end") and not observers.wants("scalar")
