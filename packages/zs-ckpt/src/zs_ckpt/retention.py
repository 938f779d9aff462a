"""Which checkpoints of a folder stay, and what crashed saves left behind.

A checkpoint counts by being valid: its manifest is whole, and every file is there with its size. One that is torn is
never counted in place of a good one, and is left for a person to look at. What has no manifest is nobody's: an
unfinished save of a process that is gone, unless its lock is held.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

from zs_comm import ConfigError

from .durable import remove, sync_folder
from .errors import CheckpointBusy, CheckpointCorrupt, CheckpointIncomplete
from .latest import newest, serials
from .lock import TagLock
from .manifest import Manifest, parse_manifest
from .names import LOCK, MANIFEST, check_tag, is_data_file, is_ours
from .sealed import read_sealed

_log = logging.getLogger("zs_ckpt")


def collect(folder: Path, keep: Set[str]) -> None:
    """Remove what saves left in a tag's folder, but `keep`. Only while the tag's lock is held."""
    for entry in os.listdir(folder):
        if entry not in keep and is_ours(entry):
            remove(folder / entry)


def clean(folder: Path) -> None:
    """Before a save: remove what crashed ones left, which may be the space that this one needs. With the lock held.

    Data that no manifest names stays where there is doubt about the manifest: it is damaged, or a save failed when it
    was in place already, so that it may not be there any more after a crash.
    """
    if (folder / MANIFEST).exists() and not _has_leftovers(folder):
        return  # without a look into a manifest that may be long: somebody waits for this
    entries, keep = [entry for entry in os.listdir(folder) if is_ours(entry)], set[str]()
    doubt = any(entry.endswith(".error.json") for entry in entries)
    if (folder / MANIFEST).exists():
        try:
            members, _ = read_sealed(folder / MANIFEST)
            keep = set(parse_manifest(members, folder / MANIFEST).files)
        except (CheckpointCorrupt, CheckpointIncomplete):
            doubt = True
    if doubt:
        keep = {entry for entry in entries if is_data_file(entry)}
    collect(folder, keep)


def collect_leftovers(root: Path) -> None:
    """Remove what crashed saves left in `root` and in the folders of its tags, where nobody is saving now."""
    with os.scandir(root) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        folder = root / name
        if not is_folder:
            if is_ours(name):
                remove(folder)
        elif not (folder / MANIFEST).exists():
            if _is_nothing_but_ours(folder):
                _take_away(folder)
        elif _has_leftovers(folder):
            with suppress(CheckpointBusy, OSError), TagLock(folder) as lock:
                if lock.exclusive:
                    clean(folder)


def prune(root: Path, keep: int) -> list[str]:
    """Remove all valid checkpoints but the newest `keep` and the one that `latest` names; the removed tags."""
    committed = list(serials(root))
    if len(committed) <= keep:
        return []
    named, counted, removed = newest(root), 0, []
    for tag in committed:
        problem = invalid(root / tag)
        if problem is not None and not (root / tag / MANIFEST).exists():
            continue  # another process has removed it meanwhile
        if problem is not None:
            _log.warning("not counted among the checkpoints to keep: %s", problem)
            continue
        counted += 1
        if counted > keep and tag != named and _take_away(root / tag):
            removed.append(tag)
    return removed


def invalid(folder: Path) -> Exception | None:
    """What is wrong with a tag's checkpoint, without reading its data; None where nothing is."""
    try:
        members, _ = read_sealed(folder / MANIFEST)
        manifest: Manifest = parse_manifest(members, folder / MANIFEST)
        for name, entry in manifest.files.items():
            found = os.lstat(folder / name)
            if not stat.S_ISREG(found.st_mode) or found.st_size != entry.nbytes:
                return CheckpointCorrupt(
                    f"it has {found.st_size:,} bytes, and {entry.nbytes:,} were written", folder / name
                )
    except FileNotFoundError as error:
        return error if isinstance(error, CheckpointIncomplete) else CheckpointIncomplete(str(error), error.filename)
    except (CheckpointCorrupt, OSError) as error:
        return error
    return None


def _is_nothing_but_ours(folder: Path) -> bool:
    """Has a folder what a save makes, or nothing, and the name of a tag?"""
    try:
        check_tag(folder.name)
        return all(is_ours(entry) or entry == LOCK for entry in os.listdir(folder))
    except (OSError, ConfigError):
        return False


def _has_leftovers(folder: Path) -> bool:
    """Are there files of more saves than one in a tag's folder, or files that no committed save has?"""
    ours = [entry for entry in os.listdir(folder) if is_ours(entry)]
    return not all(map(is_data_file, ours)) or len({entry[:8] for entry in ours}) > 1


def _take_away(folder: Path) -> bool:
    """Remove a checkpoint, the manifest first: a reader finds it whole or not at all."""
    try:
        lock = TagLock(folder)
    except (CheckpointBusy, OSError):
        return False  # somebody saves to it, or it cannot be changed
    try:
        if not lock.exclusive:
            return False  # no locks here: it may be another process's
        if (folder / MANIFEST).exists():
            os.unlink(folder / MANIFEST)
            sync_folder(folder)
        collect(folder, frozenset())
    except OSError as error:
        _log.warning("%s could not be removed: %s", folder, error)
        return False
    finally:
        lock.release()
    with suppress(OSError):
        os.rmdir(folder)  # files of other people's keep it
    return True
