"""Data loading for data-parallel ranks; usable alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils import data
from torch.utils.data.distributed import DistributedSampler


class DataLoader(data.DataLoader[Any]):
    """torch's loader over this rank's share of `dataset`; every pass is a new epoch, shuffled anew.

    `rank` of `world` is this rank's place among the data-parallel ones. An `IterableDataset` shares itself out. A
    `sampler` replaces the `DistributedSampler`; `set_epoch` is called on one that has it. `drop_last` drops the smaller
    last batch, and samples that do not divide among the ranks (else some come twice). `options` are torch's.
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, rank: int = 0, world: int = 1, shuffle: bool = True, seed: int = 0,
        sampler: Iterable[int] | None = None, drop_last: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        if sampler is None and not isinstance(dataset, data.IterableDataset):
            sampler = DistributedSampler(dataset, world, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=drop_last, **options)
        self.epoch = 0  # of the next pass

    def __iter__(self) -> Any:
        if set_epoch := getattr(self.sampler, "set_epoch", None):
            set_epoch(self.epoch)
        self.epoch += 1
        return super().__iter__()


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
