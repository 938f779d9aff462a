"""How many bytes a buffer has, asked before anything is issued for it."""

from __future__ import annotations

from typing import Any


def nbytes_of(buf: Any, *, writable: bool = False) -> int:
    """Bytes of a contiguous buffer, or of an array that `adapters` knows how to take (it checks those itself).

    Raises `TypeError` where it is none, or read-only although `writable`; `BufferError` where it is strided.
    """
    try:
        view = memoryview(buf)
    except (TypeError, ValueError, BufferError):  # a torch tensor; a numpy dtype without a format, bfloat16 say
        nbytes = getattr(buf, "nbytes", None)
        if isinstance(nbytes, int):
            return nbytes
        raise TypeError(f"a buffer is needed, not {type(buf).__name__}") from None
    if not view.c_contiguous:
        raise BufferError("only contiguous memory is moved: copy the view first")
    if writable and view.readonly:
        raise TypeError("cannot read into read-only memory")
    return view.nbytes
