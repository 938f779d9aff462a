"""Groups of ranks along named mesh axes, and collectives that are exact, bounded in time, and free at size 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .agree import agree, agreed, same_everywhere
from .collectives import all_gather, all_to_all, broadcast, scatter
from .errors import CommError, CommTimeout, ConfigError, MissingPackage, PeerLost, RankDisagreement, ZsError
from .exchange import barrier, exchange
from .group import Group, as_group
from .launch import RankEnv, discover, init_distributed, shutdown
from .mesh import Mesh
from .observe import CollectiveLog, Observer, Observers
from .reduce import all_reduce, reduce_scatter
from .work import Work

if TYPE_CHECKING:
    from .config import Section, validate
    from .memory import MemorySummary, memory_summary

__all__ = [
    "CollectiveLog",
    "CommError",
    "CommTimeout",
    "ConfigError",
    "Group",
    "MemorySummary",
    "Mesh",
    "MissingPackage",
    "Observer",
    "Observers",
    "PeerLost",
    "RankDisagreement",
    "RankEnv",
    "Section",
    "Work",
    "ZsError",
    "agree",
    "agreed",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "as_group",
    "barrier",
    "broadcast",
    "discover",
    "exchange",
    "init_distributed",
    "memory_summary",
    "reduce_scatter",
    "same_everywhere",
    "scatter",
    "shutdown",
    "validate",
]

_LAZY = {"Section": "config", "validate": "config", "MemorySummary": "memory", "memory_summary": "memory"}


def __getattr__(name: str) -> Any:
    # pydantic costs 0.1 s at import: only those who read a configuration pay for it
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
