"""How bytes reach files: two Protocols, and the choice between their implementations.

    writer.write(path, [header, tensor, ...]).wait()    the file holds exactly these bytes
    writer.sync(path)                                   and they are on the disk
    reader.read(path, offset, buf).wait()               `buf` is filled from there

zs-offload-aio keeps both Protocols and is found by the entry point `aio` in the group `zs_ckpt.blob_io`: an object, or
a module, with the factories `writer()` and `reader()`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from typing_extensions import Buffer
from zs_comm import ConfigError, MissingPackage

PROTOCOL = 1
GROUP = "zs_ckpt.blob_io"
MODES = ("auto", "aio", "threads")

_log = logging.getLogger("zs_ckpt")


@runtime_checkable
class Ticket(Protocol):
    """A write or a read that was started."""

    @property
    def done(self) -> bool:
        """Has it ended, well or not?"""

    def wait(self, timeout_s: float = ...) -> Any:
        """Return when it is done. Raises OSError where it failed, TimeoutError where it takes longer."""


@runtime_checkable
class BlobWriter(Protocol):
    """Writes whole files. Safe to call from several threads."""

    PROTOCOL: int

    def write(self, path: str, buffers: Iterable[Buffer]) -> Ticket:
        """Start making the file at `path` hold exactly these bytes, one buffer after the other.

        What was there is replaced. Space is taken before the first byte. The buffers do not change before the ticket is
        done. Raises OSError at once, or from the ticket: no folder, no permission, no space.
        """

    def sync(self, path: str) -> None:
        """Wait for the writes to `path`, then return when they are on the disk.

        Raises OSError where a write or the sync failed, and again at each later call for this path.
        """

    def close(self) -> None:
        """Finish what is in flight. May be called again."""


@runtime_checkable
class BlobReader(Protocol):
    """Reads parts of files. Safe to call from several threads."""

    PROTOCOL: int

    def read(self, path: str, offset: int, buf: Buffer) -> Ticket:
        """Start filling `buf` with the file's bytes from `offset` on.

        Raises OSError, at once or from the ticket: no such file, or the file ends before the buffer does.
        """

    def close(self) -> None:
        """Finish what is in flight and close the files. May be called again."""


def open_writer(io: str = "auto") -> BlobWriter:
    """A writer for the mode `io`.

    Raises:
        ConfigError: there is no such mode.
        MissingPackage: `io="aio"` without zs-offload-aio; a mode that was asked for never becomes another one.
    """
    factory = _factory(io)
    if factory is not None:
        writer: BlobWriter = _checked(factory.writer(), BlobWriter)
        return writer
    from .files import FileWriter

    return FileWriter()


def open_reader(io: str = "auto") -> BlobReader:
    """A reader for the mode `io`; raises as `open_writer`."""
    factory = _factory(io)
    if factory is not None:
        reader: BlobReader = _checked(factory.reader(), BlobReader)
        return reader
    from .files import FileReader

    return FileReader()


def wait_for(ticket: Ticket) -> None:
    """Until it has ended, however long a slow disk takes; raises what the ticket raises."""
    while True:
        try:
            ticket.wait(600.0)
            return
        except TimeoutError:
            if ticket.done:
                raise


def check_mode(io: str) -> str:
    if io not in MODES:
        raise ConfigError(f"io is {io!r}; it must be one of {', '.join(MODES)}")
    return io


def _factory(io: str) -> Any:
    """What makes aio's writer and reader; None for threads."""
    if check_mode(io) == "threads":
        return None
    found = _provider(tuple(sys.path), importlib.metadata.entry_points)
    if found is None:
        if io == "aio":
            raise MissingPackage("io='aio'", "zs-offload-aio", "pip install 'zs-ckpt[aio]'")
        _say_threads()
        return None
    try:
        return found.load()
    except Exception as error:
        if io == "aio":
            raise
        _log.warning("checkpoints are written by threads: zs-offload-aio does not load: %s", error)
        return None


@functools.lru_cache(maxsize=1)  # a search of the whole environment, for every save and load
def _provider(path: tuple[str, ...], entry_points: Callable[..., Any]) -> Any:
    """The entry point `aio`; None where no package on `path` declares it."""
    return next((point for point in entry_points(group=GROUP) if point.name == "aio"), None)


def _checked(made: Any, protocol: type) -> Any:
    version = getattr(made, "PROTOCOL", None)
    if version != PROTOCOL or not isinstance(made, protocol):
        raise ConfigError(
            f"{type(made).__name__} keeps version {version} of {protocol.__name__}; version {PROTOCOL} is needed"
        )
    return made


@functools.cache  # once
def _say_threads() -> None:
    _log.info("checkpoints are written by threads; asynchronous I/O comes with: pip install 'zs-ckpt[aio]'")
