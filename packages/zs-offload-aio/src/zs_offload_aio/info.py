"""What this machine offers the engine, as rows of (name, value)."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import _core
from ._core import File
from .engine import Engine, backends

Rows = list[tuple[str, str]]


def rows(path: str | None) -> Rows:
    """Everything, about `path` (a file, or a folder in which an unnamed file is made for a moment) too.

    Raises `OSError` where there is no such file or folder.
    """
    about_path = _path(path) if path is not None else []
    return [*_backends(), *about_path, *_limits(), *_memory(), *_optimizers()]


def _backends() -> Rows:
    found: Rows = [("version", _version()), ("kernel", f"{platform.system()} {platform.release()}")]
    states = backends()
    found += [(f"backend {name}", f"does not work: {why}" if why else "works") for name, why in states.items()]
    asked = os.environ.get("ZS_AIO_BACKEND")
    if asked:
        return [*found, ("used", f"{asked} (ZS_AIO_BACKEND)")]
    return [*found, ("used", next((name for name, why in states.items() if not why), "none"))]


def _version() -> str:
    try:
        return version("zs-offload-aio")
    except PackageNotFoundError:
        return "not installed (run from its source)"


def _path(path: str) -> Rows:
    with Engine() as engine:
        if not os.path.isdir(path):
            with engine.open(path, "r") as file:
                return _file(path, file)
        name = os.path.join(path, f"zs-info-{os.getpid()}-{secrets.token_hex(6)}.tmp")
        try:
            with engine.open(name, "x") as file:
                os.unlink(name)
                return _file(path, file)
        except OSError as error:
            unknown = f"unknown: no file can be made there ({error.strerror})"
            return [("path", path), ("transfers", unknown), *_disk(os.stat(path).st_dev)]


def _file(path: str, file: File) -> Rows:
    found: Rows = [("path", path), ("transfers", file.mode + (f": {file.reason}" if file.reason else ""))]
    if file.mode == "direct":
        found += [
            ("alignment of offsets", f"{file.offset_alignment} bytes"),
            ("alignment of memory", f"{file.memory_alignment} bytes"),
        ]
    return found + _disk(os.stat(path).st_dev)


def _disk(device: int) -> Rows:
    """Of the queue behind a file system, where it has one disk behind it."""
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    queue = next((place for place in (node / "queue", node / ".." / "queue") if place.is_dir()), None)
    if queue is None:
        return [("disk", "none that the system tells of")]
    found: Rows = [("disk", node.resolve().name)]
    for name, meaning in (
        ("max_sectors_kb", "KiB in one request at most"),
        ("max_segments", "pieces of memory in one request at most"),
        ("nr_requests", "requests in the queue"),
        ("scheduler", ""),
        ("write_cache", ""),
    ):
        value = _read(queue / name)
        if value is not None:
            found.append((name, f"{value}  ({meaning})" if meaning else value))
    return found


def _limits() -> Rows:
    found: Rows = []
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        for name, limit in (("memlock", resource.RLIMIT_MEMLOCK), ("open files", resource.RLIMIT_NOFILE)):
            soft, _ = resource.getrlimit(limit)
            found.append((f"limit of {name}", "none" if soft == resource.RLIM_INFINITY else str(soft)))
    used, most = _read(Path("/proc/sys/fs/aio-nr")), _read(Path("/proc/sys/fs/aio-max-nr"))
    if most is not None:
        found.append(("aio-max-nr", f"{most} ({used} in use)"))
    disabled = _read(Path("/proc/sys/kernel/io_uring_disabled"))
    if disabled is not None:
        meaning = {"0": "allowed for all", "1": "allowed for a group", "2": "forbidden"}
        found.append(("io_uring_disabled", f"{disabled} ({meaning.get(disabled, 'unknown')})"))
    return found


def _memory() -> Rows:
    setting = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    if setting is None:
        return [("huge pages", "none that the system tells of")]
    chosen = setting.partition("[")[2].partition("]")[0] or setting
    meaning = {"always": "used", "madvise": "used for this package's buffers", "never": "not used"}
    return [("huge pages", f"{chosen} ({meaning.get(chosen, 'unknown')})")]


def _optimizers() -> Rows:
    isas = getattr(_core, "isas", None)
    if isas is None:
        return []
    asked = os.environ.get("ZS_ISA")
    return [("instruction sets", ", ".join(isas()) + (f" (ZS_ISA={asked})" if asked else ""))]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
