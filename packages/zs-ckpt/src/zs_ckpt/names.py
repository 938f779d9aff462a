"""Names that come from outside: tags become folders, tensors' names become keys, files' names are opened.

What is refused when saving is refused when loading: a manifest is input like any other.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from zs_comm import ConfigError

from .errors import CheckpointCorrupt, CheckpointIncomplete

MANIFEST = "manifest.json"
LATEST = "latest"
LOCK = "lock"
DEFAULT_TAG = "checkpoint"

_MOST_TAG_NBYTES = 200  # below the 255 of every file system, with room for what temporary names add
_MOST_NAME_NBYTES = 1024
_TAG = re.compile(r"[^\s/\\\x00-\x1f\x7f:*?\"<>|]+")
_FILE = re.compile(r"[0-9a-f]{8}-[0-9]{5,7}\.safetensors")
_OURS = re.compile(r"[0-9a-f]{8}-[0-9]{5,7}\.(?:safetensors|index\.json|error\.json)")
_RANK = re.compile(r"rank[0-9]+")
_TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]{8}")

_NO_NAME = re.compile(r"\A[/\\]|[\x00-\x1f\x7f]")
_DOTS = re.compile(r"(?:\A|[/\\])\.\.?(?:[/\\]|\Z)")


def check_tag(tag: str) -> str:
    """`tag`, which can be the name of a folder on every file system.

    Raises:
        ConfigError: it is empty, longer than 200 bytes, `.` or `..`, begins with a dot, has a separator, a space or a
            control character in it, or is a name that the folder itself uses.
    """
    if not isinstance(tag, str):
        raise ConfigError(f"tag: {tag!r} is a {type(tag).__name__}; a tag is a str")
    problem = ""
    if not _TAG.fullmatch(tag):
        problem = 'it is empty or has a separator, a space, a control character or one of :*?"<>| in it'
    elif tag.startswith(".") or tag.endswith("."):
        problem = "it begins or ends with a dot"
    elif not _encodes(tag) or len(tag.encode()) > _MOST_TAG_NBYTES:
        problem = f"it has more than {_MOST_TAG_NBYTES} bytes, or no UTF-8 form"
    elif tag.casefold() in (LATEST, LOCK) or _TEMPORARY.fullmatch(tag):
        problem = "the folder uses this name itself"
    if problem:
        raise ConfigError(f"tag {tag[:300]!r} cannot name a checkpoint: {problem}")
    return tag


def check_case(folder: Path, tag: str) -> None:
    """Refuse a tag that differs from one in the folder by case only: some file systems would take them for one."""
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry != tag and entry.casefold() == tag.casefold():
            raise ConfigError(f"tag {tag!r} differs from {entry!r}, which is in {folder}, by case only")


def name_problem(name: str) -> str:
    """Why `name` is not the name of a tensor; empty where it is one."""
    if not name:
        return "is empty"
    if not _encodes(name) or len(name.encode()) > _MOST_NAME_NBYTES:
        return f"has more than {_MOST_NAME_NBYTES} bytes, or no UTF-8 form"
    if name == "__metadata__":
        return "is what a safetensors file calls its metadata"
    if _NO_NAME.search(name):
        return "begins with a separator, or has a control character in it"
    if _DOTS.search(name):
        return "has a part '.' or '..'"
    return ""


def check_name(name: str) -> str:
    """`name`, which can name a tensor; raises ConfigError where it cannot."""
    problem = name_problem(name)
    if problem:
        raise ConfigError(f"tensor name {name[:300]!r} {problem}")
    return name


def check_key(key: object) -> str:
    """A key of the state that is saved: the first part of its tensors' names."""
    if not isinstance(key, str):
        raise ConfigError(f"state: the key {key!r} is a {type(key).__name__}; keys are str")
    if "/" in key:
        raise ConfigError(f"state: the key {key!r} has a '/' in it, which separates a key from the names under it")
    if _RANK.fullmatch(key):
        raise ConfigError(f"state: the key {key!r} is what one rank's own tensors are filed under")
    return check_name(key)


def is_data_file(name: str) -> bool:
    """Is `name` one that a checkpoint gives to its data?"""
    return _FILE.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Is `name`, found in a tag's folder, one that a save makes, finished or not?"""
    return _OURS.fullmatch(name) is not None or _TEMPORARY.fullmatch(name) is not None


def data_name(save_id: str, rank: int, kind: str = "safetensors") -> str:
    return f"{save_id}-{rank:05d}.{kind}"


def temporary(name: str, save_id: str) -> str:
    return f"{name}.tmp-{save_id}"


def open_file(path: str | os.PathLike[str]) -> int:
    """A descriptor of the regular file at `path`, to read from; a link in its place is refused.

    Raises:
        CheckpointIncomplete: there is none.
        CheckpointCorrupt: it is a link, a folder or anything but a file.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise CheckpointIncomplete("this file is missing", path) from error
    except OSError as error:
        if os.path.islink(path):
            raise CheckpointCorrupt(
                "this is a link; a checkpoint's files are not opened through links", path
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointCorrupt("this is not a file", path)
    return fd


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
