"""torch.distributed.checkpoint, both ways.

Reading takes nothing of torch's reader, which unpickles what the files name: the metadata and every item go through
`unpickler`, and each chunk becomes a piece of ours as it lies in the mapped file. Writing is torch's own writer, fed
with one tensor at a time.

    ("model", "layers.0.weight")                        <-> model/layers.0.weight
    ("optim", "state", "layers.0.weight", "exp_avg")    <-> optimizer/exp_avg/layers.0.weight
    ("optim", "param_groups", 0, "lr")                  <-> the optimizer's objects
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zs_comm import ConfigError, ZsError

from .boxes import Box, shape_of
from .errors import CheckpointCorrupt, CheckpointIncomplete
from .saving import Saved, save
from .shardable import PROTOCOL, Piece, TensorSpec
from .snapshot import Snapshot
from .staging import Progress
from .unpickler import Record, read_bare_pickle, read_pickled

Path_ = tuple[Any, ...]  # of an item in the dictionaries that were saved
_CLASSES = frozenset(
    [f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )] + ["torch.distributed.checkpoint.filesystem._StorageInfo"]
)  # fmt: skip


def import_dcp(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    tag: str | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Save what the DCP folder `source` holds in the folder `path`. One process does it, whoever wrote `source`.

    `progress`: called with the bytes read so far and the bytes in all.

    Raises:
        CheckpointIncomplete: there is no `.metadata`, or a file is missing.
        CheckpointCorrupt: a file is damaged, or chunks do not make up a tensor.
        PickleRefused: a file asks for more than data.
        ConfigError: compressed items, or DCP's safetensors format.
    """
    return save(path, read_dcp(source), tag=tag, progress=progress)


def read_dcp(source: str | os.PathLike[str]) -> dict[str, _Saved]:
    """The DCP folder `source` as what `save` takes: Shardables by key, of views of the mapped files."""
    folder = Path(source)
    file = folder / ".metadata"
    if not file.is_file():
        raise CheckpointIncomplete("there is no such file, so this is no DCP checkpoint", file)
    metadata = read_bare_pickle(file, _CLASSES)
    if not isinstance(metadata, Record):
        raise CheckpointCorrupt("it holds no Metadata", file)
    try:
        return _items(metadata, folder)
    except (ZsError, OSError):
        raise
    except Exception as error:
        raise CheckpointCorrupt(f"not what DCP writes: {type(error).__name__}: {error}", file) from error


def _items(metadata: Record, folder: Path) -> dict[str, _Saved]:
    paths = metadata.fields.get("planner_data") or {}
    places: dict[str, list[tuple[Record, Record]]] = {}
    for index, info in (metadata.fields.get("storage_data") or {}).items():
        places.setdefault(index.fields["fqn"], []).append((index, info))
    found: dict[str, _Saved] = {}
    for fqn, item in (metadata.fields.get("state_dict_metadata") or {}).items():
        key, *rest = paths.get(fqn) or fqn.split(".", 1)
        key = "optimizer" if key == "optim" else str(key)
        saved = found.setdefault(key, _Saved(key))
        if item.name.endswith(".TensorStorageMetadata"):
            saved.add_tensor(fqn, tuple(rest), item, places.get(fqn, []), folder)
        else:
            _, info = places[fqn][0]
            saved.add_value(tuple(rest), _item(folder, info))
    return found


class _Saved:
    """One key's tensors, in chunks, and values."""

    PROTOCOL = PROTOCOL

    def __init__(self, key: str) -> None:
        self._key = key
        self._tensors: list[tuple[TensorSpec, list[tuple[Box, Path, Record]]]] = []
        self._objects: dict[str, Any] = {"world": 1, "tied": {}, "extra": {}, "leaves": [], "paths": {}}

    def add_tensor(
        self, fqn: str, path: Path_, item: Record, places: list[tuple[Record, Record]], folder: Path
    ) -> None:
        name, shape = _name(path), tuple(item.fields["size"])
        properties = item.fields["properties"].fields
        dtype = properties["state"][0] if "state" in properties else properties["dtype"]
        chunks = []
        for chunk in item.fields["chunks"]:
            offsets, sizes = tuple(chunk.fields["offsets"]), tuple(chunk.fields["sizes"])
            box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
            wanted = [info for index, info in places if tuple(index.fields.get("offset") or offsets) == offsets]
            if not wanted:
                raise CheckpointIncomplete(f"no file has its chunk at {offsets}", folder, fqn)
            chunks.append((box, folder, wanted[0]))
        self._objects["paths"][name] = list(path)
        self._tensors.append((TensorSpec(name, shape, dtype), chunks))

    def add_value(self, path: Path_, value: Any) -> None:
        if path[:1] == ("param_groups",) and len(path) == 3 and isinstance(path[1], int):
            groups = self._objects.setdefault("param_groups", [])
            groups.extend({} for _ in range(min(path[1] + 1, 1 << 16) - len(groups)))
            groups[path[1]][path[2]] = value
            self._objects |= {"class": "of a DCP checkpoint", "numbers": {}}
        else:
            self._objects["leaves"].append([list(path), value])

    def pieces(self) -> Iterator[Piece]:
        for spec, chunks in self._tensors:
            for box, folder, info in chunks:
                data = _item(folder, info)
                if not isinstance(data, Tensor) or tuple(data.shape) != shape_of(box) or data.dtype != spec.dtype:
                    raise CheckpointCorrupt(f"the chunk at {box} is not there", folder / _file(folder, info), spec.name)
                yield Piece(spec, box, data.contiguous())

    def objects(self) -> Mapping[str, Any]:
        return self._objects

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        raise TypeError("what was read from another program's checkpoint is saved and not loaded into")

    def finish(self, objects: Mapping[str, Any]) -> None:
        raise TypeError("what was read from another program's checkpoint is saved and not loaded into")


def _name(path: Path_) -> str:
    if len(path) == 3 and path[0] == "state":
        return f"{path[2]}/{path[1]}"
    return "/".join(map(str, path))


def _file(folder: Path, info: Record) -> Path:
    name = str(info.fields.get("relative_path"))
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointCorrupt(f"it names the file {name!r}", folder / ".metadata")
    return folder / name


def _item(folder: Path, info: Record) -> Any:
    file = _file(folder, info)
    if info.fields.get("transform_descriptors"):
        raise ConfigError(f"{file}: compressed with {info.fields['transform_descriptors']}, which is not read")
    if not file.is_file():
        raise CheckpointIncomplete("this file is missing", file)
    start, nbytes = info.fields.get("offset"), info.fields.get("length")
    if not isinstance(start, int) or not isinstance(nbytes, int):
        raise CheckpointCorrupt(f"bytes {start} and {nbytes} on of {file.name}", folder / ".metadata")
    return read_pickled(file, (start, nbytes))


def export_dcp(path: str | os.PathLike[str], target: str | os.PathLike[str], *, tag: str | None = None) -> None:
    """Write a checkpoint to the folder `target` as DCP reads it: `{"model": {...}, "optimizer": {"state": ...}}`.

    Tensors of one rank alone are left out. Raises CheckpointIncomplete and CheckpointCorrupt as `read`.
    """
    from torch.distributed.checkpoint import filesystem, state_dict_saver

    with Snapshot(path, tag) as snapshot:
        state, sources = _described(snapshot)
        snapshot.open(snapshot.manifest.files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is one process, and of its own internals
            state_dict_saver.save(
                state,
                storage_writer=filesystem.FileSystemWriter(target, thread_count=1),
                planner=_planner(snapshot, sources),
                no_dist=True,
            )


def _described(snapshot: Snapshot) -> tuple[dict[str, Any], dict[Path_, str]]:
    """The state with tensors of no memory in the place of the saved ones, and the saved name by path."""
    state: dict[str, Any] = {}
    sources: dict[Path_, str] = {}
    objects = snapshot.objects
    for name, stored in snapshot.manifest.tensors.items():
        key, _, rest = name.partition("/")
        path: Path_ = (key, rest) if rest else (key,)
        if "param_groups" in objects.get(key, {}) and "/" in rest:
            slot, _, parameter = rest.partition("/")
            path = (key, "state", parameter, slot)
        at = state
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = torch.empty(stored.spec.shape, dtype=stored.spec.dtype, device="meta")
        sources[path] = name
    for key, values in objects.items():
        if "param_groups" in values:
            state.setdefault(key, {})["param_groups"] = values["param_groups"]
    return state, sources


def _planner(snapshot: Snapshot, sources: Mapping[Path_, str]) -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    class FromSnapshot(DefaultSavePlanner):
        """Reads a tensor when the writer asks for it."""

        def lookup_object(self, index: Any) -> Any:
            found = super().lookup_object(index)
            if isinstance(found, Tensor) and found.is_meta:
                return snapshot.read(sources[tuple(self.mappings[index.fqn])])
            return found

    return FromSnapshot()
