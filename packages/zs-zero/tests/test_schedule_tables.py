"""DeepSpeed's schedules against stored tables, which tables/make.py makes from formulas of its own (and compares)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zs_comm import ConfigError
from zs_comm.config import validate
from zs_zero import schedules
from zs_zero.curriculum import Curriculum, CurriculumConfig
from zs_zero.layer_drop import LayerDrop, LayerDropConfig
from zs_zero.pacing import Pacing

TABLES = Path(__file__).resolve().parent / "tables"


def tables(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((TABLES / f"{name}.json").read_text())
    return found


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.2, 0.05)])


@pytest.mark.parametrize("number", range(10))
def test_learning_rates_over_1000_steps(number: int) -> None:
    table, client = tables("lr_schedules")[number], optimizer()
    schedule = getattr(schedules, table["type"])(client, **table["params"])
    found: dict[str, list[list[float]]] = {"lr": [[], []], "beta": [[], []]}
    for _ in range(1000):
        for place, group in enumerate(client.param_groups):
            found["lr"][place].append(group["lr"])
            found["beta"][place].append(group["betas"][0])
        schedule.step()
    for key in found.keys() & table.keys():
        for place in range(2):
            expected = table[key][place % len(table[key])]
            assert len(expected) == 1000
            assert found[key][place] == pytest.approx(expected, rel=1e-12, abs=0.0)


def test_every_schedule_has_a_table() -> None:
    assert {table["type"] for table in tables("lr_schedules")} == set(schedules.__all__)
    assert len(tables("lr_schedules")) == 10
    made = {table["section"]["schedule_type"] for table in tables("curriculum")}
    assert made == {"fixed_linear", "fixed_root", "fixed_discrete"}


def curriculum(section: dict[str, Any]) -> Curriculum:
    made = validate(CurriculumConfig, {"enabled": True, **section}).pacer()
    assert made is not None
    return made


@pytest.mark.parametrize("number", range(5))
def test_sequence_lengths_over_100_steps(number: int) -> None:
    table = tables("curriculum")[number]
    whole = curriculum(table["section"])
    assert [whole.arguments(done)["curriculum_seqlen"] for done in range(100)] == table["tokens"]
    assert whole.current_difficulty == table["tokens"][-1]
    resumed = curriculum(table["section"])
    resumed.load_state_dict(whole.state_dict())
    assert resumed.current_difficulty == whole.current_difficulty
    assert [curriculum(table["section"]).update_difficulty(k + 1) for k in range(40, 100)] == table["tokens"][40:]


def test_the_longest_length_stays() -> None:
    schedule = curriculum({"min_difficulty": 4, "max_difficulty": 16, "schedule_type": "custom"})
    with pytest.raises(ConfigError, match="set_custom_curriculum_learning_schedule"):
        schedule.update_difficulty(1)
    schedule.set_custom_schedule({"seqlen": lambda step: {1: 8, 2: 4, 3: 16}.get(step, 5)})
    assert [schedule.update_difficulty(step) for step in (1, 2, 3, 4)] == [8, 4, 16, 16]
    other = curriculum({"min_difficulty": 4, "max_difficulty": 16, "schedule_type": "custom"})
    other.set_custom_schedule(lambda step: 5)
    other.load_state_dict(schedule.state_dict())  # only the state knows that the end was reached
    assert other.update_difficulty(5) == 16


@pytest.mark.parametrize("number", range(4))
def test_keep_probabilities_over_100_steps(number: int) -> None:
    table = tables("layer_drop")[number]
    schedule = validate(LayerDropConfig, {"enabled": True, "theta": table["theta"], "gamma": table["gamma"]}).pacer()
    assert schedule is not None
    found = [schedule.arguments(done) for done in range(100)]
    assert all(arguments["progressive_layer_drop"] is True for arguments in found)
    assert [arguments["pld_theta"] for arguments in found] == pytest.approx(table["thetas"], rel=1e-15)
    resumed = LayerDrop(table["theta"], table["gamma"])
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_theta() == schedule.get_theta() == found[-1]["pld_theta"]


COMPLETE = {
    "enabled": True,
    "min_difficulty": 8,
    "max_difficulty": 64,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_difficulty": 4}, "max_difficulty: Input should be at least min_difficulty, 8 .*4"),
        ({"min_difficulty": 0}, "min_difficulty: .*greater than or equal to 1"),
        ({"curriculum_type": "vocab"}, "curriculum_type: Input should be 'seqlen'"),
        ({"schedule_type": "fixed_square"}, "schedule_type"),
        ({"schedule_type": "fixed_root"}, "needs schedule_config.root_degree"),
        ({"schedule_type": None}, "needs schedule_type"),
        ({"schedule_config": {"difficulty_step": 8}}, "needs schedule_config.total_curriculum_step"),
        (
            {"schedule_config": {"total_curriculum_step": 0, "difficulty_step": 8}},
            "schedule_config.total_curriculum_step",
        ),
        (
            {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1, 2], "max_step": [5, 9]}},
            "difficulty needs one entry more than max_step",
        ),
        (
            {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1, 2, 3], "max_step": [9, 5]}},
            "max_step should grow",
        ),
    ],
)
def test_incomplete_curricula_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        validate(CurriculumConfig, COMPLETE | change)
    assert validate(CurriculumConfig, COMPLETE).pacer() is not None


def test_what_is_off_asks_for_nothing() -> None:
    assert validate(CurriculumConfig, {"enabled": False, "schedule_type": "fixed_root"}).pacer() is None
    assert validate(LayerDropConfig, {"theta": 0.5}).pacer() is None
    assert not Pacing({"curriculum_learning": None, "progressive_layer_drop": None}, torch.nn.Linear(1, 1))


def test_a_forward_that_takes_no_such_argument() -> None:
    with pytest.raises(ConfigError, match="progressive_layer_drop.enabled: .*Linear.*pld_theta"):
        Pacing({"progressive_layer_drop": LayerDrop()}, torch.nn.Linear(1, 1))
