"""A rank's data file: safetensors, each piece with the checksums of its extents.

    8 bytes            length of the header, little-endian
    header             JSON: {"__metadata__": {...}, "<entry>": {"dtype", "shape", "data_offsets"}, ...}, spaces up to a
                       multiple of 64 bytes
    data               the pieces, one after the other, those with the largest items first, so that each is aligned

An entry is called by the tensor's full name; a part of one `name@a:b,c:d`; what is one rank's own `rank<k>/name`.
An extent's checksum begins with its entry and its place: it fits nowhere else.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from zs_comm import ConfigError

from .boxes import Box, numel, shape_of, whole
from .dtypes import dtype_name, dtype_of, safetensors_name
from .manifest import MOST_HEADER, FileEntry, StoredPiece
from .shardable import Source, TensorSpec

_ALIGNMENT = 64
_LEAST_EXTENT = 4096
_MOST_EXTENT = 4 << 20
NOT_HERE = torch.empty(0)  # the data of a part that has a source
_EXTENTS = 128  # of a piece: a part of it is read with at most 2/128 of the piece too much


@dataclass(frozen=True)
class Part:
    """What one rank writes of a tensor. `spec.name` is the full name; `rank`: the only rank that it belongs to.

    Values that are not in memory are the elements of `source` from `start` on; `data` is then empty.
    """

    spec: TensorSpec
    box: Box
    data: Tensor  # the box's elements in row-major order, contiguous
    rank: int | None = None
    source: Source | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        return numel(self.box) * self.spec.dtype.itemsize

    @property
    def entry(self) -> str:
        return entry_name(self.spec, self.box, self.rank)


@dataclass(frozen=True)
class Layout:
    """A data file as it will be: the header's bytes, and its parts with their offsets in the data."""

    header: bytes
    parts: tuple[Part, ...]
    offsets: tuple[int, ...]
    nbytes: int  # of the whole file

    @property
    def file(self) -> FileEntry:
        return FileEntry(self.nbytes, len(self.header), zlib.crc32(self.header))


def entry_name(spec: TensorSpec, box: Box, rank: int | None = None) -> str:
    """The entry's name in the file, which is also what its checksums begin with."""
    name = spec.name if rank is None else f"rank{rank}/{spec.name}"
    if box == whole(spec.shape):
        return name
    return f"{name}@" + ",".join(f"{start}:{stop}" for start, stop in box)


def extent_nbytes(nbytes: int) -> int:
    """How many bytes of a piece of `nbytes` have one checksum: a 128th, from 4 KiB to 4 MiB."""
    return min(max(-(-nbytes // (_EXTENTS * 4096)) * 4096, _LEAST_EXTENT), _MOST_EXTENT)


def extent_seed(entry: str, offset: int) -> int:
    """What the CRC-32 of the extent at `offset` of a piece starts from."""
    return zlib.crc32(f"{entry}:{offset}".encode())


def checksums(entry: str, data: memoryview) -> str:
    """The CRC-32 of every extent of a piece, 8 hexadecimal digits each."""
    step = extent_nbytes(data.nbytes)
    return "".join(
        f"{zlib.crc32(data[offset : offset + step], extent_seed(entry, offset)):08x}"
        for offset in range(0, data.nbytes, step)
    )


def lay_out(parts: Iterable[Part], metadata: dict[str, str]) -> Layout:
    """Where each part goes.

    Raises:
        ConfigError: a part is there twice, has other elements than its box, or a dtype that is not stored.
    """
    ordered = sorted(parts, key=lambda part: -part.spec.dtype.itemsize)  # stable: otherwise in the order of saving
    members: dict[str, object] = {"__metadata__": metadata}
    offsets, offset = [], 0
    for part in ordered:
        entry, shape, code = part.entry, list(shape_of(part.box)), safetensors_name(part.spec.dtype)
        if entry in members:
            raise ConfigError(f"tensor {entry!r} is saved twice by this rank")
        if part.source is None and (part.data.numel() != numel(part.box) or part.data.dtype != part.spec.dtype):
            raise ConfigError(
                f"tensor {entry!r}: {part.data.numel()} elements of {part.data.dtype} are not the box of "
                f"{numel(part.box)} elements of {part.spec.dtype}"
            )
        if code is None:
            if dtype_of(dtype_name(part.spec.dtype)) is None:
                raise ConfigError(f"tensor {entry!r}: {part.spec.dtype} is not stored")
            shape, code = [part.nbytes], "U8"
        members[entry] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + part.nbytes]}
        offsets.append(offset)
        offset += part.nbytes
    text = json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    if len(header) > MOST_HEADER:
        raise ConfigError(f"{len(ordered)} tensors on one rank: the header of {len(header):,} bytes is too long")
    return Layout(header, tuple(ordered), tuple(offsets), len(header) + offset)


def stored_piece(part: Part, file: str, offset: int, crcs: str) -> StoredPiece:
    return StoredPiece(part.box, file, offset, part.nbytes, extent_nbytes(part.nbytes), crcs)


def sum_nbytes(parts: Sequence[Part]) -> int:
    return sum(part.nbytes for part in parts)
