"""Row 31: whatever the names of a store's blocks are, they are names and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults_memory import pattern
from zs_offload_aio import Engine, NvmeStore

HOSTILE = [
    "../outside",
    "../../../../../../tmp/zs-outside",
    "/absolute",
    "/tmp/zs-absolute",
    "a/b",
    "a//b",
    "./a",
    ".",
    "..",
    "",
    " ",
    "n" * 300,
    "n" * 5000,
    "nul\0inside",
    "nul",
    "Case",
    "case",
    "CON",
    "new\nline",
    "~",
    "$HOME",
    "%2e%2e%2f",
    "combined \u00e9",
    "combined e\u0301",
    "snow ☃",
    "surrogate \udcff",
    "-rf",
    "*",
]


@pytest.mark.row(31)
@pytest.mark.parametrize("keep", [False, True])
def test_hostile_names(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """Each has a block of its own, and nothing appears in the file system but the store's own file."""
    folder = tmp_path / "store"
    folder.mkdir()
    monkeypatch.chdir(folder)
    store = NvmeStore(folder, engine=engine, keep=keep)
    store.reserve({name: 1000 + number for number, name in enumerate(HOSTILE)})
    for number, name in enumerate(HOSTILE):
        store.write(name, pattern(1000 + number, seed=number)).wait()
    for number, name in reversed(list(enumerate(HOSTILE))):
        target = bytearray(1000 + number)
        assert store.read(name, target).wait() == 1000 + number
        assert target == pattern(1000 + number, seed=number), name
    assert len(list(folder.iterdir())) == (1 if keep else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    for name in ("../outside", "n" * 300, "."):
        store.discard(name)
        with pytest.raises(KeyError):
            store.read(name, bytearray(1000))
    store.close()
    assert not os.path.exists("/tmp/zs-outside") and not os.path.exists("/tmp/zs-absolute")


@pytest.mark.row(31)
def test_unknown_names_are_refused(engine: Engine, tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, engine=engine)
    store.reserve({"Case": 4096})
    store.write("Case", bytes(4096)).wait()
    for name in ("case", "Case ", "./Case", "Case\0", "../Case", "*"):
        with pytest.raises(KeyError):
            store.read(name, bytearray(4096))
        with pytest.raises(KeyError):
            store.write(name, bytes(4096))
        store.discard(name)
    target = bytearray(b"x" * 4096)
    assert store.read("Case", target).wait() == 4096 and target.count(0) == 4096
    store.close()
