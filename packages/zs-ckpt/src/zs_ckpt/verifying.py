"""What a folder has, and whether every byte of it is the one that was written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointCorrupt, CheckpointIncomplete
from .extents import MOST_READ, Read, Target
from .latest import serials
from .manifest import StoredTensor
from .names import MANIFEST, is_ours
from .snapshot import Snapshot

_MOST_PROBLEMS = 1000


@dataclass(frozen=True)
class Problem:
    """Something that is wrong: the file, the tensor where there is one, and what."""

    file: str
    tensor: str | None
    message: str

    def __str__(self) -> str:
        where = self.file if self.tensor is None else f"{self.file}, tensor {self.tensor!r}"
        return f"{where}: {self.message}"


@dataclass
class Report:
    """What `verify` found. `nbytes`: of tensors, that were read; `leftovers`: files of saves that did not commit."""

    path: Path
    tag: str
    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        head = f"{self.path}: {self.tensors} tensors, {self.nbytes:,} bytes in {self.files} files: "
        return head + ("ok" if self.ok else "\n  ".join(["", *map(str, self.problems)]))


def tags(path: str | os.PathLike[str]) -> list[str]:
    """The tags that were committed in the folder `path`, oldest first; none where there is no such folder."""
    return list(reversed(serials(Path(path))))


def verify(
    path: str | os.PathLike[str],
    tag: str | None = None,
    *,
    io: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read everything of the checkpoint `tag` (None: the newest) and compare every checksum.

    Args:
        progress: called with the bytes read so far and all bytes to read, from several threads but one at a time.

    Raises:
        CheckpointIncomplete: there is no such checkpoint. Whatever else is wrong is in the report.
    """
    try:
        snapshot = Snapshot(path, tag, io=io)
    except CheckpointCorrupt as error:
        report = Report(Path(path), tag or "")
        report.problems.append(_problem(error, Path(path)))
        return report
    with snapshot:
        manifest = snapshot.manifest
        report = Report(snapshot.folder, snapshot.tag, files=len(manifest.files))
        sound = set()
        for name in manifest.files:
            try:
                snapshot.open([name])
                sound.add(name)
            except (CheckpointCorrupt, CheckpointIncomplete, OSError) as error:
                report.problems.append(_problem(error, snapshot.folder / name))
        stored = [(one, None) for one in manifest.tensors.values()]
        own = [(one, rank) for rank, group in enumerate(manifest.rank_tensors) for one in group.values()]
        report.tensors = len(stored) + len(own)
        reads = [read for one, rank in [*stored, *own] for read in _all_of(one, rank) if read.piece.file in sound]
        total, lock = sum(read.nbytes for read in reads), threading.Lock()

        def check(read: Read, view: memoryview, buffer: Tensor) -> None:
            found: CheckpointCorrupt | None = None
            try:
                read.verify(view, snapshot.folder / read.piece.file)
            except CheckpointCorrupt as error:
                found = error
            with lock:
                report.nbytes += read.nbytes
                if found is not None and len(report.problems) < _MOST_PROBLEMS:
                    report.problems.append(_problem(found, snapshot.folder))
                if progress is not None:
                    progress(report.nbytes, total)

        try:
            snapshot.each(reads, check)
        except (CheckpointCorrupt, OSError) as error:
            report.problems.append(_problem(error, snapshot.folder))
        known = {*manifest.files, MANIFEST}
        report.leftovers = sorted(e for e in os.listdir(snapshot.folder) if is_ours(e) and e not in known)
        return report


def _all_of(stored: StoredTensor, rank: int | None) -> Iterator[Read]:
    """Every extent of a tensor, through a buffer."""
    nowhere = Target(stored, (), torch.empty(0), rank)
    for piece in stored.pieces:
        most = max(MOST_READ // piece.extent_nbytes, 1) * piece.extent_nbytes
        for offset in range(0, piece.nbytes, most):
            yield Read(nowhere, piece, offset, min(most, piece.nbytes - offset))


def _problem(error: Exception, path: Path) -> Problem:
    file = getattr(error, "file", None) or getattr(error, "filename", None) or str(path)
    return Problem(str(file), getattr(error, "tensor", None), getattr(error, "message", str(error)))
