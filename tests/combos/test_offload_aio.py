"""zs-offload-aio by itself, no array library: bytes come back through every backend that works here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import zs_offload_aio

REQUIRES = {"zs-offload-aio"}


def test_bytes_come_back(tmp_path: Path) -> None:
    content = os.urandom(300_001)
    working = [name for name, why in zs_offload_aio.backends().items() if not why]
    assert working
    for backend in working:
        path, again = tmp_path / backend, bytearray(len(content))
        with zs_offload_aio.Engine(backend=backend) as engine:
            assert engine.backend == backend
            assert engine.write(path, content).wait() == len(content)
            assert engine.read(path, again).wait() == len(content)
        assert again == content == path.read_bytes()


def test_import_is_light(tmp_path: Path) -> None:
    """A number of modules, because time says more of the machine: torch brings 1,500, numpy 150."""
    code = "import sys; before = set(sys.modules); import zs_offload_aio; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert not {"torch", "numpy", "ctypes", "asyncio", "argparse", "inspect"} & set(found)
    assert len(found) <= 40, found


def test_the_command_line_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "zs_offload_aio", "info"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "threads" in done.stdout


def test_the_entry_points_are_declared() -> None:
    assert entry_points(group="zs_zero.block_stores")["aio"].value == "zs_offload_aio.store:NvmeStore"
    assert entry_points(group="zs_zero.host_optimizers")["aio"].value == "zs_offload_aio.torch:HostOptimizer"
