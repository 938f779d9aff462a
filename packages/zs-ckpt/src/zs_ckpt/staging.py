"""The bytes of parts on their way to a file, with the checksums of what passes through.

Parts in host memory are written from where they are, and summed beside the writing. Parts on a device come through two
buffers of host memory in turn, where the writer takes one buffer after the other; through a copy of all of them, where
it wants everything at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor

from .blob import BlobWriter, Ticket, wait_for
from .hostcopy import HostBuffer, wait_for_devices
from .shardfile import Layout, Part, checksums, extent_nbytes, extent_seed, sum_nbytes
from .views import bytes_of

_BUFFER_NBYTES = 16 << 20  # a multiple of every extent


Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


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


def _stream(layout: Layout, crcs: dict[int, str], said: Callable[[int], None]) -> Iterator[memoryview]:
    yield memoryview(layout.header)
    size = min(_BUFFER_NBYTES, max((part.nbytes for part in layout.parts), default=0))
    pinned = torch.cuda.is_available()
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    turn = 0
    for index, part in enumerate(layout.parts):
        step, words = extent_nbytes(part.nbytes), []
        entry, flat = part.entry, part.data.reshape(-1).view(torch.uint8) if part.nbytes else part.data
        chunk = max(size // step, 1) * step
        for offset in range(0, part.nbytes, chunk):
            nbytes = min(chunk, part.nbytes - offset)
            turn = 1 - turn
            view = _copied(flat[offset : offset + nbytes], buffers[turn])
            words += [
                f"{zlib.crc32(view[at : at + step], extent_seed(entry, offset + at)):08x}"
                for at in range(0, nbytes, step)
            ]
            yield view
        crcs[index] = "".join(words)
        said(part.nbytes)


def _copied(source: Tensor, buffer: Tensor) -> memoryview:
    if source.device.type == "cpu":
        return bytes_of(source)
    target = buffer[: source.numel()]
    target.copy_(source)  # waits: the bytes are summed and written next
    return bytes_of(target)
