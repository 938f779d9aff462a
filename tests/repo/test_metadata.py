"""What the packages say of themselves: bounds between siblings, versions, the files that each must have."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
from workspace import ROOT, graph, import_name, projects, requirement_name

PROJECTS = projects()
GRAPH = graph()


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def satisfies(version: str, lower: str, upper: str) -> bool:
    return number(lower) <= number(version) < number(upper)


@pytest.mark.parametrize("package", sorted(PROJECTS))
def test_siblings_are_bounded_on_both_sides(package: str) -> None:
    requirements = [*PROJECTS[package].get("dependencies", [])]
    for extra in PROJECTS[package].get("optional-dependencies", {}).values():
        requirements += extra
    for requirement in requirements:
        sibling = requirement_name(requirement)
        if sibling in PROJECTS:
            bounds = re.fullmatch(rf"{sibling}>=([\d.]+),<([\d.]+)", requirement.replace(" ", ""))
            assert bounds, f"{requirement!r} needs a lower and an upper bound, as in '{sibling}>=0.1,<0.2'"
            assert satisfies(PROJECTS[sibling]["version"], *bounds.groups())


@pytest.mark.parametrize("package", sorted(PROJECTS))
def test_versions_are_plain_literals(package: str) -> None:
    """The next release, never .dev: a bound `>=0.1` does not admit 0.1.dev0."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECTS[package]["version"])
    assert importlib.metadata.version(package) == PROJECTS[package]["version"]


@pytest.mark.parametrize("package", sorted(PROJECTS))
def test_every_package_is_complete(package: str) -> None:
    folder = ROOT / "packages" / package
    for name in ("README.md", "CHANGELOG.md", "LICENSE", f"src/{import_name(package)}/py.typed"):
        assert (folder / name).exists(), name
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert not (folder / "tests/__init__.py").exists()
    settings = tomllib.loads((folder / "pyproject.toml").read_text())
    backend = "setuptools.build_meta" if (folder / "csrc").exists() else "uv_build"
    assert settings["build-system"]["build-backend"] == backend
    assert PROJECTS[package]["requires-python"] == ">=3.11"


def test_every_c_file_is_built_and_shipped() -> None:
    """A list in pyproject.toml is all that setuptools takes."""
    folder = ROOT / "packages/zs-offload-aio"
    extension = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    assert extension["sources"] == sorted(f"csrc/{path.name}" for path in folder.glob("csrc/*.c"))
    assert extension["depends"] == sorted(f"csrc/{path.name}" for path in folder.glob("csrc/*.h"))


def test_test_files_have_unique_names() -> None:
    """pytest's importlib mode would cope; a reader of its report would not."""
    names = [path.name for path in [*ROOT.glob("packages/*/tests/test_*.py"), *ROOT.glob("tests/*/test_*.py")]]
    assert sorted(names) == sorted(set(names))


def test_readme_table_is_the_graph() -> None:
    """Rows of the form `| `zs-zero` | zs-comm | ... |` in the root README name each package's siblings."""
    rows = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        name = re.search(r"zs-[a-z-]+", cells[0])
        if line.strip().startswith("|") and name and len(cells) > 1:
            rows.setdefault(name.group(), set(re.findall(r"zs-[a-z]+(?:-[a-z]+)*", cells[1])))
    assert rows == {package: set(needs) for package, needs in GRAPH.items()}
