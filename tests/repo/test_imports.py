"""Which way the imports run: below the engine only zs_comm is imported, and nobody uses a sibling's private names."""

from __future__ import annotations

from pathlib import Path

import pytest
from workspace import ROOT, graph, import_name, imports, projects, sibling_imports

GRAPH = graph()
OWNER = {import_name(package): package for package in GRAPH}
BASE, TOP = "zs-comm", {"zs-engine", "zs-deepspeed"}


@pytest.mark.parametrize("package", sorted(GRAPH))
def test_only_declared_siblings_are_imported(package: str) -> None:
    undeclared = [found for found in sibling_imports(package) if OWNER[found.names[0]] not in GRAPH[package]]
    assert not undeclared


@pytest.mark.parametrize("package", sorted(set(GRAPH) - TOP))
def test_below_the_engine_only_zs_comm_is_imported(package: str) -> None:
    others = [found for found in sibling_imports(package) if OWNER[found.names[0]] != BASE]
    assert not others
    assert GRAPH[package] <= {BASE}


def test_the_file_engine_needs_nobody() -> None:
    """zs-offload-aio is for everyone who has bytes: no sibling, no requirement, torch in one module only."""
    package = "zs-offload-aio"
    assert not GRAPH[package] and not projects()[package].get("dependencies")
    source = ROOT / "packages" / package / "src"
    for path in sorted(source.rglob("*.py")):
        taken = {found.names[0] for found in imports(path.read_text(), path.name)} & {"torch", "numpy"}
        # `typing_extensions` is imported for the type checker only
        assert taken == ({"torch"} if path.name == "torch.py" else set()), path


@pytest.mark.parametrize("package", sorted(GRAPH))
def test_no_private_name_of_a_sibling_is_imported(package: str) -> None:
    private = [found for found in sibling_imports(package) if any(part.startswith("_") for part in found.names[1:])]
    assert not private


def test_the_checker_sees_every_form() -> None:
    text = "import a.b\nfrom a import _c\ndef f():\n    from a._d import e\nfrom . import g\n"
    assert [found.names for found in imports(text, "x")] == [("a", "b"), ("a", "_c"), ("a", "_d", "e")]


def test_graph_has_no_cycle() -> None:
    done: set[str] = set()
    while ready := {package for package, needs in GRAPH.items() if package not in done and needs <= done}:
        done |= ready
    assert done == set(GRAPH)


def test_sources_are_where_the_graph_says() -> None:
    folders = {path.name for path in Path(ROOT / "packages").iterdir() if (path / "pyproject.toml").exists()}
    assert folders == set(GRAPH)
    assert all((ROOT / "packages" / package / "src" / import_name(package)).is_dir() for package in GRAPH)
