"""The page cache of one file, kept small: what was moved is written out and dropped."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os


class PageCache:
    """Drops parts of the file behind `fd` from the page cache, where the system can (on Linux).

    A process under a memory limit pays for the pages that its files hold; dirty ones cannot be dropped, so they are
    written out first.
    """

    _WAIT_WRITE_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | _WRITE | _WAIT_AFTER

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # of this range alone, without flushing the device: the content need not survive the machine
        self._sync_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
        if self._sync_range is not None:
            self._sync_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead, beyond what was asked for

    def drop(self, offset: int, nbytes: int, *, dirty: bool) -> None:
        """Let go of the pages that hold these bytes. Raises `OSError` where they could not be written."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = -(-(offset + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE - start
        if dirty:
            self._write_out(start, length)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, start, length, os.POSIX_FADV_DONTNEED)

    def _write_out(self, offset: int, nbytes: int) -> None:
        if self._sync_range is not None:
            if self._sync_range(self._fd, offset, nbytes, self._WAIT_WRITE_WAIT) == 0:
                return
            number = ctypes.get_errno()
            if number not in (errno.ENOSYS, errno.ESPIPE, errno.EINVAL):
                raise OSError(number, os.strerror(number))
        os.fdatasync(self._fd)
