"""What the tiers of a sharded model planned, moved and waited for."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files import TierFiles


_M_MMAP_THRESHOLD = -3  # of mallopt


@dataclass(frozen=True, kw_only=True)
class OffloadReport:
    """Bytes by kind ("parameters", "gradients", "optimizer") and seconds of the last step, from the end of the one
    before to its own; and the plan they are to be held against."""

    store: str  # "aio", "file", or "memory" where nothing is in files
    planned: Mapping[str, int]  # bytes of host memory by purpose, above the size when the model was sharded
    limit: int | None  # bytes
    peak_nbytes: int | None  # most that was resident above that size, without what is mapped from files; None: unknown
    resident: float  # share of the trained elements whose masters and states stay in memory
    steps: int = 0
    read: Mapping[str, int] = field(default_factory=dict)
    written: Mapping[str, int] = field(default_factory=dict)
    expected_read: Mapping[str, int] = field(default_factory=dict)
    expected_written: Mapping[str, int] = field(default_factory=dict)
    stall_s: float = 0.0  # waiting for files
    io_s: float = 0.0  # with transfers in flight
    step_s: float = 0.0  # of `optimizer.step()`
    wall_s: float = 0.0  # from the end of the step before

    @property
    def planned_nbytes(self) -> int:
        return sum(self.planned.values())

    @property
    def overlap(self) -> float:
        """How much of the shorter of the two, transfers and everything else, was hidden behind the longer: 0 to 1.

        (io + rest - wall) / min(io, rest), where the rest is the time in which nobody waited for files.
        """
        rest = self.wall_s - self.stall_s
        shorter = min(self.io_s, rest)
        return 1.0 if shorter <= 0 else min(1.0, max(0.0, (self.io_s + rest - self.wall_s) / shorter))

    def scalars(self) -> dict[str, float]:
        """What an observer is told after every step."""
        moved = {f"offload/{kind}_read_nbytes": float(nbytes) for kind, nbytes in self.read.items()}
        moved |= {f"offload/{kind}_written_nbytes": float(nbytes) for kind, nbytes in self.written.items()}
        return moved | {"offload/stall_s": self.stall_s, "offload/overlap": self.overlap}

    def __str__(self) -> str:
        lines = [
            f"{'':14}{'read':>12}{'planned':>12}{'written':>12}{'planned':>12}   MiB in step {self.steps}, {self.store}"
        ]
        for kind in dict.fromkeys([*self.read, *self.written]):
            figures = [self.read, self.expected_read, self.written, self.expected_written]
            lines.append(f"{kind:14}" + "".join(f"{one.get(kind, 0) / 2**20:12,.1f}" for one in figures))
        lines.append(
            f"step {self.step_s:.3f} s of {self.wall_s:.3f} s; transfers {self.io_s:.3f} s, "
            f"waited for {self.stall_s:.3f} s, overlap {self.overlap:.2f}"
        )
        memory = ", ".join(f"{name} {nbytes / 2**20:,.1f}" for name, nbytes in self.planned.items())
        lines.append(f"memory, MiB: {memory} = {self.planned_nbytes / 2**20:,.1f} planned")
        if self.peak_nbytes is not None:
            limit = "" if self.limit is None else f" of {self.limit / 2**20:,.1f} allowed"
            lines.append(f"             {self.peak_nbytes / 2**20:,.1f} at most{limit}")
        lines.append(f"resident: {self.resident:.1%} of masters and states")
        return "\n".join(lines)


class Traffic:
    """Counters of the last step: what moved since the end of the one before."""

    def __init__(self) -> None:
        self.steps = 0
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.expected_read: dict[str, int] = {}
        self.expected_written: dict[str, int] = {}
        self.stall_s = self.io_s = self.step_s = self.wall_s = 0.0
        self._since = time.perf_counter()
        self._before: dict[str, tuple[int, int, float, float]] = {}
        self._coming_read: dict[str, int] = {}
        self._coming_written: dict[str, int] = {}

    def expect(self, kind: str, *, read: int = 0, written: int = 0) -> None:
        """What the plan says of the step that is under way."""
        self._coming_read[kind] = self._coming_read.get(kind, 0) + read
        self._coming_written[kind] = self._coming_written.get(kind, 0) + written

    def forget(self, files: Mapping[str, TierFiles]) -> None:
        """What moved so far belongs to no step."""
        self._before = {kind: _counters(one) for kind, one in files.items()}
        self._coming_read, self._coming_written = {}, {}
        self._since = time.perf_counter()

    def end(self, files: Mapping[str, TierFiles], step_s: float) -> None:
        """A step was committed."""
        now = {kind: _counters(one) for kind, one in files.items()}
        before = {kind: self._before.get(kind, (0, 0, 0.0, 0.0)) for kind in now}
        self.read = {kind: now[kind][0] - before[kind][0] for kind in now}
        self.written = {kind: now[kind][1] - before[kind][1] for kind in now}
        self.stall_s = sum(now[kind][2] - before[kind][2] for kind in now)
        self.io_s = sum(now[kind][3] - before[kind][3] for kind in now)
        self.step_s = step_s
        self.wall_s, self._since = time.perf_counter() - self._since, time.perf_counter()
        self.steps += 1
        self.expected_read, self._coming_read = self._coming_read, {}
        self.expected_written, self._coming_written = self._coming_written, {}
        self._before = now


def _counters(files: TierFiles) -> tuple[int, int, float, float]:
    return files.nbytes_read, files.nbytes_written, files.stall_s, files.io_s


def bound_heap() -> None:
    """Keeps glibc from holding on to freed memory: large blocks come from and go back to the system, one by one.

    Its threshold for that grows with what is freed, up to 32 MiB, and what is below stays in a heap with holes. Nothing
    happens where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)
