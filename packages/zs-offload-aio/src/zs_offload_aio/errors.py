"""What can go wrong with a file, as exceptions that name it: path, offset, bytes, errno and backend."""

from __future__ import annotations

import errno
import os
from typing import Any


class AioError(OSError):
    """A transfer, or an operation on a file, failed.

    `errno`, `strerror` and `filename` as `OSError` has them. `offset` and `nbytes`: of the part that failed, in bytes
    (0 and 0 where the whole file is meant); `done_nbytes`: how much of the request was transferred; `backend`: what
    carried it.
    """

    offset: int = 0
    nbytes: int = 0
    done_nbytes: int = 0
    backend: str = ""

    def __str__(self) -> str:
        where = f", {self.nbytes} bytes at offset {self.offset}" if self.nbytes or self.offset else ""
        done = f", {self.done_nbytes} bytes done" if self.done_nbytes else ""
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"[{name}] {self.strerror}: {self.filename!r}{where}{done} ({self.backend})"


class AioNotFound(AioError, FileNotFoundError):
    """There is no such file or folder."""


class AioExists(AioError, FileExistsError):
    """The file that was to be new is there already."""


class AioPermission(AioError, PermissionError):
    """The file or folder may not be used like this."""


class AioIsADirectory(AioError, IsADirectoryError):
    """It is a folder."""


class AioNotADirectory(AioError, NotADirectoryError):
    """A part of the path is no folder."""


class ShortRead(AioError):
    """The file ends before the request does. `offset` and `nbytes`: of the request; `done_nbytes`: what there was."""

    def __str__(self) -> str:
        end = f"at {self.offset + self.done_nbytes}" if self.done_nbytes else f"at or before {self.offset}"
        wanted = f"wanted {self.nbytes} bytes at offset {self.offset}, found {self.done_nbytes}"
        return f"{self.filename!r} ends {end}: {wanted} ({self.backend})"


class AioCancelled(AioError):
    """The request was cancelled before all of it was begun. `done_nbytes`: what was transferred all the same."""


_CLASSES: dict[int, type[AioError]] = {
    errno.ENOENT: AioNotFound,
    errno.EEXIST: AioExists,
    errno.EACCES: AioPermission,
    errno.EPERM: AioPermission,
    errno.EISDIR: AioIsADirectory,
    errno.ENOTDIR: AioNotADirectory,
    errno.ENODATA: ShortRead,
    errno.ECANCELED: AioCancelled,
}


def make(number: int, path: Any, offset: int, nbytes: int, done_nbytes: int, backend: str) -> AioError:
    """The exception for errno `number`."""
    name = os.fspath(path) if path is not None else None
    error = _CLASSES.get(number, AioError)(number, os.strerror(number), name)
    error.offset, error.nbytes, error.done_nbytes, error.backend = offset, nbytes, max(done_nbytes, 0), backend
    return error


class BackendUnavailable(AioError):
    """A backend that was asked for does not work here; the text says why."""

    def __str__(self) -> str:
        return str(self.strerror)


def unavailable(number: int, backend: str, reason: str) -> BackendUnavailable:
    """The exception for a backend that could not start."""
    error = BackendUnavailable(number, f"the {backend} backend does not work here: {reason or os.strerror(number)}")
    error.backend = backend
    return error
