"""A data loader whose place in the data is part of a checkpoint, also within a pass and for another number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import data
from torch.utils.data.distributed import DistributedSampler
from zs_comm import ConfigError

from .rng import kept


class DataLoader(data.DataLoader[Any]):
    """torch's loader over this rank's share of `dataset`; every pass is a new epoch, shuffled anew.

    `rank` of `world` is this rank's place among the data-parallel ones. An `IterableDataset` shares itself out. A
    `sampler` replaces the `DistributedSampler`; `set_epoch` is called on one that has it. `drop_last` drops the smaller
    last batch, and samples that do not divide among the ranks (else some come twice). `options` are torch's.

    `state_dict()` is the place in the data, also within a pass; the pass after `load_state_dict` goes on from there
    without reading what came before, if the sampler is the loader's own (else those batches are drawn and dropped).
    """

    any_world = True  # whether its state is of use to another number of ranks

    def __init__(
        self, dataset: Any, batch_size: int, *, rank: int = 0, world: int = 1, shuffle: bool = True, seed: int = 0,
        sampler: Iterable[int] | None = None, drop_last: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        if sampler is None and not isinstance(dataset, data.IterableDataset):
            sampler = _Share(dataset, world, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=drop_last, **options)
        self.epoch = 0  # of the next pass
        self._world = world
        self._pass: _Pass | None = None  # under way
        self._next: dict[str, Any] | None = None  # the state that the next pass begins with

    def __iter__(self) -> Any:
        if set_epoch := getattr(self.sampler, "set_epoch", None):
            set_epoch(self.epoch)
        self.epoch += 1
        state, self._next = self._next, None
        stream = self.generator or torch.default_generator
        if state is None:
            began = stream.get_state()  # seeds of workers and of some samplers are drawn from it now
            self._pass = _Pass(super().__iter__(), 0, began)
            return self._pass
        with kept():
            if state["stream"] is not None:
                stream.set_state(state["stream"])
            began = stream.get_state()
            if isinstance(self.sampler, _Share):
                self.sampler.start = state["batches"] * (self.batch_size or 1)
            batches = super().__iter__()
            for _ in range(0 if isinstance(self.sampler, _Share) else state["batches"]):
                next(batches, None)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        self._pass = _Pass(batches, state["batches"], began)
        return self._pass

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches drawn in it, of what size and by how many ranks, and the random state of its beginning."""
        if self._next is not None:
            return {**self._next, "epoch": self.epoch}
        on = self._pass if self._pass is not None and self._pass.under_way else None
        state = {"epoch": self.epoch - 1, "batches": on.drawn} if on else {"epoch": self.epoch, "batches": 0}
        own = None if self.generator is None else self.generator.get_state()
        sizes = {"batch_size": self.batch_size, "world": self._world}
        return state | sizes | {"stream": on.began if on else None, "generator": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a `state_dict()`, also of another number of ranks. Raises ConfigError where batches do not match."""
        state = dict(state_dict)
        if (state["batch_size"], state["world"]) != (self.batch_size, self._world) and state["batches"]:
            samples = state["batches"] * state["batch_size"] * state["world"]
            each = (self.batch_size or 1) * self._world
            if samples % each or not isinstance(self.sampler, _Share):
                raise ConfigError(
                    f"{samples} samples of epoch {state['epoch']} are drawn, which {self._world} ranks in batches of "
                    f"{self.batch_size} cannot go on from: save at a multiple of {each}, or at the end of an epoch"
                )
            state |= {"batches": samples // each, "stream": None, "generator": None}
        if state["batches"] and isinstance(self.sampler, _Share) and state["batches"] >= len(self):
            # a pass of no batches would look like an empty loader
            state |= {"epoch": state["epoch"] + 1, "batches": 0, "stream": None}
        self.epoch, self._pass = state["epoch"], None
        self._next = state if state["batches"] or state["stream"] is not None else None  # under way
        if self._next is None and self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])


class _Share(DistributedSampler[Any]):
    """A rank's share; `start`: samples to leave out of the next pass."""

    start = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        return itertools.islice(super().__iter__(), start, None)


class _Pass:
    """The batches of a pass, counted. `began`: the random state before its first draw."""

    def __init__(self, batches: Iterator[Any], drawn: int, began: torch.Tensor) -> None:
        self._batches, self.drawn, self.began, self.under_way = batches, drawn, began, True

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            self.under_way = False
            raise
        self.drawn += 1
        return batch
