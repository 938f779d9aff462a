"""Writes `golden.json`, what the hand-written reference gives: `python make.py`.

A change that is not meant to change numbers leaves it as it is; look at the difference before you keep it. Losses have
six digits. Other machines round matrix products in other places, which grows in time, so the test has a bound.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from reference.plans import all_plans  # noqa: E402
from reference.training import Plan, train  # noqa: E402

PATH = HERE / "golden.json"


def golden(plan: Plan) -> dict[str, Any]:
    trained = train(plan)
    found: dict[str, Any] = {"losses": [[float(f"{loss:.6g}") for loss in own] for own in trained.losses]}
    return found | {"scales": trained.scales, "skipped": trained.skipped}


def main() -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(golden(plan))}" for name, plan in all_plans()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
