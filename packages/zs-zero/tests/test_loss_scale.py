"""The loss scale by itself: when it falls, when it grows, what it keeps."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from zs_comm import ConfigError
from zs_zero import DynamicLossScale, LossScale, LossScaleError, StaticLossScale

ROWS = json.loads((Path(__file__).parent / "tables" / "loss_scales.json").read_text("utf-8"))


def scale_of(row: dict[str, Any]) -> DynamicLossScale:
    return DynamicLossScale(
        initial=row["init_scale"],
        window=row["scale_window"],
        hysteresis=row["delayed_shift"],
        consecutive_hysteresis=row["consecutive_hysteresis"],
        minimum=row["min_scale"],
    )


def followed(scale: LossScale, overflows: str) -> list[float]:
    """The scale that each step is made with."""
    values = []
    for step in overflows:
        values.append(scale.value)
        scale.update(step == "x")
    return values


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_deepspeeds_scale_step_for_step(row: dict[str, Any]) -> None:
    scale = scale_of(row)
    assert followed(scale, row["overflows"]) == [2.0**power for power in row["powers"]]


def test_the_table_holds_growth_and_every_kind_of_fall() -> None:
    powers = [row["powers"] for row in ROWS]
    assert any(b > a for row in powers for a, b in pairwise(row))
    assert any(min(2.0**p for p in row["powers"]) == row["min_scale"] for row in ROWS)
    assert {row["delayed_shift"] for row in ROWS} == {1, 2, 4}
    assert {row["consecutive_hysteresis"] for row in ROWS} == {True, False}


@pytest.mark.parametrize("cut", [1, 17, 80])
@pytest.mark.parametrize("row", ROWS[:8], ids=range(8))
def test_resumes_from_its_state(row: dict[str, Any], cut: int) -> None:
    first, whole = scale_of(row), scale_of(row)
    expected = followed(whole, row["overflows"])[cut:]
    followed(first, row["overflows"][:cut])
    second = scale_of(row)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert followed(second, row["overflows"][cut:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_the_picture_of_the_module() -> None:
    scale = DynamicLossScale(initial=16, window=3, hysteresis=1)
    assert followed(scale, "x.......x.") == [16, 8, 8, 8, 8, 16, 16, 16, 32, 16]


def test_a_static_scale_stays_and_takes_no_state() -> None:
    scale = StaticLossScale(128)
    assert followed(scale, "..xx..") == [128.0] * 6
    scale.load_state_dict({"value": 4.0, "good_steps": 3, "tolerated": 1, "stuck": 0})
    assert scale.value == 128.0
    assert not scale.dynamic


def test_a_dynamic_scale_takes_nothing_from_a_static_one() -> None:
    scale = DynamicLossScale(initial=64)
    scale.load_state_dict(StaticLossScale(2).state_dict())
    assert scale.value == 64.0


def test_overflows_in_a_row_at_the_minimum_are_counted() -> None:
    scale = DynamicLossScale(initial=4, minimum=1, hysteresis=1)
    stuck = []
    for step in "xxxxx.x":
        scale.update(step == "x")
        stuck.append(scale.stuck)
    assert stuck == [0, 0, 1, 2, 3, 0, 1]
    static = StaticLossScale(1.0)
    static.update(True)
    static.update(True)
    assert static.stuck == 2


def test_raises_at_the_minimum_only_where_asked_for() -> None:
    scale = DynamicLossScale(initial=2, minimum=1, hysteresis=1, raise_at_minimum=True)
    scale.update(True)
    before = scale.state_dict()
    with pytest.raises(LossScaleError, match="smallest loss scale, 1"):
        scale.update(True)
    assert scale.state_dict() == before | {"stuck": 1}, "a scale that raised has changed"
    for _ in range(2):
        scale.update(False)
    with pytest.raises(LossScaleError):
        scale.update(True)
    assert scale.state_dict() == before | {"stuck": 1}, "good steps are counted from the last overflow on"
    patient = DynamicLossScale(initial=1, minimum=1, hysteresis=3, raise_at_minimum=True)
    patient.update(True)
    patient.update(True)  # hysteresis: two overflows are let pass
    with pytest.raises(LossScaleError):
        patient.update(True)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: StaticLossScale(0), r"loss_scale is a finite number above 0 \(got 0\)"),
        (lambda: StaticLossScale(math.inf), r"got inf"),
        (lambda: StaticLossScale(True), r"got True"),
        (lambda: DynamicLossScale(initial=-1), r"initial .*got -1"),
        (lambda: DynamicLossScale(minimum=0), r"minimum .*got 0"),
        (lambda: DynamicLossScale(window=0), r"window .*got 0"),
        (lambda: DynamicLossScale(hysteresis=0), r"hysteresis .*got 0"),
        (lambda: DynamicLossScale(window=1.5), r"window .*got 1\.5"),  # type: ignore[arg-type]
        (lambda: DynamicLossScale(initial=1, minimum=2), r"1 is below its minimum 2"),
    ],
)
def test_values_out_of_range(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()
