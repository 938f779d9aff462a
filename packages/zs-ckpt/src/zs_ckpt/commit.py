"""The commit: when it is one checkpoint and when the other, by files alone.

    rank k    data.tmp -> data, fdatasync -> rename -> fsync of the folder      (k's data is there for good)
              index by the same steps                                           (k says so)
    rank 0    waits for all indexes, merges
              manifest.tmp, fsync -> rename over the manifest                   <- the commit
              fsync of the folder -> `latest` -> what no manifest names is removed

Before the rename a reader finds the old manifest and the old files, which nobody has touched; after it the new ones.
There is no collective in it, so that a background thread can do it beside the training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from .durable import publish, remove
from .errors import CheckpointIncomplete
from .index import Index, parse_index
from .latest import named_tag, write_latest
from .manifest import Manifest
from .names import MANIFEST, data_name, is_ours
from .ranks import failures_of
from .sealed import read_sealed, seal

STALL_S = 120.0  # without a sign of life from the rank that is waited for
_Found = TypeVar("_Found")


class Commit:
    """One save's way into the folder of its tag, as one rank takes it."""

    def __init__(self, root: Path, tag: str, save_id: str, rank: int, world: int, *, stall_s: float = STALL_S) -> None:
        self.root, self.tag, self.save_id, self.rank, self.world = root, tag, save_id, rank, world
        self.folder = root / tag
        self._stall_s = stall_s

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST

    def path(self, kind: str = "safetensors", rank: int | None = None) -> Path:
        """A file of this save: `safetensors`, `index.json` or `error.json` of a rank (this one)."""
        return self.folder / data_name(self.save_id, self.rank if rank is None else rank, kind)

    def say_done(self, index: Index) -> None:
        """This rank's data is on the disk."""
        publish(self.path("index.json"), seal(index.members()), self.save_id)

    def say_failed(self, error: BaseException) -> None:
        """This rank cannot go on: the others stop waiting for it."""
        text = f"{type(error).__name__}: {error}"
        try:
            publish(self.path("error.json"), seal({"error": text}), self.save_id)
        except OSError:
            return  # the folder takes nothing any more; the others find out by the lack of progress

    def indexes(self, mine: Index) -> list[Index]:
        """What every rank wrote, once all have; on rank 0.

        Raises:
            RankDisagreement: a rank failed.
            CheckpointIncomplete: a rank has shown no sign of life for `stall_s`.
        """
        found = {self.rank: mine}

        def look() -> list[Index] | None:
            there = set(os.listdir(self.folder))
            for rank in range(self.world):
                path = self.path("index.json", rank)
                if rank not in found and path.name in there:
                    found[rank] = parse_index(read_sealed(path)[0], path)
            return [found[rank] for rank in range(self.world)] if len(found) == self.world else None

        return self._wait(look, lambda: f"rank {sorted(set(range(self.world)) - set(found))}")

    def commit(self, manifest: Manifest, *, latest: bool = True) -> None:
        """Make `manifest` the tag's, and the tag the newest (`latest`); on rank 0."""
        before = None if latest else named_tag(self.root)
        publish(self.manifest_path, seal(manifest.members()), self.save_id)
        if latest or before is not None:
            write_latest(self.root, self.tag if before is None else before, manifest.serial, self.save_id)

    def is_in_place(self) -> bool:
        """Is the tag's manifest that of this save?"""
        try:
            with open(self.manifest_path, "rb") as file:
                return f'"save_id":"{self.save_id}"'.encode() in file.read(400)
        except FileNotFoundError:
            return False

    def wait_committed(self) -> None:
        """Return when rank 0 has committed; raises as `indexes`."""
        self._wait(lambda: self.is_in_place() or None, lambda: "rank 0, which commits,")

    def withdraw(self) -> None:
        """Remove this rank's files of this save, unless it is committed; what it said of its failure stays.

        What fails once the manifest has its name (the folder's fsync, `latest`) does not take the checkpoint back: what
        is on the disk then is the old one or the new one, and so the files of both stay.
        """
        if self.is_in_place():
            return
        prefix = data_name(self.save_id, self.rank, "")
        self._remove(lambda entry: entry.startswith(prefix) and not entry.startswith(f"{prefix}error"))

    def forget(self) -> None:
        """Remove everything of this save, unless it is committed, once every rank knows that it failed; on rank 0."""
        if self.is_in_place():
            return
        self._remove(lambda entry: self.save_id in entry and is_ours(entry))
        with suppress(OSError):
            os.rmdir(self.folder)  # where the tag was never committed

    def _remove(self, which: Callable[[str], bool]) -> None:
        with suppress(OSError):
            for entry in os.listdir(self.folder):
                if which(entry):
                    remove(self.folder / entry)

    def failures(self) -> list[tuple[int, str]]:
        """The ranks that said that they failed, and how."""
        found, there = [], set(os.listdir(self.folder))
        for rank in range(self.world):
            path = self.path("error.json", rank)
            if path.name in there:
                try:
                    found.append((rank, str(read_sealed(path)[0].get("error"))))
                except CheckpointIncomplete:
                    continue
        return found

    def _wait(self, look: Callable[[], _Found | None], whom: Callable[[], str]) -> _Found:
        pause, signs, since = 0.0005, self._signs(), time.monotonic()
        while True:
            found = look()
            if found is not None:
                return found
            failures = self.failures()
            if failures:
                raise failures_of(failures, "save")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            now, fresh = time.monotonic(), self._signs()
            if fresh != signs:
                signs, since = fresh, now
            elif now - since > self._stall_s:
                raise CheckpointIncomplete(f"{whom()} has written nothing for {self._stall_s:g} s", self.folder)

    def _signs(self) -> list[tuple[str, int, int, int]]:
        """What shows that somebody is at work on this save."""
        signs = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if self.save_id in entry.name:
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    blocks = getattr(found, "st_blocks", 0)
                    signs.append((entry.name, found.st_size, blocks, found.st_mtime_ns))
        return sorted(signs)
