"""`--zs-installed=zs-comm,zs-zero`: the packages of this environment.

Each test file declares `REQUIRES = {...}`, the packages it needs. A file whose declaration is not met is not
even imported; what is left out is listed at the end.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from workspace import graph

LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zs-installed", default=",".join(graph()), help="packages of this environment, by comma")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = []


def installed(config: pytest.Config) -> set[str]:
    return set(config.getoption("--zs-installed").split(","))


def declared(path: Path) -> set[str]:
    """The value of `REQUIRES`, read without importing the file."""
    for node in ast.parse(path.read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and getattr(target, "id", "") == "REQUIRES":
            requires = ast.literal_eval(node.value)
            if unknown := set(requires) - set(graph()):
                raise pytest.UsageError(f"{path}: REQUIRES names {sorted(unknown)}, which are no packages")
            return set(requires)
    raise pytest.UsageError(f"{path}: declares no REQUIRES = {{...}}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.parent != Path(__file__).parent or not collection_path.name.startswith("test_"):
        return None
    missing = declared(collection_path) - installed(config)
    if missing:
        config.stash[LEFT_OUT].append(f"{collection_path.name}: needs {', '.join(sorted(missing))}")
        return True
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"left out by declaration: {line}")


@pytest.fixture(scope="session")
def packages(request: pytest.FixtureRequest) -> set[str]:
    return installed(request.config)
