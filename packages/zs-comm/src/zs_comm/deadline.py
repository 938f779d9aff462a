"""How long one wait may still take."""

from __future__ import annotations

import time
from datetime import timedelta

_LEAST_S = 0.001  # gloo takes zero for "no bound"


class Deadline:
    """The bound of one wait, from now on."""

    __slots__ = ("_end", "_start")

    def __init__(self, timeout_s: float) -> None:
        self._start = time.monotonic()
        self._end = self._start + timeout_s

    def remaining(self) -> timedelta:
        """What is left of it, and never nothing."""
        return timedelta(seconds=max(self._end - time.monotonic(), _LEAST_S))

    def elapsed_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._start
