"""A save that is killed, at every file operation and at random times, leaves the old checkpoint or the new one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the package `torture`, which its own processes import as well

from torture import drive

RUNS = 500


def tortured(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Every run's result."""
    out = folder / "results.jsonl"
    drive.start([*arguments, "--jobs", "2", "--seed", "5", "--folder", str(folder), "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def bad(results: list[dict[str, Any]]) -> list[str]:
    return [f"{result['title']} [{result['hit']}]: {'; '.join(result['bad'])}" for result in results if result["bad"]]


def test_a_killed_save_leaves_the_newest_committed_step(tmp_path: Path) -> None:
    results = tortured(tmp_path, "kills", "--runs", str(RUNS))
    assert bad(results) == []
    killed = [result for result in results if result["killed"]]
    assert len(killed) >= RUNS
    assert {result["outcome"] for result in killed} == {"old", "new"}
    assert sum(result["plan"]["scenario"].startswith("two ranks") for result in killed) >= RUNS / 10
    assert {result["hit"].split()[0] for result in killed} >= {"create", "write", "fsync", "rename", "mkdir", "unlink"}


def test_an_error_at_any_file_operation_is_raised_and_changes_nothing(tmp_path: Path) -> None:
    results = tortured(tmp_path, "faults")
    assert bad(results) == []
    assert len(results) > 100


@pytest.mark.parametrize(("system", "tears"), [("torch.save", True), ("torch.save, renamed", False)])
def test_the_harness_sees_torn_states(tmp_path: Path, system: str, tears: bool) -> None:
    """A file that is written in place is torn; one that is renamed into place is not."""
    results = tortured(tmp_path, "kills", "--runs", "12", "--system", system)
    assert bool(bad(results)) is tears
