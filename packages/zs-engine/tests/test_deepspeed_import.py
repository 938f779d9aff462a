"""An engine goes on where DeepSpeed stopped, at any stage: its checkpoint, `import_deepspeed`, `load_checkpoint`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zs_comm
import zs_engine
from zs_ckpt.importing import import_deepspeed
from zs_comm.testing import run_ranks

FIXTURES = Path(__file__).parents[2] / "zs-ckpt/tests/deepspeed_fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


def tiny() -> Any:
    if "deepspeed_tiny" not in sys.modules:
        spec = importlib.util.spec_from_file_location("deepspeed_tiny", FIXTURES / "tiny.py")
        assert spec is not None and spec.loader is not None
        sys.modules["deepspeed_tiny"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["deepspeed_tiny"])
    return sys.modules["deepspeed_tiny"]


def go_on(group: zs_comm.Group, folder: str, stage: int, dtype: str) -> dict[str, Any]:
    given = tiny()
    model = given.Tiny()
    config = given.config(stage, dtype)
    del config["zero_optimization"]["memory_efficient_linear"]
    engine, _, _, scheduler = zs_engine.initialize(model=model, model_parameters=given.groups(model), config=config)
    path, client_state = engine.load_checkpoint(folder)
    found: dict[str, Any] = {"path": path, "steps": engine.global_steps, "samples": engine.global_samples}
    found |= {"micro": engine.micro_steps, "iteration": scheduler.last_batch_iteration, "epoch": client_state["epoch"]}
    found |= {"losses": [], "lrs": []}
    for step in range(given.SEEN, given.SEEN + given.NEXT):
        found["lrs"].append(engine.get_lr()[0])
        loss = engine(*given.batch(step, group.rank))
        engine.backward(loss)
        engine.step()
        found["losses"].append(loss.item())
    return found


def imported(case: str, stage: int, folder: Path) -> list[dict[str, Any]]:
    import_deepspeed(FIXTURES / case, folder)
    return run_ranks(go_on, 2, str(folder), stage, case.partition("_")[2])


def mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(rank["losses"] for rank in ranks), strict=True)]


@pytest.mark.parametrize(("case", "stage"), [("zero1", 3), ("zero2", 1), ("zero3", 2), ("universal", 0)])
def test_fp32(case: str, stage: int, tmp_path: Path) -> None:
    ranks = imported(f"{case}_fp32", stage, tmp_path)
    for rank in ranks:
        assert Path(rank["path"]) == tmp_path / "global_step3"
        assert (rank["steps"], rank["samples"], rank["micro"], rank["iteration"], rank["epoch"]) == (3, 12, 3, 2, 2)
        assert rank["lrs"] == pytest.approx(EXPECTED[f"{case}_fp32"]["lrs"], rel=1e-6)
    assert mean_losses(ranks) == pytest.approx(EXPECTED[f"{case}_fp32"]["losses"], abs=1e-5, rel=0)


@pytest.mark.parametrize(("case", "stage"), [("zero1", 2), ("zero2", 3), ("zero3", 1), ("universal", 3)])
def test_bf16(case: str, stage: int, tmp_path: Path) -> None:
    ranks = imported(f"{case}_bf16", stage, tmp_path)
    assert mean_losses(ranks) == pytest.approx(EXPECTED[f"{case}_bf16"]["losses"], abs=1e-5, rel=0)
