"""A training is saved in one tier and goes on in another, at another stage, on another number of ranks, bit for bit.

Saves come in the middle of the training and of a window; the numbers to meet are those of a run in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_ckpt
from workspace import ROOT
from zs_comm import Group
from zs_comm.testing import run_ranks

REQUIRES = {"zs-comm", "zs-zero", "zs-ckpt"}

sys.path.insert(0, str(ROOT / "packages" / "zs-zero" / "tests"))

from tier_runs import B16, F32, How, Training, differences, policy  # noqa: E402

HOW = How(micros=2, clip="in step", groups=True)
Place = tuple[str, int, int]  # policy, stage, ranks


def opened(group: Group, how: How, where: Place, folder: Path) -> Training:
    return Training(group, how, stage=where[1], **policy(where[0], folder))


def state_of(training: Training) -> dict[str, Any]:
    return {"model": training.model, "optimizer": training.optimizer}


def go_on(training: Training) -> dict[str, Any]:
    """Ends the open window, steps once more."""
    training.losses = []
    training.micro(2, 1)
    training.update()
    training.steps(3, 4)
    return {name: value for name, value in training.result().items() if not name.startswith("exact ")}


def saved(group: Group, how: How, where: Place, folder: Path, asynchronous: bool) -> dict[str, Any]:
    training = opened(group, how, where, folder).steps(0, 2)
    training.micro(2, 0)
    kept = zs_ckpt.save(folder / "run", state_of(training), group=group, asynchronous=asynchronous)
    result = go_on(training)  # while it is being written
    if asynchronous:
        kept.wait()  # type: ignore[union-attr]
    return result


def loaded(group: Group, how: How, where: Place, folder: Path) -> dict[str, Any]:
    training = opened(group, how, where, folder)
    if where[1] % 2:  # into one that has trained
        training.steps(7, 8)
        training.micro(8, 0)
    zs_ckpt.load(folder / "run", state_of(training), group=group)
    return go_on(training)


FROM: list[Place] = [("everything", 3, 2), ("half of the states", 1, 2), ("parameters", 3, 1), ("gradients", 2, 1)]


@pytest.mark.parametrize("dtype", [F32, pytest.param(B16, marks=pytest.mark.matrix)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("where", FROM, ids=lambda place: f"{place[0]}, stage {place[1]}, {place[2]} ranks")
def test_in_another_tier(where: Place, dtype: torch.dtype, tmp_path: Path) -> None:
    how = How(dtype=dtype, micros=2, clip="in step", groups=True)
    world = where[2]
    memory = tmp_path / "memory"
    memory.mkdir()
    wanted = run_ranks(saved, world, how, ("memory", where[1], world), memory, False)
    found = run_ranks(saved, world, how, where, tmp_path, dtype == B16)
    lines = [line for a, b in zip(found, wanted, strict=True) for line in differences("saving", a, b)]
    for to in (("memory", where[1]), ("everything", 3), ("some parameters", 3), ("states", where[1])):
        results = run_ranks(loaded, world, how, (*to, world), tmp_path)
        meant = wanted  # the uninterrupted run; another stage adds up the gradients of a window in another order
        if to[1] != where[1]:
            meant = run_ranks(loaded, world, how, ("memory", to[1], world), memory)
        for here, there in zip(results, meant, strict=True):
            lines += differences(f"{to} of {world}", here, there)
    other = 3 - world
    reference = run_ranks(loaded, other, how, ("memory", 3, other), memory)
    for name in ("parameters", "everything"):
        results = run_ranks(loaded, other, how, (name, 3, other), tmp_path)
        for here, there in zip(results, reference, strict=True):
            lines += differences(f"{name} of {other}", here, there)
    assert not lines, f"{len(lines)} differences\n" + "\n".join(sorted(lines)[:40])
