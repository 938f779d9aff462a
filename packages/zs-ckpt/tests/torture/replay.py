"""What a disk may hold after a power cut: the operations of a save, of which those that no fsync covers may be lost.

The model is the weakest that a file system may be. The content of a file is safe once the file was synced; a name is
safe once its folder was synced; what is not safe is there or not, each operation by itself, in any order; of a write
any pages, and where they are not there, zeros. Nothing orders one file, or one name, against another but an fsync.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .shim import OPS

_HEADER = struct.Struct("IIqqqqqIIII")
_PAGE = 4096


@dataclass(frozen=True)
class Op:
    """One operation that was done; paths are relative to the folder."""

    kind: str
    inode: int
    offset: int
    length: int
    is_folder: bool
    path: str
    other: str
    data: bytes
    moment: int = 0  # when it was done, in ns


def read_logs(paths: Iterable[Path], root: Path) -> list[Op]:
    """The operations of several processes, in the order in which they were done."""
    return sorted((op for path in paths for op in read_log(path, root)), key=lambda op: op.moment)


def read_log(path: Path, root: Path) -> list[Op]:
    raw, at, ops = path.read_bytes(), 0, []
    while at < len(raw):
        magic, op, inode, offset, length, is_folder, moment, npath, nother, ndata, _ = _HEADER.unpack_from(raw, at)
        if magic != 0x5A53:
            raise ValueError(f"{path}: no record at {at}")
        at += _HEADER.size
        parts = [raw[at : at + npath], raw[at + npath : at + npath + nother]]
        at += npath + nother
        names = [str(Path(part.decode()).relative_to(root)) if part else "" for part in parts]
        names = ["" if name == "." else name for name in names]
        ops.append(Op(OPS[op], inode, offset, length, bool(is_folder), *names, raw[at : at + ndata], moment))
        at += ndata
    return ops


@dataclass
class File:
    safe: bytes = b""
    pending: list[Op] = field(default_factory=list)  # since its last sync


@dataclass
class Folder:
    safe: dict[str, object] = field(default_factory=dict)  # name -> File | Folder
    pending: list[tuple[str, str, object]] = field(default_factory=list)  # ("set" | "drop" | "move", name, what)


class Disk:
    """A folder and its operations so far."""

    def __init__(self, before: Path) -> None:
        self.root = _from_disk(before)
        self._open: dict[int, File] = {}

    def apply(self, op: Op) -> None:
        if op.kind in ("create", "mkdir"):
            made: File | Folder = Folder() if op.kind == "mkdir" else File()
            if isinstance(made, File):
                self._open[op.inode] = made
            parent, name = self._parent(op.path)
            parent.pending.append(("set", name, made))
        elif op.kind in ("unlink", "rmdir"):
            parent, name = self._parent(op.path)
            parent.pending.append(("drop", name, None))
        elif op.kind in ("rename", "link"):
            (parent, name), (onto, other) = self._parent(op.path), self._parent(op.other)
            what = self._at(op.path)
            if onto is parent and op.kind == "rename":
                parent.pending.append(("move", name, (other, what)))
            else:
                onto.pending.append(("set", other, what))
                if op.kind == "rename":
                    parent.pending.append(("drop", name, None))
        elif op.kind == "fsync" and op.is_folder:
            folder = self._at(op.path)
            folder.safe, folder.pending = _names(folder.safe, folder.pending), []
        elif op.kind in ("write", "truncate", "allocate", "fsync"):
            file = self._open.get(op.inode)
            if file is None:  # it was there before
                file = self._open[op.inode] = self._at(op.path)
            if op.kind == "fsync":
                file.safe, file.pending = _content(file.safe, file.pending), []
            else:
                file.pending.append(op)
        else:
            raise ValueError(f"the replay knows no {op.kind}")

    def after_power_cut(self, draw: random.Random | None) -> dict[str, bytes | None]:
        """path -> content (None: a folder). Without `draw`, all that is not safe is lost."""
        return dict(_survivors(self.root, "", draw))

    def as_it_is(self) -> dict[str, bytes | None]:
        """With everything that was done: what the process itself saw."""
        return dict(_present(self.root, ""))

    def _parent(self, path: str) -> tuple[Folder, str]:
        folder, _, name = path.rpartition("/")
        found = self._at(folder)
        if not isinstance(found, Folder):
            raise ValueError(f"{folder} is no folder")
        return found, name

    def _at(self, path: str):
        found: object = self.root
        for part in Path(path).parts if path else ():
            found = _names(found.safe, found.pending)[part]
        return found


def _names(safe: dict[str, object], pending: list[tuple[str, str, object]]) -> dict[str, object]:
    names = dict(safe)
    for kind, name, what in pending:
        if kind == "set":
            names[name] = what
        elif kind == "drop":
            names.pop(name, None)
        else:
            names.pop(name, None)
            names[what[0]] = what[1]
    return names


def _content(safe: bytes, pending: list[Op]) -> bytes:
    content = bytearray(safe)
    for op in pending:
        if op.kind == "truncate":
            content[op.length :] = bytes(max(op.length - len(content), 0))
            continue
        end = op.offset + op.length
        content.extend(bytes(max(end - len(content), 0)))
        if op.kind == "write":
            content[op.offset : end] = op.data
    return bytes(content)


def _survivors(folder: Folder, prefix: str, draw: random.Random | None) -> Iterator[tuple[str, bytes | None]]:
    pending = []
    if draw is not None and folder.pending:
        share = draw.choice([0.2, 0.5, 0.8, 1.0])
        pending = [each for each in folder.pending if draw.random() < share]
        if draw.random() < 0.5:
            draw.shuffle(pending)
    for name, what in sorted(_names(folder.safe, pending).items()):
        if isinstance(what, Folder):
            yield prefix + name, None
            yield from _survivors(what, f"{prefix}{name}/", draw)
        else:
            yield prefix + name, _torn(what, draw)


def _torn(file: File, draw: random.Random | None) -> bytes:
    """The file with some of what was not synced: some operations, and some pages of those."""
    if draw is None or not file.pending:
        return file.safe
    share, kept = draw.choice([0.0, 0.3, 0.7, 1.0]), []
    for op in file.pending:
        if op.kind != "write":
            if draw.random() < share:
                kept.append(op)
            continue
        for start in range(0, op.length, _PAGE):
            piece = op.data[start : start + _PAGE]
            if draw.random() < share:
                kept.append(Op("write", op.inode, op.offset + start, len(piece), False, op.path, "", piece))
    if draw.random() < 0.3:
        draw.shuffle(kept)
    return _content(file.safe, kept)


def _present(folder: Folder, prefix: str) -> Iterator[tuple[str, bytes | None]]:
    for name, what in sorted(_names(folder.safe, folder.pending).items()):
        if isinstance(what, Folder):
            yield prefix + name, None
            yield from _present(what, f"{prefix}{name}/")
        else:
            yield prefix + name, _content(what.safe, what.pending)


def _from_disk(folder: Path) -> Folder:
    return Folder({p.name: _from_disk(p) if p.is_dir() else File(p.read_bytes()) for p in folder.iterdir()})


def on_disk(folder: Path) -> dict[str, bytes | None]:
    """The same form, of a folder."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def make(content: dict[str, bytes | None], folder: Path) -> None:
    """Write a disk's content into a new folder."""
    folder.mkdir(parents=True)
    for name, data in content.items():
        path = folder / name
        if data is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data)
