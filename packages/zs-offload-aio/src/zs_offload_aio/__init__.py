"""An asynchronous file engine in C, aligned memory, block stores and fused optimizer steps on host memory.

Nothing but CPython is needed; torch, numpy and JAX are its users and are not imported here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._core import File, Ticket
from .engine import BACKENDS, Engine, backends
from .errors import (
    AioCancelled,
    AioError,
    AioExists,
    AioIsADirectory,
    AioNotADirectory,
    AioNotFound,
    AioPermission,
    BackendUnavailable,
    ShortRead,
)

if TYPE_CHECKING:
    from . import optim
    from .blobs import AioReader, AioWriter
    from .buffers import Pool
    from .handle import aio_handle
    from .store import NvmeStore

__all__ = [
    "BACKENDS",
    "AioCancelled",
    "AioError",
    "AioExists",
    "AioIsADirectory",
    "AioNotADirectory",
    "AioNotFound",
    "AioPermission",
    "AioReader",
    "AioWriter",
    "BackendUnavailable",
    "Engine",
    "File",
    "NvmeStore",
    "Pool",
    "ShortRead",
    "Ticket",
    "aio_handle",
    "backends",
    "optim",
]

_LATER = {  # imported with their first use
    "AioReader": "blobs",
    "AioWriter": "blobs",
    "NvmeStore": "store",
    "Pool": "buffers",
    "aio_handle": "handle",
}


def __getattr__(name: str) -> object:
    if name == "optim":
        return import_module(".optim", __name__)
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
