"""Writes `loss_scales.json`: what DeepSpeed's own scaler does. Run it where deepspeed is installed.

Each row: the arguments of `DynamicLossScaler`, which steps overflow ("x"), and the scale of each step as a power of 2.
"""

import json
import math
import random
from pathlib import Path

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

STEPS = 160


def row(seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    options = {
        "init_scale": 2.0 ** draw.choice([4, 8, 16]),
        "scale_window": draw.choice([1, 2, 3, 7, 20]),
        "min_scale": draw.choice([0.25, 1.0, 16.0]),
        "delayed_shift": draw.choice([1, 2, 4]),
        "consecutive_hysteresis": draw.random() < 0.5,
    }
    chance = draw.choice([0.03, 0.15, 0.4])
    overflows = "".join("x" if draw.random() < chance else "." for _ in range(STEPS))
    scaler = DynamicLossScaler(**options, raise_error_at_min_scale=False)
    powers = []
    for step in overflows:
        powers.append(round(math.log2(scaler.loss_scale)))
        scaler.update_scale(step == "x")
    return {**options, "overflows": overflows, "powers": powers}


if __name__ == "__main__":
    rows = ",\n".join(json.dumps(row(seed)) for seed in range(24))
    Path(__file__).with_name("loss_scales.json").write_text(f"[\n{rows}\n]\n")
