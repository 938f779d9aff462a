"""One rank's disk fails in the middle of a step: all ranks raise, at once, and all are as they were before it."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import Group, Mesh, RankDisagreement
from zs_comm.testing import run_ranks
from zs_zero.testing import Fault

sys.path.insert(0, str(Path(__file__).parent))

from tier_fault_runs import LAYOUTS, LEAST, Training, differing, model, reference, survive, windows

KINDS = {"everything": 9, "states": 2, "half of the states, parameters": 5}  # kinds of transfers in a window


def survive_all(group: Group, folder: str, name: str, failing: int) -> tuple[int, list[str]]:
    """How many kinds of transfers there were, and what was wrong."""
    layout, wrong = LAYOUTS[name], list[str]()
    expected = reference(folder, group, layout, windows(LEAST))
    for where in expected.calls[-1]:
        for line in survive(folder, group, layout, where, failing=failing, expected=expected, ways=LEAST):
            wrong.append(f"rank {group.rank}, {' '.join(where)}: {line}")
        if wrong:
            break
    return len(expected.calls[-1]), wrong


@pytest.mark.parametrize(("name", "failing"), [("everything", 1), ("states", 0), ("half of the states, parameters", 0)])
def test_a_fault_of_one_rank(name: str, failing: int, tmp_path: Path) -> None:
    for count, wrong in run_ranks(survive_all, 2, str(tmp_path), name, failing, timeout_s=120):
        assert wrong == []
        assert count == KINDS[name]


def started(group: Group, folder: str, op: str, kind: str, layout: str) -> tuple[str, str, float, list[str]]:
    """`shard` with a disk that fails on rank 1: the error, its text, seconds, and what is wrong with the model."""
    probe = Training(folder, group, LAYOUTS[layout])
    number = probe.stores[kind].count(op) // 2  # type: ignore[arg-type]
    probe.close()
    fault = Fault(op=op, number=number, error=errno.ENOSPC)  # type: ignore[arg-type]
    net = model()
    began = time.monotonic()
    try:
        Training(folder, group, LAYOUTS[layout], net=net, faults={kind: fault} if group.rank == 1 else None)
    except (OSError, RankDisagreement) as error:
        return (
            type(error).__name__,
            str(error),
            time.monotonic() - began,
            differing(net.state_dict(), model().state_dict()),
        )
    return "none", "", 0.0, []


@pytest.mark.parametrize("kind", ["parameters", "optimizer"])
@pytest.mark.parametrize("op", ["reserve", "write"])
def test_one_rank_cannot_begin(op: str, kind: str, tmp_path: Path) -> None:
    layout = "compensated" if kind == "optimizer" and op == "write" else "everything, fp32"
    found = run_ranks(started, 2, str(tmp_path), op, kind, layout)
    assert [name for name, *_ in found] == ["RankDisagreement", "OSError"]
    for _, text, seconds, lines in found:
        assert f"{kind}.blocks" in text and "offset" in text and "No space" in text
        assert seconds < 2.0
        assert lines == [] or layout == "compensated", "of another dtype by then"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def vanished(group: Group, folder: str) -> list[str]:
    layout, path = LAYOUTS["everything"], Path(folder) / "disk"
    known = reference(folder, group, layout, 3)
    training, lines = Training(path, group, layout), list[str]()
    for window in range(3):
        if window == 1 and group.rank == 0:
            shutil.rmtree(path)
        training.window(window)
        lines += differing(training.state(), known.states[window + 1])
    training.optimizer.close()
    return lines


def test_a_folder_vanishes(tmp_path: Path) -> None:
    assert run_ranks(vanished, 2, str(tmp_path)) == [[], []]


def asked_for(group: Group, folder: str) -> list[tuple[str, str, float, str]]:
    """What every rank hears when one cannot read what the user asks for."""
    found = []
    training = Training(folder, group, LAYOUTS["everything"])
    training.window(0)
    param = next(training.model.parameters())
    asks: dict[str, Callable[[], object]] = {
        "full_param": lambda: training.optimizer.full_param(param),
        "full_state": lambda: training.optimizer.full_state(param, "exp_avg"),
        "full_state_dict": lambda: zs_zero.full_state_dict(training.model),
        "set_full_param": lambda: training.optimizer.set_full_param(param, torch.zeros(24, 12)),
        "masters": lambda: zs_zero.full_state_dict(training.model, masters=True),
    }
    for name, ask in asks.items():
        if group.rank == 1:
            for store in training.stores.values():
                store.faults[:] = [Fault(op="read", number=store.count("read"))]
        began = time.monotonic()
        try:
            ask()
        except Exception as error:
            found.append((name, type(error).__name__, time.monotonic() - began, str(error)))
        else:
            found.append((name, "none", 0.0, ""))
        training.lift()
    training.close()
    return found


def test_what_one_rank_cannot_read_is_an_error_on_all(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(asked_for, 2, str(tmp_path))):
        for name, error, seconds, text in found:
            assert error == ("RankDisagreement", "OSError")[rank], name
            assert ".blocks" in text and "offset" in text, name
            assert seconds < 2.0, name


def read_by_a_replica(group: Group, folder: str) -> tuple[str, str, float]:
    """Two ranks that each hold all of the parameters in files of their own; those of rank 1 cannot be read."""
    mesh = Mesh.build(world=group, replicate=2)
    training = Training(folder, group, LAYOUTS["everything"], mesh=mesh)
    training.window(0)
    if group.rank == 1:
        store = training.stores["parameters"]
        store.faults[:] = [Fault(op="read", number=store.count("read"))]
    began = time.monotonic()
    try:
        training.backward(1)
    except (OSError, RankDisagreement) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    finally:
        training.optimizer.close(parameters=False)
    return "none", "", 0.0


def test_a_replica_is_told_of_a_read(tmp_path: Path) -> None:
    found = run_ranks(read_by_a_replica, 2, str(tmp_path))
    assert [name for name, _, _ in found] == ["RankDisagreement", "OSError"]
    for _, text, seconds in found:
        assert "parameters.blocks" in text and "offset" in text
        assert seconds < 2.0


class Breaks(torch.optim.SGD):
    """An element-wise optimizer that raises when it is told to."""

    __zs_requires__ = "elements"
    broken = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.broken:
            raise ArithmeticError("no more")
        return super().step(closure)


def breaks(group: Group, folder: str) -> tuple[str, str, float, str]:
    """The update of what is resident raises on rank 1, after the files were switched."""
    net = model()
    client = Breaks(net.parameters(), lr=0.1, momentum=0.9)
    policy = {"device": "nvme", "nvme_path": folder, "zs_block_numel": 64, "ratio": 0.5}
    optimizer = zs_zero.shard(net, client, stage=2, mesh=group, units=[nn.Linear], offload_optimizer=policy)
    report = optimizer.offload_report()
    assert 0.0 < report.resident < 1.0
    net(torch.ones(2, 12)).square().mean().backward()
    plain, began = client.step, time.monotonic()
    taken = 0

    def step() -> object:
        nonlocal taken
        taken += 1
        client.broken = group.rank == 1 and taken > streamed
        return plain()

    blocks = [block for flat in optimizer._tiers.plan.flats for block in flat.blocks]  # type: ignore[union-attr]
    streamed = sum(not block.resident for block in blocks)
    client.step = step  # type: ignore[method-assign, assignment]
    try:
        optimizer.step()
    except (ArithmeticError, RankDisagreement) as error:
        first = type(error).__name__, str(error), time.monotonic() - began
    try:
        optimizer.step()
    except zs_zero.TornError as error:
        return *first, type(error).__name__
    return *first, "none"


def test_an_update_that_raises_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    found = run_ranks(breaks, 2, str(tmp_path))
    assert [name for name, *_ in found] == ["RankDisagreement", "ArithmeticError"]
    for _, text, seconds, after in found:
        assert "no more" in text and seconds < 2.0
        assert after == "TornError"
