"""Every python example of every document runs, not only the first of each README.

Those with numpy run in the session `alone`: no package needs it, so it is in no combination.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import ROOT, imports

REQUIRES = {"zs-comm", "zs-zero", "zs-engine", "zs-offload-aio", "zs-ckpt"}

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def fences(document: Path) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    without_numpy = importlib.util.find_spec("numpy") is None
    return [code for code in found if not (without_numpy and arrays_of(code) == {"numpy"})]


def arrays_of(code: str) -> set[str]:
    return {"numpy", "torch"} & {found.names[0] for found in imports(code, "")}


EXAMPLES = [
    pytest.param(code, id=f"{document.relative_to(ROOT)}#{number}")
    for document in DOCUMENTS
    for number, code in enumerate(fences(document), 1)
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-P", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
