"""What must hold in every combination: it imports, knows its version, and its README's example runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from workspace import ROOT, closure, graph, import_name, projects, requires

REQUIRES: set[str] = set()


def run_python(code: str, folder: Path) -> str:
    command = [sys.executable, "-P", "-W", "error::DeprecationWarning:zs_", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def first_fence(readme: Path) -> str:
    fence = re.search(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    assert fence, f"{readme} has no python example"
    return fence.group(1)


def test_each_package_imports_by_itself(packages: set[str], tmp_path: Path) -> None:
    for package in sorted(packages):
        name = import_name(package)
        code = f"import {name}, sys; print(*sorted(m for m in sys.modules if m.startswith('zs_') and '.' not in m))"
        allowed = {import_name(p) for p in closure([package], graph())}
        assert set(run_python(code, tmp_path).split()) <= allowed


def test_torch_is_there_only_where_it_is_needed(packages: set[str]) -> None:
    assert (importlib.util.find_spec("torch") is not None) == requires("torch", packages)
    assert importlib.util.find_spec("numpy") is None


def test_versions_are_those_of_the_tree(packages: set[str], tmp_path: Path) -> None:
    for package in sorted(packages):
        code = f"from importlib.metadata import version; print(version({package!r}))"
        assert run_python(code, tmp_path).strip() == projects()[package]["version"]


def test_readme_example_runs_in_its_minimal_environment(packages: set[str], tmp_path: Path) -> None:
    """Where the environment is just a package's closure, the first python fence of its README runs."""
    mine = [package for package in sorted(packages) if closure([package], graph()) == packages]
    for package in mine:
        example = tmp_path / "example.py"
        example.write_text(first_fence(ROOT / "packages" / package / "README.md"))
        done = subprocess.run(
            [sys.executable, "-P", str(example)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"the first example of packages/{package}/README.md:\n{done.stderr}"
