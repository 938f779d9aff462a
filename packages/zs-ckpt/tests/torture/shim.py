"""Builds `shim.c` and controls it: where a process dies, which call fails, what is written to the log."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
CREATE, WRITE, TRUNCATE, ALLOCATE, FSYNC, RENAME, UNLINK, RMDIR, MKDIR, LINK, SYMLINK, OTHER = range(1, 13)
OPS = dict(enumerate("create write truncate allocate fsync rename unlink rmdir mkdir link symlink other".split(), 1))
BEFORE, AFTER, HALF = range(3)
KILL, STOP = range(2)
COMMIT = "manifest.json"  # whose rename is the commit


class Control(ctypes.Structure):
    """`struct control` of the shim."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("armed", "count", "at", "when", "how", "fail_at", "fail_errno")),
        *(
            (name, ctypes.c_int64)
            for name in ("committing", "committed", "hit_op", "failed_op", "hit_committed", "log_fd")
        ),
        *((name, ctypes.c_int64) for name in ("started", "returned")),
        ("commit", ctypes.c_char * 64),
        ("root", ctypes.c_char * 512),
        ("hit_path", ctypes.c_char * 512),
    ]

    def reset(self, root: str | os.PathLike[str]) -> None:
        """Nothing armed, nothing counted; `root` is the folder whose changes count."""
        ctypes.memset(ctypes.addressof(self), 0, ctypes.sizeof(self))
        self.log_fd = -1
        self.root = os.fsencode(os.path.realpath(root))
        self.commit = COMMIT.encode()

    def hit(self) -> str:
        """The call where it died or failed, for messages."""
        operation = OPS.get(self.hit_op or self.failed_op)
        if operation is None:
            return "-"
        root = os.fsdecode(self.root)
        return f"{operation} {os.path.relpath(os.fsdecode(self.hit_path), root)}"


def shared_control() -> Control:
    """Lies in memory that forked children share, so that it tells what they did before they died."""
    memory = mmap.mmap(-1, ctypes.sizeof(Control))
    return Control.from_buffer(memory)


def build(folder: Path) -> Path:
    """Compile the shim into `folder`. Raises `FileNotFoundError` where there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("the torture tests need a C compiler (cc)")
    library = folder / "shim.so"
    command = [*compiler.split(), "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return library


def preloaded() -> bool:
    return hasattr(ctypes.CDLL(None), "zs_shim_attach")


def attach(control: Control) -> None:
    """From now on this process obeys `control`. Raises `RuntimeError` where the shim is not preloaded."""
    if not preloaded():
        raise RuntimeError("the shim is not preloaded: start this by torture/drive.py, which sets LD_PRELOAD")
    ctypes.CDLL(None).zs_shim_attach(ctypes.byref(control))
