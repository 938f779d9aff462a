"""Updates that begin while a backward runs, on trial: they really begin, and nothing they assumed shows in the numbers.

Stores move at once here, so what an early trial does is the same in every run.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero
from torch import Tensor, nn
from zs_zero.testing import Fault

sys.path.insert(0, str(Path(__file__).parent))

from tier_fault_runs import differing
from tier_records import AWAY, BLOCK, NUMEL, STATES, WIDTH, Training, layers, writes

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EARLY: Mapping[str, Any] = {**STATES, "zs_early_update": True}
WRITES = NUMEL // BLOCK  # of one region of every block

LAYOUTS: dict[str, dict[str, Any]] = {
    "states": {"offload_optimizer": EARLY, "stage": 2},
    "half of the states": {"offload_optimizer": {**EARLY, "ratio": 0.5}, "stage": 1},
    "gradients": {"offload_optimizer": {**EARLY, "zs_gradients": "nvme"}},
    "everything": {"offload_optimizer": {**EARLY, "zs_gradients": "nvme"}, "offload_param": AWAY},
    "parameters": {"offload_optimizer": EARLY, "offload_param": AWAY},
    "parameters, states in memory": {
        "offload_optimizer": {"device": "cpu", "zs_block_numel": BLOCK, "zs_early_update": True}, "offload_param": AWAY,
    },
}  # fmt: skip


# -- they begin --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["states", "everything", "parameters"])
def test_updates_are_written_before_the_step_is_called(name: str, tmp_path: Path) -> None:
    training = Training(tmp_path, dtype=B16, **LAYOUTS[name])
    for step in range(3):
        calls = training.recorded(lambda seed=step: training.steps(1, start=seed))  # type: ignore[misc]
        assert len(writes(calls, "optimizer", "backward")) == 3 * WRITES
        assert len(writes(calls, "optimizer")) == 3 * WRITES, "none is repeated"
        order = [call.block for call in writes(calls, "optimizer")]
        assert order[0][0] == 3 and order[-1][0] == 0, "as gradients arrive"
    training.close()


def test_they_do_not_where_nobody_asked(tmp_path: Path) -> None:
    training = Training(tmp_path, offload_optimizer=STATES)
    calls = training.recorded(lambda: training.steps(2))
    assert {call.phase for call in calls if call.kind == "optimizer"} == {"step"}
    training.close()


def test_they_begin_with_the_last_backward_of_a_window(tmp_path: Path) -> None:
    """The first window cannot know; those after it do, until one is longer."""
    training = Training(tmp_path, **LAYOUTS["states"])
    seed, written = 0, []
    for backwards in (2, 2, 2, 3, 3, 1, 1):
        found = []
        for _ in range(backwards):
            seed += 1
            found.append(len(writes(training.recorded(lambda at=seed: training.backward(at)), "optimizer")))  # type: ignore[misc]
        found.append(len(writes(training.recorded(training.update), "optimizer")))
        written.append(found)
    each = 2 * WRITES
    assert written[0][0] > 0 and written[0][-1] == each, "begun too soon, discarded, and done in the step"
    assert written[1] == written[2] == [0, each, 0]
    assert written[3][0] == 0 and written[3][1] == each and written[3][-1] == each
    assert written[4] == [0, 0, each, 0]
    assert written[5] == [0, each], "it waits for what does not come"
    assert written[6] == [each, 0]
    training.close()


# -- and are as if they had not ----------------------------------------------------------------------------------------
def two_backwards(training: Training, seed: int) -> None:
    training.backward(seed)
    training.backward(seed + 100)
    training.update()


def uneven_windows(training: Training, seed: int) -> None:
    for micro in range([1, 3, 2, 1][seed % 4]):
        training.backward(seed + 100 * micro)
    training.update()


def clipped(training: Training, seed: int) -> None:
    training.backward(seed)
    training.update(max_norm=1e-4)


def clipped_by_hand(training: Training, seed: int) -> None:
    training.backward(seed)
    training.losses.append(float(training.optimizer.clip_grad_norm_(1e-4)))
    training.update()


def far_from_clipped(training: Training, seed: int) -> None:
    training.backward(seed)
    training.update(max_norm=1e9)


def another_learning_rate(training: Training, seed: int) -> None:
    training.backward(seed)
    for group in training.optimizer.param_groups:
        group["lr"] *= 0.5
    training.update()


def another_gradient(training: Training, seed: int) -> None:
    training.backward(seed)
    param = list(training.model.parameters())[seed % 4]
    training.optimizer.set_full_grad(param, training.optimizer.full_grad(param) * 2)
    training.update()


def another_value(training: Training, seed: int) -> None:
    training.backward(seed)
    param = list(training.model.parameters())[seed % 4]
    training.optimizer.set_local_param(param, training.optimizer.local_param(param) * 2)
    training.update()


def another_state(training: Training, seed: int) -> None:
    training.backward(seed)
    param = list(training.model.parameters())[seed % 4]
    state = training.optimizer.local_state(param, "exp_avg")
    if state is not None:
        training.optimizer.set_local_state(param, "exp_avg", state + 1)
    training.update()


def read_in_between(training: Training, seed: int) -> None:
    """What is read before the step is what was before the trial."""
    before = {name: value for name, value in training.values().items() if name != "losses"}
    training.backward(seed)
    after = {name: value for name, value in training.values().items() if name != "losses"}
    assert not differing(after, before)
    training.update()


def evaluated_in_between(training: Training, seed: int) -> None:
    training.backward(seed)
    with torch.no_grad():
        x = torch.ones(2, WIDTH, dtype=training.dtype)
        training.losses.append(float(training.model(x).float().sum()))
    training.update()


def dropped(training: Training, seed: int) -> None:
    training.backward(seed + 100)
    if seed % 2:
        training.optimizer.abort_step()
    else:
        training.optimizer.zero_grad()
    training.backward(seed)
    training.update()


SCENES: list[Callable[[Training, int], None]] = [
    two_backwards, uneven_windows, clipped, clipped_by_hand, far_from_clipped, another_learning_rate, another_gradient,
    another_value, another_state, read_in_between, evaluated_in_between, dropped,
]  # fmt: skip


def outcome(training: Training, scene: Callable[[Training, int], None]) -> dict[str, Tensor]:
    training.steps(1)
    for seed in range(1, 4):
        scene(training, seed)
    training.steps(1, start=4)
    found = training.values()
    training.close()
    return found


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
def test_no_number_changes(dtype: torch.dtype, scene: Callable[[Training, int], None], tmp_path: Path) -> None:
    cast = {} if dtype == F32 else {"dtype": dtype}
    wanted = outcome(Training(tmp_path, stage=1, **cast), scene)
    for name, options in list(LAYOUTS.items())[dtype == B16 :: 2]:
        assert not differing(outcome(Training(tmp_path, **options, **cast), scene), wanted), name


@pytest.mark.parametrize(
    ("scene", "repeated"),
    [
        (clipped, True), (clipped_by_hand, True), (another_learning_rate, True), (another_gradient, True),
        (another_value, True), (far_from_clipped, False), (evaluated_in_between, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_was_assumed_wrongly_is_done_again(
    scene: Callable[[Training, int], None], repeated: bool, tmp_path: Path
) -> None:
    training = Training(tmp_path, **LAYOUTS["states"]).steps(1)
    calls = training.recorded(lambda: scene(training, 1))
    assert len(writes(calls, "optimizer", "backward")) == 2 * WRITES
    again = len(writes(calls, "optimizer")) - 2 * WRITES
    assert again == (2 * WRITES if repeated else 0)
    training.close()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = layers(2), layers(1)
        self.use = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.always[0](x)
        return self.always[1](self.sometimes(x) if self.use else x)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_parameter_that_is_used_for_the_first_time(name: str, tmp_path: Path) -> None:
    found = []
    for options in ({"stage": 1}, LAYOUTS[name]):
        training = Training(tmp_path, model=Branches(), **options)
        for step in range(7):
            training.model.use = step in (2, 3, 5)  # type: ignore[assignment]
            training.steps(1, start=step)
        found.append(training.values())
        training.close()
    assert not differing(*found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_skipped_step(name: str, tmp_path: Path) -> None:
    """Gradients overflow in step 2: what the trial made of them is discarded."""
    found = []
    for options in ({"stage": 1}, LAYOUTS[name]):
        scale = zs_zero.DynamicLossScale(initial=2.0**8, hysteresis=1)
        training = Training(tmp_path, dtype=F16, loss_scale=scale, **options).steps(2)
        before = training.values()
        loss = training.model(torch.ones(1, WIDTH, dtype=F16)).float().sum() * torch.inf
        training.phase = "backward"
        training.optimizer.scale(loss).backward()
        training.update()
        assert training.optimizer.overflow
        assert not differing(training.values(), before)
        training.steps(3, start=3)
        found.append(training.values())
        training.close()
    assert not differing(*found)


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("how", [errno.EIO, "hang", "early"])
@pytest.mark.parametrize(("name", "number"), [("states", 0), ("states", 40), ("parameters", 17)])
def test_an_error_of_the_trial_is_raised_by_the_step(name: str, number: int, how: Any, op: Any, tmp_path: Path) -> None:
    wanted = Training(tmp_path, **LAYOUTS[name]).steps(4)
    training = Training(tmp_path, **LAYOUTS[name]).steps(3)
    before, store = training.values(), training.stores["optimizer"]
    at = store.count(op) + number
    store.faults.append(Fault(op=op, number=at, error=errno.EIO if how == "early" else how, early=how == "early"))
    training.backward(3)  # one rank cannot stop alone in here
    assert store.count(op) > at, "the fault was met in the backward"
    with pytest.raises(OSError, match="optimizer.*offset") as caught:
        training.update()
    assert isinstance(caught.value, TimeoutError) == (how == "hang")
    store.faults.clear()
    store.release()
    training.losses.pop()
    assert not training.optimizer.torn
    training.optimizer.abort_step()
    assert not differing(training.values(), before)
    training.steps(1, start=3)
    assert not differing(training.values(), wanted.values())
    wanted.close()
    training.close()


def test_an_error_in_a_window_that_is_dropped_is_nobodys(tmp_path: Path) -> None:
    training = Training(tmp_path, **LAYOUTS["states"]).steps(1)
    training.stores["optimizer"].fail_next("write")
    training.backward(1)
    training.optimizer.zero_grad()
    training.steps(2, start=1)
    training.close()
