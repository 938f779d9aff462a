"""A power cut during a save, which loses what no fsync covers, leaves the old checkpoint or the new one."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from torture import drive, ours, peers, replay, systems

VARIANTS = 120
ZS = ours.Zs()
SCENARIOS = [scenario.name for scenario in ZS.scenarios]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed save of every scenario, recorded."""
    return recorded(tmp_path_factory.mktemp("logs"), ZS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_survives_a_power_cut_loads(logs: Path, tmp_path: Path, name: str) -> None:
    first = next(scenario.first for scenario in ZS.scenarios if scenario.name == name)
    assert wrong(logs / name, tmp_path, ZS, first) == []


@pytest.mark.parametrize(("system", "tears"), [(peers.TorchSaveRenamed, False), (peers.TorchSaveNotSynced, True)])
def test_the_replay_sees_what_is_not_synced(tmp_path: Path, system: type[systems.System], tears: bool) -> None:
    log = recorded(tmp_path, system()) / peers.SAME.name
    assert bool(wrong(log, tmp_path, system())) is tears


def wrong(log: Path, folder: Path, system: systems.System, first: bool = False) -> list[str]:
    """Cut the power at a recorded save's operations, and say where something else than old or new was loaded."""
    ops = replay.read_logs(sorted(log.glob("log[0-9]")), Path((log / "root").read_text()))
    old = -1 if first else system.load(log / "before")
    new = system.load(log / "after")
    assert new == old + 1 or first
    disk, bad = replay.Disk(log / "before"), []
    commit = next(
        at for at, op in enumerate(ops) if op.kind == "rename" and os.path.basename(op.other) == system.commit
    )
    draw, done = random.Random(log.name), 0
    cuts = sorted([len(ops), commit, commit + 1, *draw.choices(range(len(ops) + 1), k=VARIANTS - 3)])
    for number, cut in enumerate(cuts):
        for op in ops[done:cut]:
            disk.apply(op)
        done = cut
        found = loaded(system, disk.after_power_cut(draw if number % 8 else None), folder / "cut")
        allowed = {new} if cut == len(ops) else {old} if cut <= commit else {old, new}
        if found not in allowed:
            bad.append(f"{found}, not {allowed}, when {cut} of {len(ops)} operations were done")
    assert disk.as_it_is() == replay.on_disk(log / "after")  # the log has every operation
    return bad


def recorded(folder: Path, system: systems.System) -> Path:
    """A folder with `before`, `after` and the operations between the two, by scenario."""
    out = folder / "log"
    assert drive.start(["log", "--system", system.name, "--folder", str(folder), "--out", str(out)]) == 0
    return out


def loaded(system: systems.System, content: dict[str, bytes | None], folder: Path) -> int | str:
    shutil.rmtree(folder, ignore_errors=True)
    replay.make(content, folder)
    try:
        return system.load(folder)
    except systems.Nothing:
        return -1
    except Exception as error:
        return f"{type(error).__name__}: {error}"
