"""The same work in several threads. No executor: those refuse work while the interpreter ends, and a save may go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def processors() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def in_threads(work: Callable[[], None], count: int, name: str, *, meanwhile: Callable[[], None] | None = None) -> None:
    """Call `work` in `count` threads, and return when all have ended; raises the first error.

    `meanwhile` is called in this one.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, name=name, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        if meanwhile is not None:
            meanwhile()
    finally:
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
