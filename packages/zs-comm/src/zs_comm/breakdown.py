"""Observers that say where time and memory go: seconds by phase, and bytes before and after each.

observers.add(times := TimeBreakdown())
...                                      # forward, backward and step run in observers.span("forward") and so on
print(times.line()); times.reset()       # time (ms) | forward 12.31 | backward 20.44 | step 3.02 | in these: ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container

import torch

from .memory import memory_summary


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class TimeBreakdown:
    """Adds up the time of spans by name, a device's work included: it is waited for at each end of a span.

    Attributes:
        seconds: of the outer spans, since the last `reset`.
        inner: of the spans inside of others (a gather in a forward); part of the outer ones' time.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner: dict[str, float] = {}
        self._open: list[float] = []

    def span_begin(self, name: str, label: str) -> None:
        """A span begins."""
        _synchronize()
        self._open.append(time.perf_counter())

    def span_end(self, name: str, label: str, seconds: float) -> None:
        """The innermost span ends."""
        if not self._open:
            return  # it began before this observer was there
        _synchronize()
        took = time.perf_counter() - self._open.pop()
        totals = self.inner if self._open else self.seconds
        totals[name] = totals.get(name, 0.0) + took

    def reset(self) -> None:
        """Start again from zero."""
        self.seconds, self.inner = {}, {}
        self._open.clear()

    def milliseconds(self) -> dict[str, float]:
        """By name, outer and inner."""
        return {name: 1e3 * took for name, took in (self.inner | self.seconds).items()}

    def line(self) -> str:
        """One line for people."""
        parts = ["time (ms)", *(f"{name} {1e3 * took:.2f}" for name, took in self.seconds.items())]
        inner = ", ".join(f"{name} {1e3 * took:.2f}" for name, took in self.inner.items())
        return " | ".join(parts) + (f" | in these: {inner}" if inner else "")


class MemoryBreakdown:
    """Says how much memory is in use before and after each span of certain names; slow (it looks at every tensor).

    Args:
        say: takes each line.
        names: the spans.
    """

    def __init__(self, say: Callable[[str], object], names: Container[str]) -> None:
        self._say, self._names = say, names

    def span_begin(self, name: str, label: str) -> None:
        """A span begins."""
        if name in self._names:
            self._say(memory_line(f"before {name}"))

    def span_end(self, name: str, label: str, seconds: float) -> None:
        """A span ends."""
        if name in self._names:
            self._say(memory_line(f"after {name}"))


def memory_line(moment: str) -> str:
    """Host and device memory of this process in one line; on a device the peak is that since the last line."""
    now = memory_summary()
    figures = {"host resident": now.rss_nbytes, "peak": now.peak_rss_nbytes, "tensors": now.live_nbytes}
    if now.device is not None:
        figures |= {"device allocated": now.device_allocated_nbytes, "device peak": now.device_peak_nbytes}
        figures |= {"device reserved": now.device_reserved_nbytes}
        torch.cuda.reset_peak_memory_stats()
    shown = [f"{name} {'?' if nbytes is None else f'{nbytes / 2**20:,.1f} MiB'}" for name, nbytes in figures.items()]
    return f"memory {moment} | " + " | ".join(shown)
