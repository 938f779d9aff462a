"""Whole configurations: those written for these tests, and a folder of real ones where ZS_DS_CONFIGS names it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from zs_comm.config import dotted
from zs_comm.testing import mirrored_group

sys.path.insert(0, str(Path(__file__).parent))
from corpus import Toy, excluded, filled, implied_world, judge, report, train_two_steps

FOLDER = Path(__file__).parent / "configs"
FILES = sorted(FOLDER.glob("*.json"))


def test_there_are_about_forty() -> None:
    assert len(FILES) >= 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_is_what_its_first_line_says(file: Path) -> None:
    expected = file.read_text().splitlines()[0].removeprefix("// expect: ")
    judged = judge(file, train=False)
    found = [row for row in judged.rows if row.verdict in ("refused", "unknown", "invalid")]
    found = [row for row in found if not row.text.startswith("part of ")]
    assert all(row.position[0] for row in judged.rows)
    if expected != "train":
        wanted = [tuple(part.split()) for part in expected.split(",")]
        assert sorted((row.verdict, dotted(row.path)) for row in found) == sorted(wanted)
        return
    assert found == []
    assert judge(file).failure is None


def test_the_world_that_batch_sizes_imply() -> None:
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert implied_world(sizes) == 8
    assert implied_world({**sizes, "gradient_accumulation_steps": "auto"}) == 16
    assert implied_world({"train_batch_size": 64}) == implied_world({"train_micro_batch_size_per_gpu": 4}) == 1


def test_what_hugging_face_fills_in() -> None:
    config = filled({"train_batch_size": "auto", "gradient_accumulation_steps": 2, "gradient_clipping": "auto"}, 4)
    assert config == {"train_batch_size": 8, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    assert filled({}, 1) == {"train_micro_batch_size_per_gpu": 1}


def test_the_closed_list() -> None:
    assert list(excluded({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}})) == ["ZenFlow"]
    assert list(excluded({"zero_optimization": {"offload_param": {"device": "cpu"}, "cpu_offload": True}})) == []
    assert list(excluded({"compression_training": {"row_pruning": {"shared_parameters": {"enabled": False}}}})) == []
    assert list(excluded({"optimizer": {"type": "OneBitLamb"}})) == ["1-bit optimizers"]


def test_a_simulated_group_that_is_not_there_fails() -> None:
    """The harness sees failures: of a loss that is not finite, and of a configuration."""
    with pytest.raises(ValueError, match="unknown key"):
        train_two_steps({"train_batch_sise": 3}, 1)
    assert mirrored_group(5).size == 5 and sum(p.numel() for p in Toy().parameters()) > 1000


@pytest.mark.ds_configs
def test_real_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    """At least 95 % of those that have to train do."""
    text, trained, counted = report(Path(os.environ["ZS_DS_CONFIGS"]))
    with capsys.disabled():
        print(f"\n{text}")
    assert trained >= 0.95 * counted > 0
