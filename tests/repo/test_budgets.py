"""What would grow if nobody looked: the engine's size, bare asserts, algorithms in the engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from workspace import ROOT

SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
ENGINE = ROOT / "packages/zs-engine/src/zs_engine"
ENGINE_SOURCES = [path for path in SOURCES if path.is_relative_to(ENGINE)]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def label(path: Path) -> str:
    return str(path.relative_to(ROOT / "packages")).replace("/src/", "/")


def test_engine_is_thin() -> None:
    assert sum(map(lines, ENGINE_SOURCES)) < 900
    assert lines(ENGINE / "engine.py") < 300


def parameter_loops(tree: ast.AST) -> Iterator[int]:
    """Lines with a loop, or a comprehension, over `....parameters()` or `named_parameters()`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.For | ast.comprehension):
            continue
        for call in ast.walk(node.iter):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("parameters", "named_parameters"):
                yield call.lineno


def distributed_uses(tree: ast.AST) -> Iterator[int]:
    """Lines that import or reach into torch.distributed."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [f"{getattr(node.value, 'id', '')}.{node.attr}"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(f"{name}.".startswith("torch.distributed.") for name in names):
            yield node.lineno  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ENGINE_SOURCES, ids=label)
def test_engine_assembles(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert list(parameter_loops(tree)) == []
    if path.name != "launcher.py":  # it starts torchrun, which is torch.distributed.run
        assert list(distributed_uses(tree)) == []


def test_the_checkers_find_what_they_look_for() -> None:
    loops = "for p in model.parameters(): pass\nx = [n for n, p in list(m.named_parameters())]\n"
    assert list(parameter_loops(ast.parse(loops))) == [1, 2]
    uses = "import torch.distributed as dist\nfrom torch import distributed\ntorch.distributed.barrier()\n"
    uses += "from torch.distributed import barrier\nimport torch\n"
    assert sorted(distributed_uses(ast.parse(uses))) == [1, 2, 3, 4]


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_bare_assert(path: Path) -> None:
    """`python -O` must change nothing."""
    assert [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_a_file_is_one_idea(path: Path) -> None:
    assert lines(path) <= 400
