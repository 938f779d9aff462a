"""What one rank wrote, published when its data is durable; rank 0 merges these into the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zs_comm import ConfigError

from .errors import CheckpointCorrupt
from .manifest import (
    VERSION,
    FileEntry,
    Manifest,
    Reader,
    StoredTensor,
    check_files,
    check_tiling,
    file_members,
    tensor_members,
)

FORMAT = "zs-ckpt-index"


@dataclass
class Index:
    """One rank's part of a save. `objects` and `client_state` are rank 0's."""

    save_id: str
    rank: int
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    own_tensors: dict[str, StoredTensor] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    own_objects: Mapping[str, Any] = field(default_factory=dict)
    client_state: Any = None

    def members(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "save_id": self.save_id,
            "rank": self.rank,
            "files": {name: file_members(entry) for name, entry in self.files.items()},
            "tensors": {name: tensor_members(stored) for name, stored in self.tensors.items()},
            "own_tensors": {name: tensor_members(stored) for name, stored in self.own_tensors.items()},
            "own_objects": dict(self.own_objects),
        }


def parse_index(members: Mapping[str, Any], file: Path) -> Index:
    """The index in `members`, which was read from `file`; raises CheckpointCorrupt where it is none."""
    reader = Reader(file)
    reader.check_format(members, FORMAT)
    return Index(
        reader.save_id(members),
        reader.integer(members, "rank"),
        reader.files(members),
        reader.tensors(reader.mapping(members, "tensors")),
        reader.tensors(reader.mapping(members, "own_tensors")),
        own_objects=reader.mapping(members, "own_objects"),
    )


def merge(indexes: Sequence[Index], *, tag: str, serial: int, step: int | None, file: Path) -> Manifest:
    """The manifest of what all ranks wrote; `indexes` in the order of ranks.

    Raises:
        ConfigError: two ranks have a tensor with different shapes or dtypes, or their pieces of one leave a hole or
            overlap: what the ranks hold is not one state.
    """
    tensors: dict[str, StoredTensor] = {}
    for index in indexes:
        for name, stored in index.tensors.items():
            known = tensors.get(name)
            if known is not None and known.spec != stored.spec:
                raise ConfigError(
                    f"tensor {name!r} is {known.spec.shape} {known.spec.dtype} on a rank before and "
                    f"{stored.spec.shape} {stored.spec.dtype} on rank {index.rank}"
                )
            pieces = (*known.pieces, *stored.pieces) if known else stored.pieces
            tensors[name] = StoredTensor(stored.spec, pieces)
    first = indexes[0]
    manifest = Manifest(
        save_id=first.save_id,
        tag=tag,
        serial=serial,
        world=len(indexes),
        step=step,
        files={name: entry for index in indexes for name, entry in index.files.items()},
        tensors={
            name: StoredTensor(one.spec, tuple(sorted(one.pieces, key=lambda piece: piece.box)))
            for name, one in tensors.items()
        },
        rank_tensors=tuple(index.own_tensors for index in indexes),
        objects=first.objects,
        rank_objects=tuple(index.own_objects for index in indexes),
        client_state=first.client_state,
    )
    try:
        check_tiling([*manifest.tensors.values(), *(t for own in manifest.rank_tensors for t in own.values())], file)
        check_files(manifest, file)
    except CheckpointCorrupt as error:
        raise ConfigError(
            f"the ranks' pieces are not a whole state: tensor {error.tensor!r}: {error.message}"
        ) from error
    return manifest
