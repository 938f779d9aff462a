"""The cyclic garbage collector, out of the way while many small objects come to stay."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_was_enabled = False


@contextmanager
def paused() -> Iterator[None]:
    """No collection inside, in any thread; for tens of milliseconds at the most.

    A checkpoint's entries are a few thousand objects without a cycle. Making them sets off collections of everything
    there is, and with torch imported one takes 20 ms: as much as all the rest of it.
    """
    global _inside, _was_enabled
    with _lock:
        if not _inside:
            _was_enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _was_enabled:
                gc.enable()
