"""What moves blocks: the store and the host optimizer that are installed, or the plain ones.

A mode says which: "aio" takes what `zs-offload-aio` provides or fails, "file" and "memory" take the plain
implementations, and "auto" takes the fastest there is, and says once what to install where that is a plain one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from zs_comm import ConfigError, MissingPackage

from .. import block_store, host_optimizer
from ..block_store import BlockStore
from ..host_optimizer import HostOptimizer
from ..stores import FileStore, MemoryStore
from .folder import TierFolder
from .policy import Files

log = logging.getLogger("zs_zero")

STORES = "zs_zero.block_stores"  # entry points: called with a folder and the options of `open_store`
OPTIMIZERS = "zs_zero.host_optimizers"  # entry points: called without arguments
CACHE_NBYTES = 8 << 20  # page cache of a FileStore under a memory limit, bytes
_INSTALL = "pip install 'zs-zero[nvme]'"
_MOUNTS = Path("/proc/self/mounts")
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_OPTIONS = ("block_size", "queue_depth", "threads", "backend", "direct")

StoreName: TypeAlias = Literal["aio", "file", "memory"]


def open_store(files: Files, folder: TierFolder, kind: str, *, bounded_cache: bool) -> tuple[BlockStore, StoreName]:
    """An empty store for blocks of `kind`, and what it is.

    `files.options` are passed on: `block_size` (bytes of a transfer), `queue_depth` (transfers in flight), `threads`,
    `backend` and `direct`, each where it is not None; the plain file store uses `threads` alone. With `bounded_cache`
    the page cache holds at most `CACHE_NBYTES` of the file.

    Raises `MissingPackage` where "aio" is asked for and not installed, `ConfigError` for an unknown mode or option, for
    a provider of another `PROTOCOL`, where "aio" cannot bypass the page cache and must, and for a folder that is in
    memory while that is limited; `OSError` with the path.
    """
    options = {name: value for name, value in files.options.items() if value is not None}
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ConfigError(f"unknown options of a store: {unknown}; there are {list(_OPTIONS)}")
    if files.store not in ("auto", "aio", "file", "memory"):
        raise ConfigError(f"store {files.store!r}: one of 'auto', 'aio', 'file', 'memory'")
    if files.store == "memory":
        return MemoryStore(), "memory"
    if (system := file_system(folder.path)) in _IN_MEMORY:
        if bounded_cache:
            raise ConfigError(
                f"{folder.path} is on a {system}, which is memory, and a memory limit is set: name a folder on a disk"
            )
        _say(folder, "%s is on a %s: what is offloaded there stays in memory", folder.path, system)
    if files.store != "file":
        fast, why = _fast_store(files.store, folder, options, bounded_cache=bounded_cache)
        if fast is not None:
            return fast, "aio"
        _say(folder, "offloaded state goes through plain files, which are slower: %s", why)
    path = os.path.join(folder.path, f"{kind}.blocks")
    cache = CACHE_NBYTES if bounded_cache else None
    return FileStore(path, threads=options.get("threads") or 2, cache_nbytes=cache), "file"


def file_system(path: str) -> str | None:
    """The type of the file system that a path is on ("ext4", "tmpfs"); None where the platform does not tell."""
    where, found = os.path.realpath(path), None
    with contextlib.suppress(OSError):
        longest = -1
        for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
            mount, system = line.split()[1:3]
            mount = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount)  # a space is \040 there
            if len(mount) >= longest and os.path.commonpath([where, mount]) == mount:
                longest, found = len(mount), system
    return found


def _say(folder: TierFolder, message: str, *args: str) -> None:
    """Once, by one rank."""
    text = message % args
    if text not in folder.said:
        folder.said.add(text)
        if folder.first:
            log.warning("%s", text)


def is_plain(files: Files) -> bool:
    """Whether blocks of `files` go through the page cache."""
    return files.store == "file" or (files.store == "auto" and not _loads(STORES))


def _loads(group: str) -> bool:
    """Whether a provider is there, and can be imported."""
    point = _provider(group)
    try:
        return point is not None and point.load() is not None
    except ImportError:
        return False


def open_host_optimizer(mode: str = "auto") -> HostOptimizer | None:
    """The fused host optimizer that is installed; None where there is none, or `mode` is "torch".

    Raises `MissingPackage` where `mode` is "aio" and there is none, `ConfigError` for another `PROTOCOL`.
    """
    if mode not in ("auto", "aio", "torch"):
        raise ConfigError(f"host optimizer {mode!r}: one of 'auto', 'aio', 'torch'")
    point = None if mode == "torch" else _provider(OPTIMIZERS)
    if point is None:
        if mode == "aio":
            raise MissingPackage("the fused host optimizer", "zs-offload-aio", _INSTALL)
        return None
    try:
        made: HostOptimizer = point.load()()
    except ImportError:  # installed for another machine, say
        if mode == "aio":
            raise
        return None
    _check(made, host_optimizer.PROTOCOL, HostOptimizer, point)
    return made


def _fast_store(
    mode: str, folder: TierFolder, options: Mapping[str, Any], *, bounded_cache: bool
) -> tuple[BlockStore | None, str]:
    """The provided store, or None and why not."""
    point = _provider(STORES)
    if point is None:
        if mode == "aio":
            raise MissingPackage("the store 'aio'", "zs-offload-aio", _INSTALL)
        return None, f"zs-offload-aio makes them fast: {_INSTALL}"
    try:
        provider = point.load()
    except ImportError as error:
        if mode == "aio":
            raise
        return None, f"zs-offload-aio is installed but cannot be imported: {error}"
    made: BlockStore = provider(folder.path, **options)
    _check(made, block_store.PROTOCOL, BlockStore, point)
    if not bounded_cache or (reason := _cached(made)) is None:
        return made, ""
    made.close()
    if mode == "aio":
        raise ConfigError(
            f"{folder.path}: a memory limit needs files that bypass the page cache, and here they do not "
            f"({reason}); use another disk, or the store 'auto' or 'file'"
        )
    return None, f"files in {folder.path} do not bypass the page cache ({reason}), and a memory limit is set"


def _cached(store: BlockStore) -> str | None:
    """Why the store's file goes through the page cache; None where it does not, or the store does not tell."""
    stats = getattr(store, "stats", None)
    found: Mapping[str, Any] = stats() if callable(stats) else {}
    return str(found.get("reason") or "asked for") if found.get("mode") == "buffered" else None


def _provider(group: str) -> importlib.metadata.EntryPoint | None:
    """Of several, the one of the name "aio", else the first by name."""
    points = sorted(importlib.metadata.entry_points(group=group), key=lambda point: (point.name != "aio", point.name))
    return points[0] if points else None


def _check(made: Any, version: int, protocol: type, point: importlib.metadata.EntryPoint) -> None:
    found = getattr(made, "PROTOCOL", None)
    if found != version or not isinstance(made, protocol):
        close = getattr(made, "close", None)
        if callable(close):
            close()
        raise ConfigError(
            f"{point.group}: {point.value} keeps version {found} of {protocol.__name__}, version {version} is needed: "
            "install a zs-offload-aio that fits this zs-zero"
        )
