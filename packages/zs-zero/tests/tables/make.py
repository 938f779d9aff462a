"""Makes the tables of schedules beside this file, from formulas that share nothing with the packages:

    python make.py                          # writes lr_schedules.json, curriculum.json, layer_drop.json
    python make.py --compare-with-deepspeed # and holds DeepSpeed's own objects against them (0.19.8: where it has them)

A table of a schedule has, for each parameter group (only the first where both are equal) and each of 1,000 training
steps, the value that stands in the optimizer while the step runs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 1000
GROUP_LRS = [0.2, 0.05]  # of the optimizer's two groups before the schedule
Values = list[float]
Formula = Callable[[int], Any]

# Step k of the training runs after k calls of step(): the schedule's own count is then k - 1.


def warmup(i: int, n: int, kind: str) -> float:
    """Fraction of the way up at count i of n."""
    return math.log(i + 1) / math.log(n) if kind == "log" else i / n


def range_test(low: Values, size: int, rate: float, stairs: bool) -> Formula:
    def at(k: int) -> dict[str, Values]:
        interval = k // size if stairs else k / size  # (k - 1) + 1
        return {"lr": [x * (1 + rate * interval) for x in low]}

    return at


def one_cycle(
    low: Values, high: Values, first: int, second: int, stairs: tuple[int, int], decay: tuple[float, float, int]
) -> Formula:
    """Betas between 0.85 and 0.95."""
    lr_rate, mom_rate, decay_size = decay

    def height(k: int) -> float:
        x = k if k <= first else first + second - k
        size, count = (first, stairs[0]) if k <= first else (second, stairs[1])
        return math.floor(x * count / size) / count if count else x / size

    def at(k: int) -> dict[str, Values]:
        if k == 0:
            return {"lr": low, "beta": [0.85, 0.85]}
        if k - 1 < first + second:
            h = height(k) if k < first + second else 0.0
            return {
                "lr": [a + (b - a) * h for a, b in zip(low, high, strict=True)],
                "beta": [0.95 - (0.95 - 0.85) * h] * 2,
            }
        over = (k - first - second) / decay_size if decay_size else 0.0
        return {"lr": [a / (1 + lr_rate * over) for a in low], "beta": [0.95 * (1 + mom_rate * over)] * 2}

    return at


def warmup_lr(low: Values, high: Values, n: int, kind: str, total: int | None = None) -> Formula:
    """With `total` it decays to zero way (the lower rate) there, in a straight line."""

    def at(k: int) -> dict[str, Values]:
        i = max(k - 1, 0)
        way = warmup(i, n, kind) if i < n else 1.0 if total is None else max(0.0, (total - i) / max(1, total - n))
        return {"lr": [a + (b - a) * way for a, b in zip(low, high, strict=True)]}

    return at


def warmup_cosine(start: float, n: int, kind: str, end: float, total: int) -> Formula:
    def at(k: int) -> dict[str, Values]:
        i = k - 1
        if i < 0:
            ratio = 0.0
        elif i < n:
            ratio = start + (1 - start) * warmup(i, n, kind)
        else:
            ratio = end + (1 - end) * (1 + math.cos(math.pi * min(1.0, (i - n + 1) / max(1, total - n)))) / 2
        return {"lr": [lr * ratio for lr in GROUP_LRS]}

    return at


CYCLE = {"cycle_min_mom": 0.85, "cycle_max_mom": 0.95}
LR: list[tuple[str, dict[str, Any], Formula]] = [
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": [1e-4, 3e-4], "lr_range_test_step_size": 150, "lr_range_test_step_rate": 2.5},
        range_test([1e-4, 3e-4], 150, 2.5, False),
    ),
    (
        "LRRangeTest",
        {
            "lr_range_test_min_lr": 1e-4,
            "lr_range_test_step_size": 70,
            "lr_range_test_step_rate": 1.5,
            "lr_range_test_staircase": True,
        },
        range_test([1e-4, 1e-4], 70, 1.5, True),
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": [0.001, 0.002],
            "cycle_max_lr": [0.1, 0.05],
            "cycle_first_step_size": 300,
            "cycle_second_step_size": 410,
            "decay_step_size": 13,
            "decay_lr_rate": 0.25,
            "decay_mom_rate": 0.001,
            **CYCLE,
        },
        one_cycle([0.001, 0.002], [0.1, 0.05], 300, 410, (0, 0), (0.25, 0.001, 13)),
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.01,
            "cycle_max_lr": 0.1,
            "cycle_first_step_size": 250,
            "cycle_first_stair_count": 10,
            "cycle_second_stair_count": 4,
            **CYCLE,
        },
        one_cycle([0.01, 0.01], [0.1, 0.1], 250, 250, (10, 4), (0.0, 0.0, 0)),
    ),
    (
        "WarmupLR",
        {"warmup_min_lr": [0.0, 0.001], "warmup_max_lr": [0.01, 0.02], "warmup_num_steps": 333},
        warmup_lr([0.0, 0.001], [0.01, 0.02], 333, "log"),
    ),
    (
        "WarmupLR",
        {"warmup_min_lr": 0.0, "warmup_num_steps": 100, "warmup_type": "linear"},
        warmup_lr([0.0, 0.0], GROUP_LRS, 100, "linear"),
    ),
    (
        "WarmupDecayLR",
        {"total_num_steps": 800, "warmup_min_lr": 1e-5, "warmup_max_lr": 0.01, "warmup_num_steps": 120},
        warmup_lr([1e-5] * 2, [0.01] * 2, 120, "log", 800),
    ),
    (
        "WarmupDecayLR",
        {"total_num_steps": 1000, "warmup_max_lr": [0.1, 0.2], "warmup_num_steps": 50, "warmup_type": "linear"},
        warmup_lr([0.0] * 2, [0.1, 0.2], 50, "linear", 1000),
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 700, "warmup_min_ratio": 0.05, "warmup_num_steps": 90, "warmup_type": "linear"},
        warmup_cosine(0.05, 90, "linear", 0.0001, 700),
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 1000, "warmup_num_steps": 200, "cos_min_ratio": 0.1},
        warmup_cosine(0.0, 200, "log", 0.1, 1000),
    ),
]


def root(low: int, high: int, total: int, multiple: int, degree: int) -> Callable[[int], int]:
    def at(step: int) -> int:
        exact = low + (high - low) * (step / total) ** (1 / degree)
        least = math.ceil(low / multiple) * multiple
        return min(high, max(least, math.floor(exact) // multiple * multiple))

    return at


def discrete(lengths: list[int], ends: list[int]) -> Callable[[int], int]:
    return lambda step: lengths[sum(step > end for end in ends)]


CURRICULUM: list[tuple[dict[str, Any], Callable[[int], int]]] = [
    (
        {
            "min_difficulty": 8,
            "max_difficulty": 512,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 80, "difficulty_step": 8},
        },
        root(8, 512, 80, 8, 1),
    ),
    (
        {
            "min_difficulty": 32,
            "max_difficulty": 1000,  # no multiple of the step
            "schedule_type": "fixed_root",
            "schedule_config": {"total_curriculum_step": 120, "difficulty_step": 16, "root_degree": 2},
        },
        root(32, 1000, 120, 16, 2),
    ),
    (
        {
            "min_difficulty": 20,  # nor this one: the first length is the multiple above it
            "max_difficulty": 300,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 90, "difficulty_step": 16},
        },
        root(20, 300, 90, 16, 1),
    ),
    (
        {
            "min_difficulty": 64,
            "max_difficulty": 2048,
            "schedule_type": "fixed_root",
            "schedule_config": {"total_curriculum_step": 60, "difficulty_step": 64, "root_degree": 3},
        },
        root(64, 2048, 60, 64, 3),
    ),
    (
        {
            "min_difficulty": 16,
            "max_difficulty": 256,
            "schedule_type": "fixed_discrete",
            "schedule_config": {"difficulty": [16, 48, 96, 256], "max_step": [10, 35, 70]},
        },
        discrete([16, 48, 96, 256], [10, 35, 70]),
    ),
]
LAYER_DROP = [(0.5, 0.001), (0.3, 0.05), (0.0, 0.2), (1.0, 0.001)]


def tables() -> dict[str, Any]:
    """By file name."""
    lr = []
    for name, params, formula in LR:
        rows = [formula(k) for k in range(STEPS)]
        columns = {key: [[row[key][group] for row in rows] for group in range(2)] for key in rows[0]}
        distinct = {key: both if both[0] != both[1] else both[:1] for key, both in columns.items()}
        lr.append({"type": name, "params": params, **distinct})
    curriculum = [{"section": s, "tokens": [at(step) for step in range(1, 101)]} for s, at in CURRICULUM]
    drop = [
        {"theta": theta, "gamma": gamma, "thetas": [(1 - theta) * math.exp(-gamma * t) + theta for t in range(100)]}
        for theta, gamma in LAYER_DROP
    ]
    return {"lr_schedules": lr, "curriculum": curriculum, "layer_drop": drop}


def compare(made: dict[str, Any]) -> None:
    """Raises where DeepSpeed's objects give other values."""
    import torch
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    for table in made["lr_schedules"]:
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in GROUP_LRS]
        optimizer = torch.optim.AdamW(groups)
        schedule = getattr(lr_schedules, table["type"])(optimizer, **table["params"])
        worst = 0.0
        for k in range(STEPS):
            for number, group in enumerate(optimizer.param_groups):
                found = {"lr": group["lr"], "beta": group["betas"][0]}
                for key in found.keys() & table.keys():
                    expected = table[key][number % len(table[key])][k]
                    worst = max(worst, abs(found[key] - expected) / max(abs(expected), 1e-30))
            schedule.step()
        print(table["type"], table["params"], "largest relative difference", worst)
        if worst > 1e-12:
            raise SystemExit("differs")
    for table in made["curriculum"]:
        scheduler = CurriculumScheduler(table["section"])
        found = [scheduler.update_difficulty(step) for step in range(1, 101)]
        print(table["section"], "equal" if found == table["tokens"] else "differs")
        if found != table["tokens"]:
            raise SystemExit("differs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare-with-deepspeed", action="store_true")
    options = parser.parse_args()
    made = tables()
    for name, table in made.items():
        lines = ",\n".join(json.dumps(row) for row in table)
        (HERE / f"{name}.json").write_text(f"[\n{lines}\n]\n")
    if options.compare_with_deepspeed:
        compare(made)


if __name__ == "__main__":
    main()
