"""Buffers that one thread fills and another one, a writer's, takes: the next is filled while the last is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from .blob import Ticket, wait_for

_LOOK_S = 0.05  # how often to see whether the writer has ended without asking


def hand_over(source: Iterator[memoryview], start: Callable[[Iterator[memoryview]], Ticket]) -> None:
    """Write what `source` gives: `start` begins the writing of an iterator, and its ticket ends it.

    `source` runs in this thread. A buffer may be filled again when the second one after it is asked for. Raises what
    `source` or the writer raises, when the writer has ended.
    """
    link = _Link()
    ticket = start(link.taken())
    try:
        for view in source:
            if not link.give(view, ticket):
                break
        link.give(None, ticket)
    except BaseException:
        link.stop()
        with suppress(Exception):
            wait_for(ticket)
        raise
    wait_for(ticket)


class _Link:
    """One buffer at a time: it is written when the next one is asked for."""

    def __init__(self) -> None:
        self._asked, self._given = threading.Semaphore(0), threading.Semaphore(0)
        self._view: memoryview | None = None
        self._stopped = False

    def give(self, view: memoryview | None, ticket: Ticket) -> bool:
        """Hand `view` over once it is asked for, None for the end. False where the writer has ended before."""
        while not self._asked.acquire(timeout=_LOOK_S):
            if ticket.done:
                return False
        self._view = view
        self._given.release()
        return True

    def stop(self) -> None:
        """Let the writer end, and not well, whatever has been handed over."""
        self._stopped = True
        self._given.release()

    def taken(self) -> Iterator[memoryview]:
        while True:
            self._asked.release()
            self._given.acquire()
            if self._stopped:
                raise RuntimeError("what was to be written could not be had")
            if self._view is None:
                return
            yield self._view
