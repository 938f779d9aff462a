"""The tags of a folder, and the newest of them.

`latest` has one line: a tag, the highest serial when it was written, and the CRC-32 of the two. It counts as long as no
checkpoint with a higher serial has been committed: between a commit and its `latest` the commit counts. A line with a
tag alone counts too, as somebody wrote it by hand.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from pathlib import Path

from zs_comm import ConfigError

from .durable import publish
from .errors import CheckpointCorrupt, CheckpointIncomplete
from .names import LATEST, MANIFEST, check_tag, open_file

_HEAD_NBYTES = 256
_TRIES = 5
_HEAD = re.compile(rb'\{"format":"zs-ckpt","version":\d{1,9},"serial":(\d{1,18}),')
_log = logging.getLogger("zs_ckpt")


def write_latest(root: Path, tag: str, serial: int, save_id: str) -> None:
    """Name `tag` the newest of all up to `serial`, durably."""
    words = f"{tag} {serial}"
    line = f"{words} {zlib.crc32(words.encode()):08x}\n".encode()
    for turn in range(_TRIES):
        try:
            return publish(root / LATEST, line, save_id)
        except FileNotFoundError:
            # another save in this folder, to another tag, took the unfinished file for what a crash left
            if turn + 1 == _TRIES:
                raise


def serials(root: Path) -> dict[str, int]:
    """The serial of every tag that has a manifest, newest first; read from the manifests' first bytes, unverified."""
    found = {}
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for name in names:
        try:
            fd = open_file(root / name / MANIFEST)
        except CheckpointIncomplete:
            continue
        except (CheckpointCorrupt, OSError):
            found[name] = -1
            continue
        try:
            head = _HEAD.match(os.read(fd, _HEAD_NBYTES))
        finally:
            os.close(fd)
        found[name] = int(head[1]) if head else -1  # damaged: it is there, and it is older than all
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def newest(root: Path) -> str:
    """The tag that is loaded where none is named: what `latest` says, or the one that was committed last.

    Raises:
        CheckpointIncomplete: nothing has been committed here.
        CheckpointCorrupt: `latest` is damaged.
    """
    named, upto = _read_latest(root)
    committed = serials(root)
    if named is not None and (root / named).is_symlink():
        raise CheckpointCorrupt("this is a link, and no checkpoint is one", root / named)
    if named is not None and upto is None:
        if named not in committed:
            raise CheckpointIncomplete(f"it names {named!r}, which is not here", root / LATEST)
        return named
    if not committed:
        raise CheckpointIncomplete("no checkpoint has been committed in this folder", root)
    tag = next(iter(committed))
    if named in committed and committed[tag] <= (upto or 0):
        return str(named)
    damaged = [one for one, serial in committed.items() if serial < 0]
    if damaged:  # it may be the newest one that this would pass over
        raise CheckpointCorrupt("this does not begin as a manifest does", root / damaged[0] / MANIFEST)
    if named is not None and named not in committed:
        _log.warning("%s names %s, which is not there; taking %s", root / LATEST, named, tag)
    return tag


def named_tag(root: Path) -> str | None:
    """The tag in `latest`; None where there is no such file."""
    return _read_latest(root)[0]


def _read_latest(root: Path) -> tuple[str | None, int | None]:
    """The tag, and the serial up to which it is the newest: None where it was written by hand."""
    path = root / LATEST
    try:
        fd = open_file(path)
    except CheckpointIncomplete:
        return None, None
    try:
        raw = os.read(fd, 4096)
    finally:
        os.close(fd)
    try:
        words = raw.decode().split()
        tag = check_tag(words[0] if words else "")
    except (UnicodeDecodeError, ConfigError) as error:
        raise CheckpointCorrupt(f"it names no tag: {raw[:100]!r}", path) from error
    if len(words) == 1:
        return tag, None
    if len(words) != 3 or words[2] != f"{zlib.crc32(' '.join(words[:2]).encode()):08x}" or not words[1].isdecimal():
        raise CheckpointCorrupt(f"the checksum does not match: {raw[:100]!r}", path)
    return tag, int(words[1])
