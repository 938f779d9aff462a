"""No path of a machine that somebody worked on gets into the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from workspace import ROOT

# Written as classes of one letter so that this file does not match itself.
MACHINE_PATHS = re.compile(r"(?<![\w.}\])/-])/(?:[o]pt|[w]ork|[r]oot|[h]ome)/")
SKIPPED = {".git", ".nox", "dist", "build", "__pycache__", ".hypothesis"}
TEXT = {".py", ".md", ".toml", ".json", ".txt", ".pyi", ".yml", ".yaml", ".cfg", ".ini", ".sh", ""}


def files(folder: Path = ROOT) -> Iterator[Path]:
    if (folder / "pyvenv.cfg").exists():  # somebody's virtual environment, whatever its name
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in SKIPPED and not path.name.endswith("_cache"):
                yield from files(path)
        elif path.suffix in TEXT and path.name not in (".git", "uv.lock"):
            yield path


def test_no_machine_paths() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found


def test_the_pattern_matches_paths_and_not_addresses() -> None:
    assert MACHINE_PATHS.search("see /" + "opt/thing")
    assert not MACHINE_PATHS.search("https://example.org/" + "home/page")
