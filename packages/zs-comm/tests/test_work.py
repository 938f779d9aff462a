"""The handle of a collective in flight: callbacks, buffers, waiting twice."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from zs_comm import CommTimeout, Group, Work, all_gather, all_reduce, reduce_scatter
from zs_comm.testing import run_ranks


def callbacks(group: Group) -> list[Any]:
    seen: list[Any] = []
    work = all_reduce(torch.ones(3), group, op="sum", async_op=True)
    assert isinstance(work, Work)
    work.on_complete(lambda result: seen.append(None if result is None else result.tolist()))
    work.on_error(seen.append)
    assert not seen
    first = work.wait()
    assert work.wait() is first
    assert work.done
    work.on_complete(lambda result: seen.append("late"))
    return seen


def test_callbacks_run_once_when_it_is_waited_for() -> None:
    assert run_ranks(callbacks, 2) == [[[2.0, 2.0, 2.0], "late"]] * 2


def failing(group: Group) -> list[str]:
    seen: list[str] = []
    if group.rank == 0:
        work = all_reduce(torch.ones(3), group, async_op=True)
        work.on_complete(lambda _: seen.append("complete"))
        work.on_error(lambda error: seen.append(type(error).__name__))
        for _ in range(2):
            with pytest.raises(CommTimeout):
                work.wait(timeout_s=0.2)
        work.on_error(lambda error: seen.append("late"))
        assert not group.in_flight
    return seen


def test_the_error_handler_runs_on_failure_and_the_error_stays() -> None:
    assert run_ranks(failing, 2)[0] == ["CommTimeout", "late"]


def buffers(group: Group) -> list[bool]:
    flat = torch.ones(1000 * group.size)
    work = reduce_scatter(flat, group, async_op=True)
    alive = weakref.ref(flat)
    del flat
    before = alive() is not None
    work.wait()
    gc.collect()
    return [before, alive() is None]


@pytest.mark.parametrize("world", [2, 4])
def test_the_input_lives_until_completion_and_no_longer(world: int) -> None:
    assert run_ranks(buffers, world) == [[True, True]] * world


def dropped(group: Group) -> list[float]:
    flat = torch.full((group.size,), float(group.rank))
    all_gather(flat, group, async_op=True)  # nobody keeps the Work
    gc.collect()
    assert len(group.in_flight) == 1
    group.drain()
    assert not group.in_flight
    return flat.tolist()


def test_a_work_that_nobody_holds_is_kept_by_its_group() -> None:
    assert run_ranks(dropped, 2) == [[0.0, 1.0]] * 2
