"""The bytes of parts on their way to a file, with the checksums of what passes through.

Parts in host memory are written from where they are, and summed beside the writing. Parts on a device come through two
buffers of host memory in turn, where the writer takes one buffer after the other; through a copy of all of them, where
it wants everything at once. Parts that are not in memory come through two buffers always: `open_writer_for` gives a
writer that takes them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor
from zs_comm.views import bytes_of

from .blob import BlobWriter, Ticket, open_writer, wait_for
from .files import FileWriter
from .handover import hand_over
from .hostcopy import HostBuffer, wait_for_devices
from .shardfile import Layout, Part, checksums, extent_nbytes, extent_seed, sum_nbytes

_BUFFER_NBYTES = 16 << 20  # a multiple of every extent
_LAZY_NBYTES = 4 << 20  # of a buffer for what is not in memory, where memory is short: the largest extent

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def any_lazy(parts: Iterable[Part]) -> bool:
    """Whether values of some part are not in memory."""
    return any(part.source is not None for part in parts)


def open_writer_for(parts: Iterable[Part], io: str) -> BlobWriter:
    """A writer for the mode `io`, and a `FileWriter` where it has to take what is not in memory and cannot."""
    writer = open_writer(io)
    if not any_lazy(parts) or (getattr(writer, "streams", False) and not isinstance(writer, FileWriter)):
        return writer
    writer.close()
    return FileWriter(past_cache=True)


def write_parts(
    path: str,
    layout: Layout,
    writer: BlobWriter,
    progress: Progress | None = None,
    rest: Callable[[float], None] | None = None,
) -> list[str]:
    """Write the file that `layout` describes, and return each part's checksums. Neither synced nor in place yet.

    `progress`: called with the bytes that have been summed, and all of them. `rest`: called after each part was, with
    the seconds that it took.
    """
    done, total, began = 0, sum_nbytes(layout.parts), perf_counter()

    def said(nbytes: int) -> None:
        nonlocal done, began
        done += nbytes
        if progress is not None:
            progress(done, total)
        if rest is not None:
            rest(perf_counter() - began)
            began = perf_counter()

    parts: Sequence[Part] = layout.parts
    if any_lazy(parts):
        wait_for_devices(part.data for part in parts)
        return _lazily(path, layout, writer, said)
    if all(part.data.device.type == "cpu" for part in parts):
        return _from_host(path, layout.header, parts, writer, said)
    wait_for_devices(part.data for part in parts)  # the thread that copies has a stream of its own
    if getattr(writer, "streams", False):
        return _streamed(path, layout, writer, said)
    return _from_host(path, layout.header, HostBuffer().copy(parts), writer, said)


def _from_host(
    path: str, header: bytes, parts: Sequence[Part], writer: BlobWriter, said: Callable[[int], None]
) -> list[str]:
    views = [bytes_of(part.data) for part in parts]
    ticket, crcs = writer.write(path, [header, *views]), []
    try:
        for part, view in zip(parts, views, strict=True):
            crcs.append(checksums(part.entry, view))
            said(part.nbytes)
        return crcs
    finally:
        wait_for(ticket)


def _streamed(path: str, layout: Layout, writer: BlobWriter, said: Callable[[int], None]) -> list[str]:
    """Copy the next bytes from the device while the last ones are written."""
    crcs: dict[int, str] = {}
    start: Callable[..., Ticket] = writer.write
    wait_for(start(path, _stream(layout, crcs, said), nbytes=layout.nbytes))
    return [crcs[index] for index in range(len(layout.parts))]


def _lazily(path: str, layout: Layout, writer: BlobWriter, said: Callable[[int], None]) -> list[str]:
    """Load and sum the next bytes in this thread while the writer's writes the last ones."""
    crcs: dict[int, str] = {}
    start: Callable[..., Ticket] = writer.write
    hand_over(_stream(layout, crcs, said, _LAZY_NBYTES), lambda taken: start(path, taken, nbytes=layout.nbytes))
    return [crcs[index] for index in range(len(layout.parts))]


def _stream(
    layout: Layout, crcs: dict[int, str], said: Callable[[int], None], most: int | None = None
) -> Iterator[memoryview]:
    """The file's bytes, in buffers of `most` at most that are used in turn."""
    yield memoryview(layout.header)
    size = min(most or _BUFFER_NBYTES, max((part.nbytes for part in layout.parts), default=0))
    pinned = any(part.data.device.type == "cuda" for part in layout.parts)
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    turn = 0
    for index, part in enumerate(layout.parts):
        step, words = extent_nbytes(part.nbytes), []
        entry, lazy = part.entry, part.source is not None
        flat = part.data.reshape(-1).view(torch.uint8) if part.nbytes and not lazy else part.data
        chunk = max(size // step, 1) * step
        for offset in range(0, part.nbytes, chunk):
            nbytes = min(chunk, part.nbytes - offset)
            turn = 1 - turn
            buffer = buffers[turn]
            view = _loaded(part, offset, buffer[:nbytes]) if lazy else _copied(flat[offset : offset + nbytes], buffer)
            words += [
                f"{zlib.crc32(view[at : at + step], extent_seed(entry, offset + at)):08x}"
                for at in range(0, nbytes, step)
            ]
            yield view
        crcs[index] = "".join(words)
        said(part.nbytes)


def _loaded(part: Part, offset: int, buffer: Tensor) -> memoryview:
    """A part's bytes from `offset` on, in `buffer`."""
    if part.source is not None:
        part.source.load(part.start + offset // part.spec.dtype.itemsize, buffer.view(part.spec.dtype))
    return bytes_of(buffer)


def _copied(source: Tensor, buffer: Tensor) -> memoryview:
    if source.device.type == "cpu":
        return bytes_of(source)
    target = buffer[: source.numel()]
    target.copy_(source)  # waits: the bytes are summed and written next
    return bytes_of(target)
