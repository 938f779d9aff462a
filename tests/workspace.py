"""The packages and what they need, read from their metadata: the one source of every matrix.

Standard library only, because the noxfile imports it and so do the tests.
"""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

Graph = Mapping[str, frozenset[str]]  # package -> siblings it requires


def projects(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """`[project]` of each package, by name."""
    tables = (tomllib.loads(path.read_text())["project"] for path in sorted(root.glob("packages/*/pyproject.toml")))
    return {table["name"]: table for table in tables}


def requirement_name(requirement: str) -> str:
    """`zs-comm>=0.1,<0.2` -> `zs-comm`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def graph(root: Path = ROOT) -> Graph:
    """Direct sibling requirements of each package."""
    tables = projects(root)
    return {
        name: frozenset(map(requirement_name, table.get("dependencies", []))) & tables.keys()
        for name, table in tables.items()
    }


def third_party(root: Path = ROOT) -> list[str]:
    """Requirements of all packages that no sibling fulfils, torch left out."""
    tables = projects(root)
    found = {line for table in tables.values() for line in table.get("dependencies", [])}
    return sorted(line for line in found if requirement_name(line) not in {*tables, "torch"})


def requires(requirement: str, names: Iterable[str], root: Path = ROOT) -> bool:
    """Whether one of these packages declares `requirement`, say torch, as a dependency."""
    tables = projects(root)
    return any(requirement in map(requirement_name, tables[name].get("dependencies", [])) for name in names)


def closure(names: Iterable[str], siblings: Graph) -> frozenset[str]:
    """What installing `names` installs: they and everything they need."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += siblings[name]
    return frozenset(found)


def combinations(siblings: Graph) -> dict[frozenset[str], tuple[str, ...]]:
    """Every closure of a non-empty subset, with the smallest request that yields it."""
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for size in range(1, len(siblings) + 1):
        for request in itertools.combinations(sorted(siblings), size):
            found.setdefault(closure(request, siblings), request)
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), sorted(item[0]))))


def import_name(package: str) -> str:
    return package.replace("-", "_")


class Import(NamedTuple):
    where: str
    names: tuple[str, ...]  # dotted: module, then what is taken from it


def imports(text: str, name: str) -> Iterator[Import]:
    """Absolute imports, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(f"{name}:{node.lineno}", tuple(alias.name.split(".")))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                yield Import(f"{name}:{node.lineno}", (*node.module.split("."), alias.name))


def sibling_imports(package: str, root: Path = ROOT) -> Iterator[Import]:
    """What a package's sources import from other packages of the workspace."""
    owners = {import_name(other): other for other in graph(root)}
    for path in sorted((root / "packages" / package / "src").rglob("*.py")):
        for found in imports(path.read_text(), str(path.relative_to(root))):
            if owners.get(found.names[0], package) != package:
                yield found
