"""Watching what a run does: spans, collectives and scalars, given to whoever asks.

Nothing is installed by default, and then a span costs one comparison. While a profiler is on, every span is also a
``record_function`` label (``torch.autograd.profiler.emit_nvtx`` turns those into NVTX ranges).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, cast

import torch
from torch.autograd import profiler

logger = logging.getLogger(__name__)

_METHODS = ("span_begin", "span_end", "collective", "scalar")
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class Observer(Protocol):
    """What an observer may implement; every method is optional, so any object with one of them is an observer."""

    def span_begin(self, name: str, label: str) -> None:
        """A phase begins: ``name`` ("forward", "all_gather") of ``label`` (a module or unit, or "")."""

    def span_end(self, name: str, label: str, seconds: float) -> None:
        """The innermost phase of that name and label ended after ``seconds``."""

    def collective(self, op: str, axis: str, label: str, nbytes: int, wire_nbytes: int) -> None:
        """A collective over ``nbytes`` of payload was issued; this rank sends ``wire_nbytes`` for it."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """A number of interest at a step: loss, learning rate, norm."""


class Observers:
    """The observers of one world of groups. One that raises is logged once and removed: watching never breaks a run."""

    def __init__(self) -> None:
        self._observers: list[object] = []
        self._calls: dict[str, list[tuple[object, Callable[..., object]]]] = {name: [] for name in _METHODS}

    def __len__(self) -> int:
        return len(self._observers)

    @property
    def active(self) -> bool:
        """True while a span would be seen by anyone: an observer, or torch's profiler."""
        return bool(self._observers) or bool(cast(Any, profiler)._is_profiler_enabled)

    def wants(self, method: str) -> bool:
        """Whether any observer has `method`: what is dear to find out need not be found out for nobody."""
        return bool(self._calls[method])

    def add(self, observer: object) -> None:
        """Add ``observer`` (see :class:`Observer`); adding it twice is the same as once."""
        if any(known is observer for known in self._observers):
            return
        self._observers = [*self._observers, observer]
        self._index()

    def remove(self, observer: object) -> None:
        """Remove ``observer``; one that is not there is no error."""
        self._observers = [known for known in self._observers if known is not observer]
        self._index()

    def span(self, name: str, label: str = "") -> AbstractContextManager[object]:
        """A context manager around one phase: ``with observers.span("forward", "blocks.3"): ...``."""
        return _Span(self, name, label) if self.active else _NOTHING

    def collective(self, op: str, axis: str, label: str, nbytes: int, wire_nbytes: int) -> None:
        """Tell the observers of one collective of this rank."""
        if self._calls["collective"]:
            self._tell("collective", op, axis, label, nbytes, wire_nbytes)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Tell the observers of a number at a step."""
        if self._calls["scalar"]:
            self._tell("scalar", name, value, step)

    def _index(self) -> None:
        for name, calls in self._calls.items():
            calls[:] = [(obs, method) for obs in self._observers if callable(method := getattr(obs, name, None))]
        self._calls["span_end"].reverse()  # as context managers nest: what one does at an end is in no other's time

    def _tell(self, method: str, *args: object) -> None:
        for observer, call in tuple(self._calls[method]):
            try:
                call(*args)
            except Exception:
                logger.exception("observer %r failed in %s and is removed", observer, method)
                self.remove(observer)


class _Span:
    __slots__ = ("_label", "_name", "_observers", "_record", "_start")

    def __init__(self, observers: Observers, name: str, label: str) -> None:
        self._observers = observers
        self._name = name
        self._label = label
        self._record: Any = None
        self._start = 0.0

    def __enter__(self) -> None:
        text = f"{self._name} {self._label}" if self._label else self._name
        self._record = torch.profiler.record_function(text)
        self._record.__enter__()
        self._observers._tell("span_begin", self._name, self._label)
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        self._observers._tell("span_end", self._name, self._label, seconds)
        self._record.__exit__(kind, error, trace)


@dataclass
class CollectiveCount:
    """What one kind of collective amounted to on this rank."""

    count: int = 0
    nbytes: int = 0  # payload: the whole tensor, once
    wire_nbytes: int = 0  # bytes this rank sent to its peers


class CollectiveLog:
    """An observer that counts collectives by (op, axis): how many, how large, how many bytes this rank sent."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], CollectiveCount] = {}

    def collective(self, op: str, axis: str, label: str, nbytes: int, wire_nbytes: int) -> None:
        """Count one collective."""
        entry = self.counts.setdefault((op, axis), CollectiveCount())
        entry.count += 1
        entry.nbytes += nbytes
        entry.wire_nbytes += wire_nbytes

    @property
    def total_wire_nbytes(self) -> int:
        """Bytes this rank sent, over all collectives."""
        return sum(entry.wire_nbytes for entry in self.counts.values())

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.counts.clear()

    def table(self) -> str:
        """The counts as a text table, one line for each (op, axis)."""
        rows = [("op", "axis", "count", "payload bytes", "sent bytes")]
        rows += [
            (op, axis, f"{entry.count:,}", f"{entry.nbytes:,}", f"{entry.wire_nbytes:,}")
            for (op, axis), entry in sorted(self.counts.items())
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )
