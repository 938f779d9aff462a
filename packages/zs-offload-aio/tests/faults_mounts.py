"""File systems that fail on purpose. Root only; all of them live in a mount namespace of this process alone.

The namespace is what cleans up: when the process ends, however it ends, the mounts go and with them the loop devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 1 << 18, 2
_LOOP_CONFIGURE, _LOOP_CTL_GET_FREE, _LO_FLAGS_AUTOCLEAR = 0x4C0A, 0x4C82, 4
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


def own_namespace() -> None:
    """From now on this process's mounts are its own. Raises `OSError` where that is not allowed."""
    _check(_LIBC.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    _check(_LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount --make-rprivate /")


@contextlib.contextmanager
def mounted(source: str, folder: Path, kind: str, options: str = "", flags: int = 0) -> Iterator[Path]:
    """Mount on `folder` (made where it is missing); unmounted at the end in every case."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (source.encode(), os.fsencode(folder), kind.encode(), flags, options.encode())
    _check(_LIBC.mount(*arguments), f"mount -t {kind} -o '{options}' {source} {folder}")
    try:
        yield folder
    finally:
        if _LIBC.umount2(os.fsencode(folder), 0) != 0:
            _LIBC.umount2(os.fsencode(folder), _MNT_DETACH)


@contextlib.contextmanager
def loop_device(backing: Path, sector_nbytes: int = 512) -> Iterator[str]:
    """A block device over a file; the kernel frees it once nobody has it open or mounted."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    file = os.open(backing, os.O_RDWR | os.O_CLOEXEC)
    device = -1
    try:
        for _ in range(100):  # another process may take the number first
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            path = f"/dev/loop{number}"
            if not os.path.exists(path):
                os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, number))
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            # struct loop_config: u32 fd, u32 block_size, loop_info64 (lo_flags at its byte 52), u64 reserved[8]
            info = bytearray(232)
            struct.pack_into("I", info, 52, _LO_FLAGS_AUTOCLEAR)
            config = struct.pack("II", file, sector_nbytes) + bytes(info) + bytes(64)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
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


@contextlib.contextmanager
def loop_ext4(
    folder: Path, nbytes: int, *, sector_nbytes: int = 512, options: str = "", backing: Path | None = None
) -> Iterator[Path]:
    """A new ext4 without reserved blocks on a loop device, mounted at `folder / "mount"`.

    `backing` is the file under it (default: `folder / "image"`); it stays readable by that name, to be truncated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = backing or folder / "image"
    with open(image, "wb") as sparse:
        sparse.truncate(nbytes)
    journal = [] if "data=journal" in options else ["-O", "^has_journal"]
    with loop_device(image, sector_nbytes) as device:
        make = [_tool("mkfs.ext4"), "-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,nodiscard", *journal]
        subprocess.run([*make, device], check=True, capture_output=True)
        with mounted(device, folder / "mount", "ext4", options) as mount:
            os.chmod(mount, 0o777)
            (mount / "lost+found").rmdir()
            yield mount


@contextlib.contextmanager
def lying_disk(folder: Path, nbytes: int = 64 * MIB, real_nbytes: int = 16 * MIB) -> Iterator[Path]:
    """A file system with free space on a device without: writes to its blocks fail once they are written back."""
    with (
        mounted("none", folder / "small", "tmpfs", f"size={real_nbytes}") as small,
        loop_ext4(folder / "disk", nbytes, backing=small / "image") as mount,
    ):
        yield mount


@contextlib.contextmanager
def frozen(mount: Path) -> Iterator[None]:
    """Every write to this file system waits, in the kernel, until the end of the block."""
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os.close(fd)


def free_nbytes(mount: Path) -> int:
    """Bytes that can still be written."""
    found = os.statvfs(mount)
    return found.f_bavail * found.f_frsize


def fill(path: Path, leave_nbytes: int) -> None:
    """Take the file system's space but for `leave_nbytes`."""
    wanted = free_nbytes(path.parent) - leave_nbytes
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while wanted > 0:  # extents need a block of their own now and then
            with contextlib.suppress(OSError):
                os.posix_fallocate(fd, os.fstat(fd).st_size, wanted)
            wanted = min(wanted // 2, free_nbytes(path.parent) - leave_nbytes)
    finally:
        os.close(fd)


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; the tests that run as root need it (e2fsprogs)")
    return found


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
