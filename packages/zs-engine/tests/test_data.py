"""The loader's shares and epochs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler
from zs_engine.data import DataLoader, RepeatingLoader


def passes(loader: DataLoader, count: int) -> list[list[int]]:
    return [[int(item) for batch in loader for item in batch] for _ in range(count)]


def test_every_pass_is_a_new_epoch_and_ranks_share_it() -> None:
    first, second = (passes(DataLoader(range(16), 4, rank=rank, world=2), 3) for rank in (0, 1))
    assert first[0] != first[1] != first[2]
    for mine, theirs in zip(first, second, strict=True):
        assert sorted(mine + theirs) == list(range(16))


def test_the_epoch_can_be_set() -> None:
    loader = DataLoader(range(16), 4)
    whole = passes(loader, 3)
    loader.epoch = 1
    assert passes(loader, 2) == whole[1:]


def test_a_pass_that_is_left_counts() -> None:
    loader, other = DataLoader(range(16), 4), DataLoader(range(16), 4)
    next(iter(loader))
    assert passes(loader, 1) == passes(other, 2)[1:]


def test_order_is_kept_without_shuffle() -> None:
    assert passes(DataLoader(range(8), 3, shuffle=False), 2) == [list(range(8))] * 2


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 1]), (True, [4, 4])])
def test_drop_last(drop_last: bool, sizes: list[int]) -> None:
    loader = DataLoader(range(18), 4, world=2, drop_last=drop_last)
    assert [len(batch) for batch in loader] == sizes
    assert len(loader) == len(sizes)


def test_own_sampler_and_collate() -> None:
    data = range(4)
    loader = DataLoader(data, 2, world=2, sampler=SequentialSampler(data), collate_fn=lambda items: sum(items))
    assert list(loader) == [1, 5]


class Countdown(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from (3, 2, 1)


def test_iterable_dataset() -> None:
    assert passes(DataLoader(Countdown(), 2, rank=1, world=2), 1) == [[3, 2, 1]]


def test_repeating_loader_starts_a_new_epoch_each_time() -> None:
    loader = DataLoader(torch.arange(6), 3)
    expected = passes(DataLoader(torch.arange(6), 3), 2)
    repeating = RepeatingLoader(loader)
    found = [int(item) for _ in range(4) for item in next(repeating)]
    assert found == expected[0] + expected[1]
    assert loader.epoch == 2


def test_repeating_nothing_ends() -> None:
    with pytest.raises(StopIteration):
        next(RepeatingLoader([]))
