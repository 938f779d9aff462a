"""Forked children: what they answer, how they end."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

HANG_S = 60.0
_STATUS: dict[int, int] = {}


def in_child(work: Callable[[], Any], timeout_s: float = HANG_S) -> Any:
    """What `work` returns, as JSON knows it, in a forked child. Raises `RuntimeError` with its traceback."""
    with tempfile.TemporaryFile() as answer:
        pid = os.fork()
        if pid == 0:
            try:
                text = json.dumps({"value": work()})
            except BaseException:
                text = json.dumps({"error": traceback.format_exc()})
            os.pwrite(answer.fileno(), text.encode(), 0)
            os._exit(0)
        status = wait(pid, timeout_s)
        if status is None:
            kill(pid)
            wait(pid, HANG_S)
        answer.seek(0)
        found = json.loads(answer.read() or b"{}")
    if "value" not in found:
        raise RuntimeError(found.get("error", f"a child ended with status {status}"))
    return found["value"]


def keep_status(pid: int, status: int) -> None:
    """What another wait for this child found."""
    _STATUS[pid] = status


def ended(pid: int) -> int | None:
    if pid not in _STATUS:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        _STATUS[pid] = status
    return _STATUS[pid]


def wait(pid: int, timeout_s: float) -> int | None:
    """The child's status; None where it has not ended in time."""
    deadline, pause = time.monotonic() + timeout_s, 0.0002
    while ended(pid) is None:
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.005)
    return _STATUS.pop(pid)


def kill(pid: int) -> None:
    if ended(pid) is None:
        os.kill(pid, signal.SIGKILL)
