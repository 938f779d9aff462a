"""The hand-written reference gives the losses that are stored: no change moves both sides of the parity tests."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from reference.plans import all_plans
from reference.training import train

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "golden.json").read_text("utf-8"))
PLANS = dict(all_plans())
# Relative, of a loss. Machines add the terms of a product in different orders: fp32 differs in the last digits, 16-bit
# values in their last bit (2**-8 and 2**-11), and 18 steps of training make more of both.
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}


def test_every_training_is_stored() -> None:
    assert list(GOLDEN) == list(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_losses(name: str) -> None:
    stored, trained = GOLDEN[name], train(PLANS[name])
    assert (trained.scales, trained.skipped) == (stored["scales"], stored["skipped"])
    bound = BOUNDS[name[:4]]
    for rank, (own, wanted) in enumerate(zip(trained.losses, stored["losses"], strict=True)):
        for index, (loss, there) in enumerate(zip(own, wanted, strict=True)):
            assert abs(loss - there) <= bound * there, f"rank {rank}, micro-step {index}: {loss} != {there}"


def test_what_is_stored_has_the_steps_that_matter() -> None:
    """The scale falls, rests, grows and is used where it grew; steps are skipped by nature and by injection."""
    for name, plan in PLANS.items():
        stored = GOLDEN[name]
        assert {step for step, _, _ in plan.inject} <= set(stored["skipped"]), name
        pairs = list(zip(stored["scales"], stored["scales"][1:], strict=False))
        if plan.scaling and plan.scaling.window:
            grown = [step + 1 for step, (a, b) in enumerate(pairs) if b == 2 * a]
            assert grown and any(b == a / 2 for a, b in pairs), name
            assert any(step not in stored["skipped"] for step in grown), f"{name}: no update with a scale that grew"
            assert set(stored["skipped"]) - {step for step, _, _ in plan.inject}, f"{name}: no overflow by nature"
        else:
            assert all(a == b for a, b in pairs), name
        assert all(math.isfinite(loss) for own in stored["losses"] for loss in own), name
