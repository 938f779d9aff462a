"""Offload without an engine: `zs_zero.shard` with states and parameters in files, in every environment with zs-zero.

With zs-offload-aio beside it blocks move through its engine; without, through plain files, and one line says which
package would make that fast. The weights are the same, bit for bit, and those of the run in memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import ROOT

REQUIRES = {"zs-zero"}

EXAMPLE = ROOT / "examples" / "offload.py"


def run(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-P", *launcher, str(EXAMPLE), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def weights(done: subprocess.CompletedProcess[str]) -> str:
    found = re.findall(r"^weights ([0-9a-f]{64})$", done.stdout, re.MULTILINE)
    assert len(found) == 1, done.stdout
    return str(found[0])


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return weights(run(tmp_path_factory.mktemp("memory"), "--in-memory"))


def test_the_same_weights_and_a_report(packages: set[str], in_memory: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    done = run(tmp_path, "--folder", str(files))
    assert weights(done) == in_memory
    store = "aio" if "zs-offload-aio" in packages else "file"
    assert re.search(rf"\b{store}\b", done.stdout), done.stdout
    for kind in ("optimizer", "parameters"):
        assert kind in done.stdout
    assert not [path for path in files.rglob("*") if path.is_file() and path.stat().st_size], "files are removed"


def test_what_is_missing_is_said_once(packages: set[str], tmp_path: Path) -> None:
    said = [line for line in run(tmp_path).stderr.splitlines() if "zs-zero[nvme]" in line]
    assert len(said) == ("zs-offload-aio" not in packages), said


def test_plain_files_by_choice(in_memory: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--store", "file")
    assert weights(done) == in_memory
    assert "zs-zero[nvme]" not in done.stderr, "nobody asked for more"


def test_two_ranks(tmp_path: Path) -> None:
    assert weights(run(tmp_path, ranks=2)) == weights(run(tmp_path, "--in-memory", ranks=2))
