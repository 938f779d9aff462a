"""Four times the memory that there is: 1.2 GB of states train within 300 MB that the kernel enforces.

The run is a process of its own. Its limit counts from where it stands after the imports; how it is enforced depends on
the machine (`zs_comm.testing.limits.kinds`): control groups count page cache too.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from zs_comm.testing.limits import Kind, kinds, run_limited

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tier_models import STATE_NBYTES, Task, numel  # noqa: E402

LIMIT = 300_000_000
KINDS = kinds()
LARGE = Task()


def run(task: Task) -> dict[str, Any]:
    command = [sys.executable, "-P", "-W", "ignore", str(HERE / "tier_models.py"), json.dumps(asdict(task))]
    done = run_limited(command, timeout_s=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.kills:
        pytest.fail(f"killed by the kernel: {done.peak_nbytes} of {task.limit} bytes were in use")
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def unlimited() -> dict[str, Any]:
    return run(LARGE)


def test_the_states_are_four_times_the_limit() -> None:
    assert STATE_NBYTES * numel(LARGE) >= 4 * LIMIT


@pytest.mark.parametrize("store", ["auto", "file"])
@pytest.mark.parametrize("kind", KINDS[:1])
def test_within_the_limit_with_the_same_bits(kind: Kind, store: str, unlimited: dict[str, Any], tmp_path: Path) -> None:
    found = run(replace(LARGE, folder=str(tmp_path), limit=LIMIT, kind=kind, store=store))
    assert found["hash"] == unlimited["hash"]
    assert found["losses"] == unlimited["losses"]
    planned = sum(found["planned"].values())
    assert planned <= found["limit"] == LIMIT
    # Page cache takes what the limit leaves and gives way to anything else; files that are read directly have none.
    used = found["peak"] if found["store"] == "aio" else found["peak_resident"]
    assert used <= 1.1 * planned, found["table"]
    assert found["peak_nbytes"] <= 1.1 * planned
    assert found["peak"] <= LIMIT or kind == "rlimit"
    assert found["read"] == found["expected_read"] and found["written"] == found["expected_written"]
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "files are removed at the end"


def test_what_moves_is_what_is_counted(tmp_path: Path) -> None:
    """By the kernel, for the last of three steps; elements of the plan, not padding, within 2 %."""
    found = run(replace(LARGE, layers=8, folder=str(tmp_path), limit=LIMIT))
    if found["store"] == "aio":
        for counted, moved in zip(found["storage"], ("read", "written"), strict=True):
            assert counted == pytest.approx(sum(found[moved].values()), rel=0.02), found["table"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_of_every_kind(kind: Kind, tmp_path: Path) -> None:
    small = replace(LARGE, layers=8, vocab=2000)
    slack = 96 << 20 if kind == "rlimit" else 0
    found = run(replace(small, folder=str(tmp_path), limit=170_000_000, kind=kind, slack=slack))
    assert found["kind"] == kind
    assert found["hash"] == run(small)["hash"]
    assert found["peak_resident"] <= 1.1 * sum(found["planned"].values())
    assert found["peak_resident"] <= 170_000_000
