"""Training checkpoints: checksummed, crash-safe, free of pickle, loading at any world size and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointBusy, CheckpointCorrupt, CheckpointIncomplete, UnknownVersion

if TYPE_CHECKING:
    from .background import Pending
    from .checkpointer import Checkpointer
    from .dcp import export_dcp, import_dcp
    from .deepspeed import DeepSpeedCheckpoint, open_deepspeed
    from .exporting import export, write_sharded
    from .importing import import_deepspeed
    from .loader import DataLoader
    from .loading import Loaded, load, read
    from .position import DataPosition
    from .rng import RandomState
    from .saving import Saved, save
    from .shardable import LazyPiece, Piece, Shardable, Source, TensorSpec
    from .snapshot import Snapshot
    from .unpickler import PickleRefused
    from .verifying import Report, tags, verify

__all__ = [
    "CheckpointBusy",
    "CheckpointCorrupt",
    "CheckpointIncomplete",
    "Checkpointer",
    "DataLoader",
    "DataPosition",
    "DeepSpeedCheckpoint",
    "LazyPiece",
    "Loaded",
    "Pending",
    "PickleRefused",
    "Piece",
    "RandomState",
    "Report",
    "Saved",
    "Shardable",
    "Snapshot",
    "Source",
    "TensorSpec",
    "UnknownVersion",
    "export",
    "export_dcp",
    "import_dcp",
    "import_deepspeed",
    "load",
    "open_deepspeed",
    "read",
    "save",
    "tags",
    "verify",
    "write_sharded",
]

_LAZY = {
    "Checkpointer": "checkpointer",
    "DataLoader": "loader",
    "DataPosition": "position",
    "DeepSpeedCheckpoint": "deepspeed",
    "LazyPiece": "shardable",
    "Loaded": "loading",
    "Pending": "background",
    "PickleRefused": "unpickler",
    "Piece": "shardable",
    "RandomState": "rng",
    "Report": "verifying",
    "Saved": "saving",
    "Shardable": "shardable",
    "Snapshot": "snapshot",
    "Source": "shardable",
    "TensorSpec": "shardable",
    "export": "exporting",
    "export_dcp": "dcp",
    "import_dcp": "dcp",
    "import_deepspeed": "importing",
    "load": "loading",
    "open_deepspeed": "deepspeed",
    "read": "loading",
    "save": "saving",
    "tags": "verifying",
    "verify": "verifying",
    "write_sharded": "exporting",
}


def __getattr__(name: str) -> Any:
    # only those who save or load pay for importing what it takes
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
