"""Which store and which optimizer are taken: forced modes never fall back, and `auto` says once what is missing."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from zs_comm import ConfigError, Group, MissingPackage
from zs_zero.host_optimizer import TorchHostOptimizer
from zs_zero.stores import FileStore, MemoryStore
from zs_zero.tiers import opening
from zs_zero.tiers.folder import TierFolder
from zs_zero.tiers.opening import CACHE_NBYTES, file_system, open_host_optimizer, open_store
from zs_zero.tiers.policy import Files


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TierFolder]:
    with TierFolder(str(tmp_path), job=None, group=Group.single()) as made:
        yield made


class Fast(MemoryStore):
    """As `zs_offload_aio.NvmeStore` is called."""

    made: dict[str, Any]
    mode = "direct"

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__()
        self.folder, self.options, self.closed = folder, options, False

    def stats(self) -> dict[str, str]:
        return {"mode": self.mode, "reason": "ramfs does not do it"}

    def close(self) -> None:
        self.closed = True
        super().close()


class Buffered(Fast):
    mode = "buffered"
    last: Fast

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(folder, **options)
        Buffered.last = self


class Old(Fast):
    PROTOCOL = 0


class OldOptimizer(TorchHostOptimizer):
    PROTOCOL = 7


def cannot_import() -> None:
    raise ImportError("wrong ELF class")


class Point:
    name, value = "aio", "zs_offload_aio.store:NvmeStore"

    def __init__(self, group: str, provider: Any) -> None:
        self.group = group
        self.provider = provider

    def load(self) -> Any:
        return cannot_import() if self.provider is cannot_import else self.provider


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """What the entry points of a group provide."""

    def installed(*providers: Any, names: tuple[str, ...] = ()) -> None:
        def points(*, group: str) -> list[Point]:
            found = [Point(group, provider) for provider in providers]
            for point, name in zip(found, names, strict=False):
                point.name = name
            return found

        monkeypatch.setattr(importlib.metadata, "entry_points", points)

    monkeypatch.setattr(opening, "file_system", lambda path: "ext4")
    installed()
    return installed


def files(store: str = "auto", **options: Any) -> Files:
    return Files(folder="unused", store=store, options=options)  # type: ignore[arg-type]


def test_auto_takes_what_is_installed(folder: TierFolder, install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install(Fast)
    options = {"block_size": 1 << 20, "queue_depth": 8, "threads": 2, "backend": "threads", "direct": True}
    store, name = open_store(files(**options), folder, "optimizer", bounded_cache=True)
    assert isinstance(store, Fast) and name == "aio"
    assert (store.folder, store.options) == (folder.path, options)
    store, _ = open_store(files("aio", block_size=None, threads=None), folder, "parameters", bounded_cache=False)
    assert isinstance(store, Fast) and store.options == {}, "what is None is left to the store"
    assert caplog.text == ""


def test_the_provider_of_the_name_aio_comes_first(folder: TierFolder, install: Install) -> None:
    install(Buffered, Fast, names=("a", "aio"))
    store, _ = open_store(files(), folder, "optimizer", bounded_cache=False)
    assert type(store) is Fast


def test_auto_falls_back_and_says_so_once(
    folder: TierFolder, install: Install, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.WARNING, "zs_zero")
    for kind in ("optimizer", "gradients", "parameters"):
        store, name = open_store(files(threads=3), folder, kind, bounded_cache=False)
        assert isinstance(store, FileStore) and name == "file"
        assert store.path == os.path.join(folder.path, f"{kind}.blocks")
        assert store.cache_nbytes is None and len(store._threads) == 3
        store.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install 'zs-zero[nvme]'" in caplog.text and "zs-offload-aio" in caplog.text
    with TierFolder(str(tmp_path), job=None, group=Group.single()) as another:
        open_store(files(), another, "optimizer", bounded_cache=False)[0].close()
    assert len(caplog.records) == 2, "once per engine"


def test_forced_modes_do_not_fall_back(folder: TierFolder, install: Install, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MissingPackage, match=r"pip install 'zs-zero\[nvme\]'") as caught:
        open_store(files("aio"), folder, "optimizer", bounded_cache=False)
    assert caught.value.needs == "zs-offload-aio"
    install(Fast)
    store, name = open_store(files("file"), folder, "optimizer", bounded_cache=False)
    assert isinstance(store, FileStore) and name == "file"
    store.close()
    store, name = open_store(files("memory"), folder, "optimizer", bounded_cache=False)
    assert type(store) is MemoryStore and name == "memory"
    assert caplog.text == ""


def test_a_package_that_cannot_be_imported(
    folder: TierFolder, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(cannot_import)
    with pytest.raises(ImportError, match="wrong ELF class"):
        open_store(files("aio"), folder, "optimizer", bounded_cache=False)
    store, name = open_store(files(), folder, "optimizer", bounded_cache=False)
    assert name == "file"
    store.close()
    assert "cannot be imported: wrong ELF class" in caplog.text


def test_under_a_limit_the_page_cache_is_bounded(
    folder: TierFolder, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = open_store(files("file"), folder, "optimizer", bounded_cache=True)
    assert isinstance(store, FileStore) and store.cache_nbytes == CACHE_NBYTES
    store.close()
    install(Buffered)
    store, name = open_store(files(), folder, "optimizer", bounded_cache=True)
    assert isinstance(store, FileStore) and store.cache_nbytes == CACHE_NBYTES and name == "file"
    store.close()
    assert Buffered.last.closed
    assert "do not bypass the page cache (ramfs does not do it), and a memory limit is set" in caplog.text
    with pytest.raises(ConfigError, match="bypass the page cache, and here they do not"):
        open_store(files("aio"), folder, "optimizer", bounded_cache=True)
    assert Buffered.last.closed
    store, name = open_store(files("aio"), folder, "optimizer", bounded_cache=False)
    assert (type(store), name) == (Buffered, "aio")


def test_another_protocol_is_refused(folder: TierFolder, install: Install) -> None:
    for provider in (Old, lambda folder: object()):
        install(provider)
        with pytest.raises(ConfigError, match="NvmeStore keeps version (0|None) of BlockStore, version 1 is needed"):
            open_store(files(), folder, "optimizer", bounded_cache=False)


def test_what_is_no_mode_and_no_option(folder: TierFolder, install: Install) -> None:
    with pytest.raises(ConfigError, match="store 'fast': one of 'auto', 'aio', 'file', 'memory'"):
        open_store(files("fast"), folder, "optimizer", bounded_cache=False)
    with pytest.raises(ConfigError, match=r"unknown options of a store: \['blocksize'\]"):
        open_store(files(blocksize=4096), folder, "optimizer", bounded_cache=False)


def test_a_folder_that_vanished_is_an_error_with_its_path(folder: TierFolder, install: Install) -> None:
    os.unlink(os.path.join(folder.path, "lock"))
    os.rmdir(folder.path)
    with pytest.raises(FileNotFoundError, match=folder.path):
        open_store(files(), folder, "optimizer", bounded_cache=False)


def test_host_optimizers(install: Install) -> None:
    assert open_host_optimizer() is None
    assert open_host_optimizer("torch") is None
    with pytest.raises(MissingPackage, match="zs-offload-aio"):
        open_host_optimizer("aio")
    install(TorchHostOptimizer)
    assert isinstance(open_host_optimizer(), TorchHostOptimizer)
    assert isinstance(open_host_optimizer("aio"), TorchHostOptimizer)
    assert open_host_optimizer("torch") is None
    install(OldOptimizer)
    with pytest.raises(ConfigError, match="keeps version 7 of HostOptimizer, version 1 is needed"):
        open_host_optimizer()
    install(cannot_import)
    assert open_host_optimizer() is None
    with pytest.raises(ImportError, match="wrong ELF"):
        open_host_optimizer("aio")
    with pytest.raises(ConfigError, match="host optimizer 'fast'"):
        open_host_optimizer("fast")


# -- a folder that is memory -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("store", ["auto", "aio", "file"])
@pytest.mark.parametrize("system", ["tmpfs", "ramfs"])
def test_a_folder_in_memory(
    store: str, system: str, folder: TierFolder, install: Install, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    install(Fast)
    monkeypatch.setattr(opening, "file_system", lambda path: system)
    refused = rf"{re.escape(folder.path)} is on a {system}, which is memory, and a memory limit is set"
    with pytest.raises(ConfigError, match=refused):
        open_store(files(store), folder, "optimizer", bounded_cache=True)
    caplog.set_level(logging.WARNING, "zs_zero")
    for kind in ("optimizer", "gradients"):
        open_store(files(store), folder, kind, bounded_cache=False)[0].close()
    told = f"{folder.path} is on a {system}: what is offloaded there stays in memory"
    assert [record.getMessage() for record in caplog.records] == [told]
    assert open_store(files("memory"), folder, "parameters", bounded_cache=True)[1] == "memory"


def test_the_file_system_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        assert file_system("/proc/self/status") == "proc"
        assert file_system("/proc/self/../no such file") == "proc"
    where = os.path.realpath(tmp_path)
    table = tmp_path / "mounts"
    mounts = [("", "xfs"), (r"/a\040b", "tmpfs"), (r"/a\040b", "ramfs"), ("/a", "nfs")]
    lines = ["disk / ext4 rw 0 0", *(f"disk {where}{path} {system} rw 0 0" for path, system in mounts)]
    table.write_text("\n".join(lines))
    monkeypatch.setattr(opening, "_MOUNTS", table)
    expected = {"a b/c": "ramfs", "a/b": "nfs", "ab": "xfs", "": "xfs", "..": "ext4"}  # the last mount covers others
    assert {path: file_system(os.path.join(where, path)) for path in expected} == expected
    table.unlink()
    assert file_system(where) is None
