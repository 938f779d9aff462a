"""Packages are released one at a time: a patch of one changes no other wheel, and every combination still resolves."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from workspace import ROOT, closure, combinations, graph, projects

GRAPH = graph()
EPOCH = "1767225600"
Uv = Callable[..., str]


def torch_requirement() -> str:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return str(groups["torch"][0])


def copy_tree(folder: Path) -> Path:
    """What the wheels are built from, and nothing else."""
    folder.mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    ignore = shutil.ignore_patterns("tests", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT / "packages", folder / "packages", ignore=ignore)
    for source in folder.glob("packages/*/csrc/*.c"):
        source.write_text("")  # to compile it takes long, and tests/tools/test_wheel.py does it
    return folder


def build(uv: Uv, tree: Path) -> dict[str, str]:
    """Hash of each wheel's bytes, by package."""
    out = tree / "dist"
    env = {"SOURCE_DATE_EPOCH": EPOCH, "UV_FIND_LINKS": None}
    uv("build", "--all-packages", "--wheel", "--no-sources", "-q", "-o", str(out), cwd=tree, env=env)
    wheels = {path.name.split("-")[0].replace("_", "-"): path for path in out.glob("*.whl")}
    return {package: hashlib.sha256(path.read_bytes()).hexdigest() for package, path in wheels.items()}


def bump_patch(tree: Path, package: str) -> None:
    path = tree / "packages" / package / "pyproject.toml"
    text, count = re.subn(
        r'^version = "(\d+\.\d+)\.(\d+)"',
        lambda match: f'version = "{match[1]}.{int(match[2]) + 1}"',
        path.read_text(),
        flags=re.MULTILINE,
    )
    assert count == 1
    path.write_text(text)


@pytest.fixture(scope="module")
def before(uv: Uv, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    tree = copy_tree(tmp_path_factory.mktemp("before") / "tree")
    return tree, build(uv, tree)


def find_links(*folders: Path) -> dict[str, str | None]:
    extra = os.environ.get("PIP_FIND_LINKS", "").split()
    return {"UV_FIND_LINKS": ",".join([*map(str, folders), *extra])}


@pytest.mark.parametrize("bumped", sorted(GRAPH))
def test_a_patch_of_one_package_touches_no_other(
    bumped: str, uv: Uv, before: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    wheels = before[1]
    tree = copy_tree(tmp_path / "after")
    bump_patch(tree, bumped)
    after = build(uv, tree)
    assert set(wheels) == set(after) == set(GRAPH)
    assert {package for package in GRAPH if wheels[package] != after[package]} == {bumped}

    versions = {package: table["version"] for package, table in projects(tree).items()}
    for names in combinations(GRAPH).values():
        wanted = "\n".join([*names, torch_requirement()])
        lines = uv(
            *("pip", "compile", "--no-header", "--no-annotate", "-q", "-"),
            cwd=tmp_path,
            env=find_links(tree / "dist"),
            stdin=wanted,
        )
        found = dict(line.split("==") for line in lines.splitlines() if line.startswith("zs-"))
        assert found == {package: versions[package] for package in closure(names, GRAPH)}


@pytest.mark.parametrize("with_folder", [True, False], ids=["with-PIP_FIND_LINKS", "without"])
def test_everything_resolves_to_a_torch(
    with_folder: bool, uv: Uv, before: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Resolving is all that is done without a folder of wheels: what it names may be gigabytes."""
    if with_folder and not os.environ.get("PIP_FIND_LINKS"):
        pytest.skip("PIP_FIND_LINKS names no folder here")
    tree = before[0]
    env = find_links(tree / "dist") if with_folder else {"UV_FIND_LINKS": str(tree / "dist"), "PIP_FIND_LINKS": None}
    uv("venv", "-q", "empty", cwd=tmp_path)
    python = str(tmp_path / "empty")
    plan = uv("pip", "install", "--dry-run", "--python", python, *GRAPH, torch_requirement(), cwd=tmp_path, env=env)
    assert re.search(r"^ \+ torch==2\.\d+", plan, re.MULTILINE), plan
    assert set(re.findall(r"^ \+ (zs-[a-z-]+)==", plan, re.MULTILINE)) == set(GRAPH)
