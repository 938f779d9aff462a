"""One process at a time saves to a tag: a lock that the kernel releases when the process ends, however it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from .durable import make_folder, naming
from .errors import CheckpointBusy
from .names import LOCK

_WITHOUT = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_log = logging.getLogger("zs_ckpt")


class TagLock:
    """The lock on a tag's folder, held until `release`. `exclusive`: False where the file system has no locks.

    `patience_s`: how long to wait for a holder that has not said that it saves.

    Raises:
        CheckpointBusy: another process holds it; the message has its process id and host.
    """

    def __init__(self, folder: Path, save_id: str = "", *, patience_s: float = 0.0) -> None:
        self._path = folder / LOCK
        self._fd = -1
        self.exclusive = True
        deadline = time.monotonic() + patience_s
        while self._fd < 0:
            try:
                self._try()
            except CheckpointBusy:
                # who has left no word collects leftovers, or is about to leave it: milliseconds
                if time.monotonic() >= deadline or self._word():
                    raise
                time.sleep(0.005)
        if save_id:
            self.say(save_id)

    def say(self, save_id: str) -> None:
        """Leave word for those who find the lock taken. Raises OSError: on a full disk, with the lock released."""
        word = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "save_id": save_id})
        try:
            with naming(self._path):
                os.ftruncate(self._fd, 0)
                os.write(self._fd, word.encode())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let others save to the tag. May be called again."""
        if self._fd >= 0:
            with suppress(OSError):
                os.unlink(self._path)  # while it is held: who opened it before finds another file in its place
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TagLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _word(self) -> str:
        with suppress(OSError):
            return self._path.read_text()
        return ""

    def _try(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            fd = os.open(self._path, flags, 0o666)
        except FileNotFoundError:
            make_folder(self._path.parent)  # another process took it for a leftover, before the lock was in it
            return
        try:
            held = _lock(fd)
            if held is False:
                raise CheckpointBusy(f"another process is saving here: {_holder(fd)}", self._path)
            try:
                same = os.path.samestat(os.fstat(fd), os.stat(self._path, follow_symlinks=False))
            except FileNotFoundError:
                same = False
            if not same:  # its holder took it away between the open and the lock
                os.close(fd)
                return
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        self._fd, self.exclusive = fd, held is True


def _lock(fd: int) -> bool | None:
    """False where another has it; None where the platform or the file system has no locks, and so no protection."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
        _log.warning("this file system has no locks (%s): nothing keeps two processes from saving to one tag", error)
        return None
    return True


def _holder(fd: int) -> str:
    try:
        word = json.loads(os.pread(fd, 4096, 0))
        return f"process {word['pid']} on {word['host']}, save {word['save_id']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has left no word yet"
