"""Steps of the commit that have to reach the disk, in this order: data, its name, the folder that has the name.

An error of fsync is final for its file: the kernel reports a loss once, then forgets it and calls the pages clean. The
file is removed and the error raised; nothing is ever synced a second time in the hope that it was all right after all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .names import temporary


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of the body names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def sync_folder(folder: Path) -> None:
    """The folder's entries are on the disk. Where a folder cannot be synced (Windows), the file system sees to it."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """The folder with its parents, each durable in its own parent."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        with suppress(FileExistsError):
            one.mkdir()
        sync_folder(one.parent)


def publish(path: Path, raw: bytes, save_id: str) -> None:
    """The file at `path` has these bytes, or is what it was; when this returns it has them for good.

    Raises:
        OSError: the disk is full, the folder is read-only, or the write was lost; nothing is left behind.
    """
    unfinished = path.with_name(temporary(path.name, save_id))
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(unfinished, flags | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with naming(unfinished):
                view = memoryview(raw)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
        finally:
            os.close(fd)
        put_in_place(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a file whose content is on the disk its name, for good."""
    os.replace(unfinished, path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Take a file away, if it is there and may be taken: what stays is collected by a later save."""
    with suppress(OSError):
        os.unlink(path)
