"""The same work in several threads. No executor: those refuse work while the interpreter ends, and a save may go on."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_threads(work: Callable[[], None], count: int, name: str) -> None:
    """Call `work` in `count` threads, and return when all have ended; raises the first error."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, name=name, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
