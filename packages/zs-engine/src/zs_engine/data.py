"""Data loading for data-parallel ranks; usable alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from zs_ckpt.loader import DataLoader

__all__ = ["DataLoader", "RepeatingLoader"]


class RepeatingLoader:
    """Batches without end: starts `loader` again whenever it is through. An empty loader ends at once."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        found = True
        while found:
            found = False
            for batch in self.loader:
                found = True
                yield batch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)
