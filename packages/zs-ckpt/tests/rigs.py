"""Small rigs for what can go wrong around a checkpoint: a child with limits, another user, a disk that is full.

answer = in_child(work, argument)      runs work(argument) in a fork; its exception fails the test here
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pickle
import resource
import shutil
import signal
import stat
import struct
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NOBODY = 65534
_LIBC = ctypes.CDLL(None, use_errno=True)


class ChildFailed(AssertionError):
    """What went wrong in a forked child."""


def in_child(work: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> Any:
    """What `work(*arguments)` returns in a forked child; `ChildFailed` where it raised, died or hangs."""
    reader, writer = os.pipe()  # which no limit on files stops; an answer fits into it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where the process has threads
        pid = os.fork()
    if pid == 0:
        try:
            found = pickle.dumps((True, work(*arguments)))
        except BaseException:
            found = pickle.dumps((False, traceback.format_exc()[-30_000:]))
        os.write(writer, found)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        _await(pid, timeout_s)
        done, value = pickle.load(answer)
    if not done:
        raise ChildFailed(f"in the child:\n{value}")
    return value


def _await(pid: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise ChildFailed(f"the child hung for {timeout_s} s")
        time.sleep(0.002)
    if ended[1]:
        raise ChildFailed(f"the child died: status {ended[1]}")


# ---- to be called in a child: they cannot be taken back ----


def become_nobody() -> None:
    """An ordinary user, where this is root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def limit_file_size(nbytes: int) -> None:
    """Files cannot grow past this: a full disk for who has no disk to fill."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def limit_memory(more_nbytes: int) -> None:
    """At most this much more address space than there is now."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_nbytes, now + more_nbytes))


def own_mounts() -> None:
    """From now on this process's mounts are its own, and end with it."""
    _check(_LIBC.unshare(0x20000), "unshare(CLONE_NEWNS)")
    _check(_LIBC.mount(b"none", b"/", None, 0x4000 | 1 << 18, None), "mount --make-rprivate /")


# ---- a disk ----


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A new ext4 of this size on a loop device. Root only, after `own_mounts`."""
    image, mount = folder / "image", folder / "mount"
    mount.mkdir(parents=True)
    with open(image, "wb") as file:
        file.truncate(nbytes)
    with _loop_device(image) as device:
        make = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if make is None:
            raise FileNotFoundError("mkfs.ext4 is not installed; this test needs it (e2fsprogs)")
        subprocess.run([make, "-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal", device], check=True)
        _check(_LIBC.mount(device.encode(), os.fsencode(mount), b"ext4", 0, b""), f"mount {device}")
        try:
            yield mount
        finally:
            if _LIBC.umount2(os.fsencode(mount), 0):
                _LIBC.umount2(os.fsencode(mount), 2)


@contextlib.contextmanager
def _loop_device(backing: Path) -> Iterator[str]:
    control, file = os.open("/dev/loop-control", os.O_RDWR), os.open(backing, os.O_RDWR)
    device = -1
    try:
        for _ in range(100):  # another process may take the number first
            number = fcntl.ioctl(control, 0x4C82)  # LOOP_CTL_GET_FREE
            path = f"/dev/loop{number}"
            if not os.path.exists(path):
                os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, number))
            device = os.open(path, os.O_RDWR)
            info = bytearray(232)  # struct loop_info64
            struct.pack_into("I", info, 52, 4)  # LO_FLAGS_AUTOCLEAR: gone with the last who has it open
            try:
                fcntl.ioctl(device, 0x4C0A, struct.pack("II", file, 512) + bytes(info) + bytes(64))  # LOOP_CONFIGURE
                break
            except OSError:
                os.close(device)
                device = -1
        if device < 0:
            raise OSError(f"no loop device could be taken for {backing}")
        yield path
    finally:
        for fd in (device, file, control):
            if fd >= 0:
                os.close(fd)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
