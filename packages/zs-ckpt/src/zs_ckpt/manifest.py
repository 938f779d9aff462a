"""The manifest: every tensor of a checkpoint, where each piece of it lies, and what is not a tensor.

A manifest is input from outside: everything in it is checked before anything is opened or allocated on its word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .boxes import Box, numel
from .dtypes import dtype_name, dtype_of
from .errors import CheckpointCorrupt, UnknownVersion
from .jsonvalues import decode
from .names import is_data_file, name_problem
from .shardable import TensorSpec
from .tiling import tiling_problem

FORMAT = "zs-ckpt"
VERSION = 1
MOST_HEADER = 100_000_008  # bytes before the data: what safetensors takes, and its length
_MOST_DIMS = 64
_MOST_SIZE = 2**63 - 1
_MOST_WORLD = 1 << 20
_SAVE_ID = re.compile(r"[0-9a-f]{8}")
_CRCS = re.compile(r"(?:[0-9a-f]{8})*")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A data file: its size in bytes, where its data begins, and the CRC-32 of what is before."""

    nbytes: int
    data_offset: int
    header_crc: int


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A part of a tensor in a file: `nbytes` from `offset` on, counted from where the file's data begins.

    `crcs`: the CRC-32 of each `extent_nbytes` of it, the last one shorter, as 8 hexadecimal digits each.
    """

    box: Box
    file: str
    offset: int
    nbytes: int
    extent_nbytes: int
    crcs: str

    def crc(self, index: int) -> int:
        return int(self.crcs[8 * index : 8 * index + 8], 16)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    spec: TensorSpec
    pieces: tuple[StoredPiece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint has. `tensors` are those of all ranks, by full name; `rank_tensors[k]` those of rank k alone.

    `objects` by key, `rank_objects[k]` by key, and `client_state` hold values as JSON (see `jsonvalues`). `serial`
    counts the checkpoints of a folder: the newest has the highest.
    """

    save_id: str
    tag: str
    serial: int
    world: int
    step: int | None = None
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    rank_tensors: tuple[Mapping[str, StoredTensor], ...] = ()
    objects: Mapping[str, Any] = field(default_factory=dict)
    rank_objects: tuple[Mapping[str, Any], ...] = ()
    client_state: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all data files."""
        return sum(entry.nbytes for entry in self.files.values())

    def members(self) -> dict[str, Any]:
        """The JSON object."""
        step = {} if self.step is None else {"step": self.step}
        return {
            "format": FORMAT,
            "version": VERSION,
            "serial": self.serial,  # here, so that it is found without reading the rest
            "save_id": self.save_id,
            "tag": self.tag,
            "world": self.world,
            **step,
            "files": {name: file_members(entry) for name, entry in self.files.items()},
            "tensors": {name: tensor_members(stored) for name, stored in self.tensors.items()},
            "rank_tensors": [
                {name: tensor_members(stored) for name, stored in own.items()} for own in self.rank_tensors
            ],
            "objects": dict(self.objects),
            "rank_objects": [dict(own) for own in self.rank_objects],
            "client_state": self.client_state,
        }


def file_members(entry: FileEntry) -> dict[str, Any]:
    return {"nbytes": entry.nbytes, "data_offset": entry.data_offset, "header_crc": f"{entry.header_crc:08x}"}


def tensor_members(stored: StoredTensor) -> dict[str, Any]:
    pieces = [
        {
            "box": [list(pair) for pair in piece.box],
            "file": piece.file,
            "offset": piece.offset,
            "nbytes": piece.nbytes,
            "extent_nbytes": piece.extent_nbytes,
            "crc": piece.crcs,
        }
        for piece in stored.pieces
    ]
    return {"shape": list(stored.spec.shape), "dtype": dtype_name(stored.spec.dtype), "pieces": pieces}


def parse_manifest(members: Mapping[str, Any], file: Path) -> Manifest:
    """The manifest in `members`, which `sealed.read_sealed` read from `file`.

    Raises:
        UnknownVersion: it is of another version of the format.
        CheckpointCorrupt: it is not a manifest; a name, box or offset in it is not one that a save writes; the pieces
            of a tensor leave a hole or overlap, in the tensor or in a file.
    """
    reader = Reader(file)
    reader.check_format(members, FORMAT)
    known = {"format", "version", "step", *Manifest.__dataclass_fields__}
    reader.only(members, known, "the manifest")
    world = reader.integer(members, "world", low=1, high=_MOST_WORLD)
    manifest = Manifest(
        save_id=reader.save_id(members),
        tag=reader.text(members, "tag"),
        serial=reader.integer(members, "serial"),
        world=world,
        step=reader.integer(members, "step") if "step" in members else None,
        files=reader.files(members),
        tensors=reader.tensors(reader.mapping(members, "tensors")),
        rank_tensors=tuple(reader.tensors(own) for own in reader.mappings(members, "rank_tensors", world)),
        objects=reader.mapping(members, "objects"),
        rank_objects=tuple(reader.mappings(members, "rank_objects", world)),
        client_state=members.get("client_state"),
    )
    for value in (*manifest.objects.values(), *manifest.rank_objects, manifest.client_state):
        try:
            decode(value)
        except (ValueError, RecursionError) as error:
            reader.fail(f"an object in it is not well formed: {error}")
    check_tiling([*manifest.tensors.values(), *(t for own in manifest.rank_tensors for t in own.values())], file)
    check_files(manifest, file)
    return manifest


def check_tiling(stored: Iterable[StoredTensor], file: Path) -> None:
    """Raise CheckpointCorrupt unless each tensor's pieces are the whole of it, once."""
    for one in stored:
        problem = tiling_problem(one.spec.shape, [piece.box for piece in one.pieces])
        if problem:
            raise CheckpointCorrupt(problem, file, one.spec.name)


def check_files(manifest: Manifest, file: Path) -> None:
    """Raise CheckpointCorrupt unless every byte of every file's data belongs to one piece."""
    regions: dict[str, list[tuple[int, int, str]]] = {name: [] for name in manifest.files}
    for group in (manifest.tensors, *manifest.rank_tensors):
        for name, stored in group.items():
            for piece in stored.pieces:
                if piece.file not in regions:
                    raise CheckpointCorrupt(f"a piece lies in {piece.file!r}, which is not listed", file, name)
                regions[piece.file].append((piece.offset, piece.offset + piece.nbytes, name))
    for name, entry in manifest.files.items():
        reached = 0
        for start, stop, tensor in sorted(regions[name]):
            if start != reached:
                what = "overlaps the one before" if start < reached else f"leaves a gap after byte {reached}"
                raise CheckpointCorrupt(f"a piece at {start} of {name} {what}", file, tensor)
            reached = stop
        if entry.data_offset + reached != entry.nbytes:
            raise CheckpointCorrupt(
                f"{name} has {entry.nbytes} bytes, and header and pieces make {entry.data_offset + reached}", file
            )


class Reader:
    """Checked access to members; errors name the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def fail(self, message: str, tensor: str | None = None) -> NoReturn:
        raise CheckpointCorrupt(message, self.file, tensor)

    def check_format(self, members: Mapping[str, Any], expected: str) -> None:
        if members.get("format") != expected:
            self.fail(f"its format is {members.get('format')!r}, not {expected!r}")
        version = members.get("version")
        if version != VERSION or isinstance(version, bool):
            raise UnknownVersion(f"version {version!r} of the format; this package reads version {VERSION}", self.file)

    def only(self, members: Mapping[str, Any], known: set[str], what: str, tensor: str | None = None) -> None:
        unknown = sorted(set(members) - known)
        if unknown:
            self.fail(f"{what} has the members {unknown[:5]}, which version {VERSION} does not have", tensor)

    def integer(
        self, members: Mapping[str, Any], name: str, *, low: int = 0, high: int = _MOST_SIZE, tensor: str | None = None
    ) -> int:
        value = members.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(f"{name!r} is {str(value)[:100]}, not an integer from {low} to {high}", tensor)
        return value

    def text(self, members: Mapping[str, Any], name: str, tensor: str | None = None) -> str:
        value = members.get(name)
        if not isinstance(value, str):
            self.fail(f"{name!r} is {str(value)[:100]}, not a string", tensor)
        return value

    def mapping(self, members: Mapping[str, Any], name: str) -> dict[str, Any]:
        value = members.get(name)
        if not isinstance(value, dict):
            self.fail(f"{name!r} is {str(value)[:100]}, not an object")
        return value

    def mappings(self, members: Mapping[str, Any], name: str, count: int) -> list[dict[str, Any]]:
        value = members.get(name)
        if not isinstance(value, list) or len(value) != count or not all(isinstance(one, dict) for one in value):
            self.fail(f"{name!r} is not a list of {count} objects, one for each rank")
        return value

    def save_id(self, members: Mapping[str, Any]) -> str:
        value = self.text(members, "save_id")
        if not _SAVE_ID.fullmatch(value):
            self.fail(f"the save_id is {value[:100]!r}, not 8 hexadecimal digits")
        return value

    def files(self, members: Mapping[str, Any]) -> dict[str, FileEntry]:
        found = {}
        for name, value in self.mapping(members, "files").items():
            if not is_data_file(name):
                self.fail(f"a data file is called {name[:300]!r}, which no save does")
            if not isinstance(value, dict):
                self.fail(f"the entry of {name} is no object")
            self.only(value, {"nbytes", "data_offset", "header_crc"}, f"the entry of {name}")
            nbytes = self.integer(value, "nbytes")
            crc = self.text(value, "header_crc")
            if not _SAVE_ID.fullmatch(crc):
                self.fail(f"the header's checksum of {name} is {crc[:100]!r}")
            found[name] = FileEntry(
                nbytes, self.integer(value, "data_offset", high=min(nbytes, MOST_HEADER)), int(crc, 16)
            )
        return found

    def tensors(self, members: Mapping[str, Any]) -> dict[str, StoredTensor]:
        return {name: self.tensor(name, value) for name, value in members.items()}

    def tensor(self, name: str, value: Any) -> StoredTensor:
        problem = name_problem(name)
        if problem:
            self.fail(f"a tensor's name {problem}: {name[:300]!r}")
        if not isinstance(value, dict):
            self.fail("its entry is no object", name)
        self.only(value, {"shape", "dtype", "pieces"}, "its entry", name)
        shape, pieces = value.get("shape"), value.get("pieces")
        dtype = dtype_of(self.text(value, "dtype", name))
        if dtype is None:
            self.fail(f"its dtype is {value['dtype'][:100]!r}, which this torch does not have", name)
        if not isinstance(shape, list) or len(shape) > _MOST_DIMS or not all(_is_size(size) for size in shape):
            self.fail(f"its shape is {str(shape)[:100]}", name)
        if not isinstance(pieces, list):
            self.fail("its pieces are no list", name)
        spec = TensorSpec(name, tuple(shape), dtype)
        return StoredTensor(spec, tuple(self.piece(one, spec) for one in pieces))

    def piece(self, value: Any, spec: TensorSpec) -> StoredPiece:
        name = spec.name
        if not isinstance(value, dict):
            self.fail("a piece is no object", name)
        self.only(value, {"box", "file", "offset", "nbytes", "extent_nbytes", "crc"}, "a piece", name)
        raw = value.get("box")
        if not isinstance(raw, list) or len(raw) != len(spec.shape) or not all(_is_pair(pair) for pair in raw):
            self.fail(f"a box is {str(raw)[:100]}", name)
        box = tuple((pair[0], pair[1]) for pair in raw)
        nbytes = self.integer(value, "nbytes", tensor=name)
        extent_nbytes = self.integer(value, "extent_nbytes", low=4096, high=4 << 20, tensor=name)
        file, crcs = self.text(value, "file", name), self.text(value, "crc", name)
        if nbytes != numel(box) * spec.dtype.itemsize:
            self.fail(f"a piece of {nbytes} bytes has the box {box} of {spec.dtype}", name)
        if extent_nbytes % 4096 or not _CRCS.fullmatch(crcs) or len(crcs) != 8 * -(-nbytes // extent_nbytes):
            self.fail(f"{nbytes} bytes in extents of {extent_nbytes} have a checksum of {len(crcs)} digits", name)
        offset = self.integer(value, "offset", high=_MOST_SIZE - nbytes, tensor=name)
        return StoredPiece(box, file, offset, nbytes, extent_nbytes, crcs)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_SIZE


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_size, value)) and value[0] <= value[1]
