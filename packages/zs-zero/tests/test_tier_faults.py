"""A disk that fails in the middle of a step: the step happened or it did not, and training goes on with the same bits.

Every kind of transfer of a step fails at its first, a middle and its last block, in every way a store can fail.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from zs_comm import Group
from zs_zero.testing import Fault

sys.path.insert(0, str(Path(__file__).parent))

from tier_fault_runs import FEW, LAYOUTS, WAYS, Reference, Training, Way, differing, reference, survive, windows

# what a window of each layout moves: (phase, kind, operation)
READS = [("forward", "parameters", "read"), ("backward", "parameters", "read")]
STATES = [("step", "optimizer", "read"), ("step", "optimizer", "write")]
GRADS = [("backward", "gradients", "write"), ("step", "gradients", "read")]
WRITES = [("step", "parameters", "write")]
MOVES = {
    "everything": [*READS, ("backward", "gradients", "read"), *GRADS, *STATES, *WRITES],
    "everything, fp32": [*READS, *GRADS, *STATES, *WRITES, ("step", "parameters", "read")],
    "states": STATES,
    "half of the states": STATES,
    "states and gradients": [*GRADS, *STATES],
    "parameters": [*READS, *WRITES],
    "half of the states, parameters": [*READS, *STATES, *WRITES],
    "8 bits": [*STATES, *WRITES],
    "early": [("backward", "optimizer", "read"), ("backward", "optimizer", "write")],
    "early, everything": [
        ("backward", "gradients", "write"),
        ("backward", "gradients", "read"),
        ("backward", "optimizer", "read"),
        ("backward", "optimizer", "write"),
        ("backward", "parameters", "write"),
    ],
    "compensated": [*STATES, *WRITES, ("step", "parameters", "read")],
}
CASES = [pytest.param(name, where, id=f"{name}-{' '.join(where)}") for name in MOVES for where in MOVES[name]]


@functools.cache
def expected(name: str) -> Reference:
    with tempfile.TemporaryDirectory() as folder:
        return reference(folder, Group.single(), LAYOUTS[name], windows(ways(name)))


def ways(name: str) -> list[Way]:
    return WAYS if name.startswith("everything") else FEW


@pytest.mark.parametrize("name", MOVES)
def test_these_are_all(name: str) -> None:
    moved = set(expected(name).calls[-1])
    assert set(MOVES[name]) <= moved
    assert moved - set(MOVES[name]) <= set(READS), "covered by another layout"


@pytest.mark.parametrize(("name", "where"), CASES)
def test_a_fault(name: str, where: tuple[str, str, str], tmp_path: Path) -> None:
    assert survive(tmp_path, Group.single(), LAYOUTS[name], where, expected=expected(name), ways=ways(name)) == []


def two_windows(folder: Path, name: str) -> tuple[Training, Reference]:
    known = reference(folder, Group.single(), LAYOUTS[name], 4)
    training = Training(folder, Group.single(), LAYOUTS[name])
    training.window(0)
    training.window(1)
    return training, known


def check_goes_on(training: Training, known: Reference) -> None:
    """The state is that before window 2, and the windows to come are the reference's."""
    assert differing(training.state(), known.states[2]) == []
    for window in (2, 3):
        training.window(window)
        assert differing(training.state(), known.states[window + 1]) == []
    training.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [0, 4, 8])
@pytest.mark.parametrize("name", ["everything", "states and gradients", "parameters", "early"])
def test_the_clients_optimizer_raises(name: str, number: int, error: type[BaseException], tmp_path: Path) -> None:
    """In the middle of a sweep, or somebody presses Ctrl-C."""
    training, known = two_windows(tmp_path, name)
    client, calls = training.optimizer.inner, list[int]()
    assert client is not None
    step = client.step

    def raising(*args: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] == number:
            raise error("in the middle")
        return step(*args)

    with mock.patch.object(client, "step", raising), pytest.raises(error, match="in the middle"):
        training.window(2)
    training.optimizer.abort_step()
    check_goes_on(training, known)


@pytest.mark.parametrize("name", ["everything", "early", "early, everything"])
@pytest.mark.parametrize("drop", ["abort_step", "zero_grad"])
def test_a_window_that_is_dropped(name: str, drop: str, tmp_path: Path) -> None:
    training, known = two_windows(tmp_path, name)
    training.backward(2, 0)
    getattr(training.optimizer, drop)()
    check_goes_on(training, known)


def test_no_transfer_is_left_behind(tmp_path: Path) -> None:
    """Of a block, one read hangs and the next is refused: the slot's memory is in use until the first one ends."""
    training, known = two_windows(tmp_path, "everything")
    store = training.stores["optimizer"]
    at = store.count("read")
    store.faults += [Fault(op="read", number=at + 3, error="hang"), Fault(op="read", number=at + 4, early=True)]
    with pytest.raises(OSError, match="Input/output error"):
        training.window(2)
    tiers = training.optimizer._tiers
    assert tiers is not None and not any(slot.tickets for slot in tiers.slots)
    store.faults.clear()
    with pytest.raises(TimeoutError, match=re.escape(store.path)):
        training.window(2)  # it still hangs
    training.lift()
    check_goes_on(training, known)


def test_a_short_read_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, known = two_windows(tmp_path, "everything")
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][: -(-len(views[0]) // 2)]], at))
    check_goes_on(training, known)


@pytest.mark.parametrize("number", [0, 20, 40])
def test_the_end_of_a_file_comes_too_soon(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, known = two_windows(tmp_path, "everything")
    read, calls = os.preadv, []

    def short(fd: int, views: list[Any], at: int) -> int:
        calls.append(at)
        return 0 if len(calls) == number + 1 else read(fd, views, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", short)
        with pytest.raises(OSError, match=r"unexpected end of file while reading \d+ bytes at offset \d+ .*\.blocks"):
            training.window(2)
    training.optimizer.abort_step()
    check_goes_on(training, known)


def test_a_disk_that_stays_broken(tmp_path: Path) -> None:
    """Every call raises, none hangs, and the model can be given up."""
    training, _ = two_windows(tmp_path, "everything")
    for kind, store in training.stores.items():
        store.faults += [Fault(op=op, number=0, count=1 << 30) for op in ("read", "write")]
        assert kind in store.path
    for _ in range(3):
        with pytest.raises(OSError, match="parameters block"):
            training.window(2)
        training.optimizer.abort_step()
    with pytest.raises(OSError, match=r"\.blocks"):
        training.optimizer.full_param(next(training.model.parameters()))
    with pytest.raises(OSError, match=r"\.blocks"):
        training.optimizer.close()
    training.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_hangs_for_good_does_not_hold_up_the_end(tmp_path: Path) -> None:
    training, _ = two_windows(tmp_path, "everything")
    for store in training.stores.values():
        store.faults += [Fault(op="read", number=0, count=1 << 30, error="hang")]
    with pytest.raises(TimeoutError):
        training.window(2)
    training.optimizer.abort_step()
    training.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
