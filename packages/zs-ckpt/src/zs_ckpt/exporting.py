"""Consolidated safetensors in Hugging Face's layout, from a checkpoint of any world size, one tensor at a time.

    model.safetensors                                          where all fits into one file
    model-00001-of-00003.safetensors, ...                      else: files of at most `max_shard_size`, in order
    model.safetensors.index.json                               {"metadata": {"total_size"}, "weight_map": {name: file}}

Tied parameters are there once, under their first name, as `save_pretrained` leaves them. A tensor is read straight into
the dtype that it is written in: beside the read buffers only one is in memory at a time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from zs_comm import ConfigError
from zs_comm.views import bytes_of

from .boxes import whole
from .dtypes import safetensors_name
from .durable import make_folder, put_in_place, remove, sync_folder
from .errors import CheckpointIncomplete
from .extents import Target
from .shardable import TensorSpec

if TYPE_CHECKING:
    from .snapshot import Snapshot
from .staging import Progress

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_OURS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_WRITE = 64 << 20  # bytes of one write call


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    tag: str | None = None,
    key: str = "model",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> list[Path]:
    """Write the tensors that were saved under `key` to the folder `target`; returns the files, the index last.

    Args:
        tag: None takes the newest.
        dtype: of the floating-point tensors ("fp32", "bf16", "fp16" or torch's); None keeps what was saved.
        max_shard_size: bytes of a file, or "5GB", "500MB", "2GiB". A larger tensor has a file of its own.
        progress: called with the bytes written so far and the bytes in all.

    Raises:
        CheckpointIncomplete: there is no such checkpoint, or nothing was saved under `key`.
        CheckpointCorrupt: bytes are not those that were written; the folder is as it was.
        ConfigError: no such dtype or size.
    """
    from .snapshot import Snapshot

    wanted = _dtype(dtype)
    with Snapshot(path, tag) as snapshot:
        stored = {
            name.removeprefix(f"{key}/"): one.spec
            for name, one in snapshot.manifest.tensors.items()
            if name.startswith(f"{key}/")
        }
        if not stored:
            raise CheckpointIncomplete(f"nothing was saved under the key {key!r}", snapshot.folder)
        specs = {name: TensorSpec(name, spec.shape, _cast(spec.dtype, wanted)) for name, spec in stored.items()}
        snapshot.open(snapshot.manifest.files)
        return write_sharded(
            target,
            specs,
            lambda name: _read(snapshot, stored[name], specs[name].dtype),
            max_shard_size=max_shard_size,
            progress=progress,
        )


def write_sharded(
    target: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    *,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> list[Path]:
    """Write the tensors that `tensor_of` gives, asked for once each and in order, in Hugging Face's layout.

    Files are written under temporary names; only when all are on the disk do they take the place of an earlier export.
    Raises ConfigError for a dtype that safetensors lacks, or where a tensor is not what its spec says.
    """
    folder = Path(target)
    shards = _shards(specs, parse_size(max_shard_size))
    many = len(shards) > 1
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
             for n in range(1, len(shards) + 1)]  # fmt: skip
    total, done = sum(map(_nbytes, specs.values())), 0
    make_folder(folder)
    unfinished: list[Path] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            unfinished.append(folder / f"{name}.tmp")
            with unfinished[-1].open("wb") as file:
                file.write(_header([specs[one] for one in shard]))
                for one in shard:
                    view = _checked(tensor_of(one), specs[one])
                    for start in range(0, len(view), _WRITE):
                        file.write(view[start : start + _WRITE])
                    done += len(view)
                    del view
                    if progress is not None:
                        progress(done, total)
                file.flush()
                os.fsync(file.fileno())
        if many:
            weight_map = {one: name for name, shard in zip(names, shards, strict=True) for one in shard}
            names.append("model.safetensors.index.json")
            unfinished.append(folder / f"{names[-1]}.tmp")
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            with unfinished[-1].open("w", encoding="utf-8") as text:
                text.write(json.dumps(index, indent=2) + "\n")
                text.flush()
                os.fsync(text.fileno())
    except BaseException:
        for path in unfinished:
            remove(path)
        raise
    for path in folder.iterdir():  # of an earlier export: a reader would prefer a stale model.safetensors
        if _OURS.fullmatch(path.name) and path.name not in names:
            remove(path)
    for path, name in zip(unfinished, names, strict=True):
        put_in_place(path, folder / name)
    sync_folder(folder)
    return [folder / name for name in names]


def parse_size(size: int | str) -> int:
    """Bytes: 5GB is 5 * 10**9, 5GiB is 5 * 2**30. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"max_shard_size is {size!r}; it is a number of bytes, or one with KB, MB, GB, TB, MiB, GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if str(dtype) not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it is one of fp32, bf16, fp16")
    return DTYPES[str(dtype)]


def _cast(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype in (*DTYPES.values(), torch.float64) else dtype


def _read(snapshot: Snapshot, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    data = torch.empty(spec.shape, dtype=dtype)
    snapshot.fill([Target(snapshot.stored(spec.name), whole(spec.shape), data)])
    return data


def _nbytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _shards(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    """The names, in order, in groups of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + _nbytes(spec) > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += _nbytes(spec)
    # those with the largest items first in a file, so that each is aligned: readers take views
    return [sorted(shard, key=lambda name: -specs[name].dtype.itemsize) for shard in shards]


def _header(specs: list[TensorSpec]) -> bytes:
    members: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        code = safetensors_name(spec.dtype)
        if code is None:
            raise ConfigError(f"tensor {spec.name!r}: safetensors has no {spec.dtype}")
        end = offset + _nbytes(spec)
        members[spec.name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checked(tensor: Tensor, spec: TensorSpec) -> memoryview:
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise ConfigError(f"tensor {spec.name!r} is {tuple(tensor.shape)} {tensor.dtype}, and {spec} was announced")
    return bytes_of(tensor.detach().cpu().contiguous())
