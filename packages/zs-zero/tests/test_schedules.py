"""Schedules against closed forms, and against the values that DeepSpeed's parameters mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zs_comm import ConfigError
from zs_zero import schedules
from zs_zero.schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR


def adam(*lrs: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs or (0.1,)])


def rates(schedule: Any, steps: int) -> list[float]:
    """The first group's rate at each training step."""
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.step()
    return found


def test_warmup_log() -> None:
    found = rates(WarmupLR(adam(), 0.1, 1.1, warmup_num_steps=10), 30)
    # the first optimizer step runs with the starting value, the second with step number 0 of the schedule
    assert found[0] == 0.1
    for step, rate in enumerate(found[1:]):
        assert rate == pytest.approx(0.1 + min(1.0, math.log(step + 1) / math.log(10)), abs=1e-12)
    assert found[11] == pytest.approx(1.1)
    assert found[-1] == 1.1


def test_warmup_linear() -> None:
    found = rates(WarmupLR(adam(), 0.0, 1.0, warmup_num_steps=4, warmup_type="linear"), 8)
    assert found == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warmup_max_defaults_to_each_groups_rate() -> None:
    optimizer = adam(0.3, 0.7)
    schedule = WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear")
    rates(schedule, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.7]


def test_one_step_of_warmup_counts_as_two() -> None:
    assert rates(WarmupLR(adam(), 0.0, 1.0, warmup_num_steps=1, warmup_type="linear"), 4) == [0.0, 0.0, 0.5, 1.0]


def test_warmup_per_group() -> None:
    optimizer = adam(1.0, 1.0)
    schedule = WarmupLR(optimizer, [0.0, 0.1], [1.0, 2.1], warmup_num_steps=2, warmup_type="linear")
    schedule.step(1)
    assert schedule.get_last_lr() == pytest.approx([0.5, 1.1])
    with pytest.raises(ConfigError, match="warmup_min_lr: 3 values for 2 parameter groups"):
        WarmupLR(optimizer, [0.0, 0.1, 0.2])


def test_warmup_decay() -> None:
    found = rates(WarmupDecayLR(adam(), 10, 0.0, 1.0, warmup_num_steps=4, warmup_type="linear"), 13)
    assert found == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0])


def test_warmup_cosine() -> None:
    optimizer = adam(2.0, 4.0)
    found = rates(WarmupCosineLR(optimizer, 12, 0.1, 4, 0.05, warmup_type="linear"), 20)
    assert found[0] == 0.0
    assert found[1:5] == pytest.approx([2 * (0.1 + 0.9 * step / 4) for step in range(4)])
    for step in range(4, 12):
        ratio = 0.05 + 0.95 * (1 + math.cos(math.pi * (step - 3) / 8)) / 2
        assert found[1 + step] == pytest.approx(2 * ratio)
    assert found[13:] == pytest.approx([0.1] * 7)  # it stays at the end and does not swing up again
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.2)


def test_range_test() -> None:
    continuous = rates(LRRangeTest(adam(), 0.01, 5, 2.0), 12)
    assert continuous == pytest.approx([0.01 * (1 + 2 * step / 5) for step in range(12)])
    stairs = rates(LRRangeTest(adam(), 0.01, 5, 2.0, lr_range_test_staircase=True), 12)
    assert stairs == pytest.approx([0.01 * (1 + 2 * (step // 5)) for step in range(12)])


def test_one_cycle() -> None:
    optimizer = adam()
    schedule = OneCycle(optimizer, 0.1, 1.1, 0.5, 4, 2, decay_step_size=2, decay_mom_rate=0.1)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    rows = []
    for _ in range(9):
        rows.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        schedule.step()
    up_and_down = [0, 0.25, 0.5, 0.75, 1, 0.5, 0]
    decayed = [0.1 / (1 + 0.5 * step / 2) for step in (1, 2)]
    assert [lr for lr, _ in rows] == pytest.approx([0.1 + height for height in up_and_down] + decayed)
    betas = [0.9 - 0.1 * height for height in up_and_down] + [0.9 * (1 + 0.1 * step / 2) for step in (1, 2)]
    assert [beta for _, beta in rows[1:]] == pytest.approx(betas[1:])


def test_one_cycle_stairs_and_no_decay() -> None:
    found = rates(OneCycle(adam(), 0.0, 1.0, cycle_first_step_size=4, cycle_first_stair_count=2), 12)
    assert found == pytest.approx([0, 0, 0.5, 0.5, 1, 0.5, 0.5, 0, 0, 0, 0, 0])


def test_one_cycle_without_betas() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = OneCycle(optimizer, 0.1, 1.0)
    schedule.step()
    assert schedule.get_mom() is None
    assert "betas" not in optimizer.param_groups[0]


MAKE: dict[str, Callable[[Any, int], Any]] = {
    "WarmupLR": lambda optimizer, last: WarmupLR(optimizer, 0.0, 1.0, 7, last_batch_iteration=last),
    "WarmupDecayLR": lambda optimizer, last: WarmupDecayLR(optimizer, 20, 0.0, 1.0, 7, last_batch_iteration=last),
    "WarmupCosineLR": lambda optimizer, last: WarmupCosineLR(optimizer, 20, 0.1, 7, last_batch_iteration=last),
    "LRRangeTest": lambda optimizer, last: LRRangeTest(optimizer, 0.1, 3, last_batch_iteration=last),
    "OneCycle": lambda optimizer, last: OneCycle(
        optimizer, 0.1, 1.0, cycle_first_step_size=5, last_batch_iteration=last
    ),
}


@pytest.mark.parametrize("name", sorted(MAKE))
@given(done=st.integers(0, 30))
def test_state_goes_on_where_it_stopped(name: str, done: int) -> None:
    first, second = MAKE[name](adam(), -1), MAKE[name](adam(), -1)
    for _ in range(done):
        first.step()
    second.load_state_dict(first.state_dict())
    first.step()
    second.step()
    assert first.get_last_lr() == second.get_last_lr()


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_schedule_that_resumes_writes_nothing_before_its_first_step(name: str) -> None:
    optimizer = adam(0.123)
    MAKE[name](optimizer, 4)
    assert optimizer.param_groups[0]["lr"] == 0.123


def test_tensor_rates_stay_tensors() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=torch.tensor(0.5))
    schedule = WarmupLR(optimizer, 0.0, 1.0, 2, "linear")
    schedule.step(1)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.5))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"warmup_type": "cosine"}, "warmup_type: must be 'log' or 'linear'"),
        ({"warmup_num_steps": 0}, "warmup_num_steps: must be a whole number of at least 1"),
        ({"warmup_num_steps": 2.5}, "warmup_num_steps"),
    ],
)
def test_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        WarmupLR(adam(), **arguments)


def test_steps_of_no_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="lr_range_test_step_size"):
        LRRangeTest(adam(), lr_range_test_step_size=0)
    with pytest.raises(ConfigError, match="cycle_first_step_size"):
        OneCycle(adam(), 0.1, 1.0, cycle_first_step_size=0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: WarmupLR(adam(), warmup_max_lr=-1.0), "warmup_max_lr: must be a finite number of at least 0"),
        (lambda: WarmupLR(adam(), [0.0, float("nan")]), "warmup_min_lr"),
        (
            lambda: WarmupLR(adam(), last_batch_iteration=-2),
            "last_batch_iteration: must be a whole number of at least -1",
        ),
        (lambda: WarmupDecayLR(adam(), 0), "total_num_steps: must be a whole number of at least 1"),
        (lambda: WarmupCosineLR(adam(), 9, cos_min_ratio=float("inf")), "cos_min_ratio"),
        (lambda: OneCycle(adam(), 0.1, 1.0, cycle_second_step_size=-1), "cycle_second_step_size"),
        (lambda: OneCycle(adam(), 0.1, 1.0, cycle_max_mom=1.0), "cycle_max_mom: .* at least 0 and below 1"),
        (lambda: LRRangeTest(adam(), lr_range_test_step_rate=-1.0), "lr_range_test_step_rate"),
    ],
)
def test_values_out_of_range(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_the_first_step_shows_what_torch_does_not_check() -> None:
    torchs = torch.optim.lr_scheduler
    for good in (torchs.StepLR(adam(), 1), torchs.OneCycleLR(adam(), 0.1, total_steps=1), WarmupLR(adam())):
        schedules.first_step(good)
    wrong = {
        "StepLR: must be at least 1": torchs.StepLR(adam(), -1),
        "step.. fails": torchs.LambdaLR(adam(), lambda step: 1 / (1 - step)),
        "must be at least 0": torchs.ExponentialLR(adam(), -1.0),
        "a learning rate becomes -0.1": torchs.LambdaLR(adam(), lambda step: 1 - 2 * step),
    }
    for text, schedule in wrong.items():
        with pytest.raises(ConfigError, match=text):
            schedules.first_step(schedule)


def test_all_five_are_named() -> None:
    assert set(schedules.__all__) == set(MAKE)
