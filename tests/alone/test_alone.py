"""The packages that need no torch, where there is only numpy, only torch, or neither."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import ROOT, closure, graph, import_name, imports, requires

GRAPH = graph()
TORCH_FREE = [name for name in sorted(GRAPH) if not requires("torch", closure([name], GRAPH))]
LIBRARIES = {"numpy", "torch"}


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def fences(package: str) -> list[str]:
    readme = (ROOT / "packages" / package / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> str:
    (folder / "example.py").write_text(code)
    command = [sys.executable, "-P", "example.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_is_what_it_is_called(arrays: str) -> None:
    assert {name for name in LIBRARIES if has(name)} == LIBRARIES & {arrays}


@pytest.mark.parametrize("package", TORCH_FREE)
def test_the_first_examples_run(package: str, arrays: str, tmp_path: Path) -> None:
    """The first python fence runs anywhere. The first that imports an array library runs with either of them alone."""
    plain, *others = fences(package)
    run(plain, tmp_path)
    with_arrays = next(code for code in others if {found.names[0] for found in imports(code, "")} >= LIBRARIES)
    if arrays != "nothing":
        run(with_arrays, tmp_path)


@pytest.mark.parametrize("package", TORCH_FREE)
def test_every_other_example_for_this_library_runs(package: str, arrays: str, tmp_path: Path) -> None:
    for code in fences(package):
        wanted = LIBRARIES & {found.names[0] for found in imports(code, "")}
        if wanted <= {arrays}:
            run(code, tmp_path)


@pytest.mark.parametrize("package", TORCH_FREE)
def test_importing_brings_no_array_library(package: str, tmp_path: Path) -> None:
    code = f"import sys, {import_name(package)}; print(*sorted({LIBRARIES!r} & set(sys.modules)))"
    assert run(code, tmp_path).split() == []
