"""Saving beside the training: one copy to host memory in the call, everything else in a thread.

    training    save(): agree, copy   | step  step  step  step | save(): waits where the last is not done, then agrees
    thread                            | write, checksums, sync, commit |

The thread runs at a lower priority, where the platform has such a thing for threads, and rests between its pieces of
work, so that the steps beside it have the processors; when somebody waits for it, it hurries. There is at most one: the
next save waits for it. What goes wrong in it is logged at once and raised by the next call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .saving import Saved

_NICE = 10
_REST = 3.0  # of the time that was worked before
_log = logging.getLogger("zs_ckpt")


class Pending:
    """A save that goes on in the background."""

    def __init__(self, work: Callable[[Callable[[float], None]], Saved], what: str) -> None:
        self._work, self._what, self._hurry = work, what, threading.Event()
        self._saved: Saved | None = None
        self._error: BaseException | None = None
        # not a daemon: a program that ends waits until its last checkpoint is written
        self._thread = threading.Thread(target=self._run, name=f"zs-ckpt save {what}", daemon=False)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Has it ended, well or not?"""
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What went wrong; None as long as nothing has."""
        return self._error

    def wait(self, timeout_s: float | None = None) -> Saved:
        """The committed checkpoint, once it is.

        Raises:
            TimeoutError: it takes longer; it goes on.
            Exception: what went wrong, on this rank or another.
        """
        self._hurry.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the save of {self._what} takes longer than {timeout_s:g} s")
        if self._saved is None:
            raise self._error or RuntimeError(f"the save of {self._what} has ended without a word")
        return self._saved

    def _run(self) -> None:
        lower_priority()
        try:
            self._saved = self._work(self._rest)
        except BaseException as error:
            self._error = error
            _log.exception("the save of %s in the background failed", self._what)

    def _rest(self, seconds: float) -> None:
        """After `seconds` of work."""
        self._hurry.wait(_REST * seconds)


def lower_priority() -> None:
    """Let the calling thread, and those it starts, take what processor time the others leave."""
    if sys.platform == "linux":  # elsewhere the priority is the whole process's
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
