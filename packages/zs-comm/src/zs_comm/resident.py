"""How much memory of this process is resident: now, at the most, and how far what it allocated has grown.

Linux only: elsewhere there is nothing to read (`resident` is None).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Resident:
    """Bytes at one moment."""

    nbytes: int
    peak_nbytes: int  # most since the process started, or since `reset_peak`
    mapped_nbytes: int  # of `nbytes`: pages of files, a library's code above all; page cache, which gives way

    def growth_since(self, base: Resident) -> int:
        """At the most, of what is not mapped from files; `reset_peak` was called at `base`.

        How many pages of a library are mapped when one of them is touched depends on the page cache: tens of MB more or
        less. Their peak is taken to be what is mapped now.
        """
        return max(0, self.peak_nbytes - self.mapped_nbytes - (base.nbytes - base.mapped_nbytes))


def resident() -> Resident | None:
    """Of this process; None where the platform does not tell."""
    try:
        lines = dict(line.partition(":")[::2] for line in (_PROC / "status").read_text("ascii").splitlines())
        now, peak, mapped = (int(lines[key].split()[0]) << 10 for key in ("VmRSS", "VmHWM", "RssFile"))
    except (OSError, ValueError, KeyError):
        return None
    return Resident(now, peak, mapped)


def reset_peak() -> None:
    """Makes the peak what is resident now, where the platform can: some containers forbid it."""
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5", "ascii")
