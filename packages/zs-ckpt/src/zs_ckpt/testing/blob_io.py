"""What every `BlobWriter` and `BlobReader` does."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from zs_ckpt.blob import PROTOCOL, BlobReader, BlobWriter

from ._expect import expect, raises


def check_blob_io(make_writer: Callable[[], BlobWriter], make_reader: Callable[[], BlobReader]) -> None:
    """Run every check on writers and readers from these factories, in a temporary folder.

    Raises:
        AssertionError: something is not as the Protocols say.
    """
    with tempfile.TemporaryDirectory(prefix="zs-ckpt-check-") as name:
        folder = Path(name)
        for check in (_contents, _replaces, _parts, _errors, _threads, _closes):
            check(folder, make_writer, make_reader)


def _bytes(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(nbytes + 1000003 * seed).randbytes(nbytes)


def _contents(folder: Path, make_writer: Callable[[], BlobWriter], make_reader: Callable[[], BlobReader]) -> None:
    """The file has the buffers' bytes, one after the other, whatever their sizes and addresses."""
    writer, reader = make_writer(), make_reader()
    expect({writer.PROTOCOL, reader.PROTOCOL} == {PROTOCOL}, f"PROTOCOL is not {PROTOCOL}")
    protocols: list[tuple[object, type]] = [(writer, BlobWriter), (reader, BlobReader)]
    expect(all(isinstance(made, protocol) for made, protocol in protocols), "a method of the Protocol is missing")
    sizes: tuple[list[int], ...] = (
        [],
        [0],
        [1],
        [4096],
        [3, 0, 5000, 1, 65536 + 7],
        [1 << 20, 13, (4 << 20) + 511],
        [10] * 3000,
    )
    for number, parts in enumerate(sizes):
        path = str(folder / f"contents{number}")
        raw = [_bytes(size + 1, at)[1:] for at, size in enumerate(parts)]
        buffers = [memoryview(bytearray(b"x" + one))[1:] for one in raw]  # an odd address
        ticket = writer.write(path, buffers)
        ticket.wait()
        expect(ticket.done, "a ticket that was waited for is not done")
        writer.sync(path)
        with open(path, "rb") as file:
            expect(file.read() == b"".join(raw), f"the file of buffers of {parts[:8]} bytes has other bytes")
        found = bytearray(sum(parts))
        reader.read(path, 0, found).wait()
        expect(bytes(found) == b"".join(raw), f"what was read of buffers of {parts[:8]} bytes differs")
    writer.close()
    reader.close()


def _replaces(folder: Path, make_writer: Callable[[], BlobWriter], make_reader: Callable[[], BlobReader]) -> None:
    """A shorter content leaves nothing of the longer one before it; a sync of what was synced is no error."""
    writer, path = make_writer(), str(folder / "replaced")
    for nbytes in (100_000, 10, 70_000):
        writer.write(path, [_bytes(nbytes)]).wait()
        writer.sync(path)
        expect(Path(path).read_bytes() == _bytes(nbytes), f"{nbytes} bytes over another content are not what is there")
    writer.sync(path)
    writer.close()


def _parts(folder: Path, make_writer: Callable[[], BlobWriter], make_reader: Callable[[], BlobReader]) -> None:
    """Any part can be read, to any address; bytes beside the buffer stay."""
    writer, reader, path = make_writer(), make_reader(), str(folder / "parts")
    raw = _bytes(300_001)
    writer.write(path, [raw]).wait()
    writer.sync(path)
    for offset, nbytes in ((0, 1), (1, 4096), (4095, 4098), (511, 65_537), (300_000, 1), (200_000, 100_001), (7, 0)):
        room = bytearray(b"\xee" * (nbytes + 6))
        reader.read(path, offset, memoryview(room)[3 : 3 + nbytes]).wait()
        expect(bytes(room[3 : 3 + nbytes]) == raw[offset : offset + nbytes], f"{nbytes} bytes at {offset} differ")
        expect(bytes(room[:3] + room[3 + nbytes :]) == b"\xee" * 6, f"reading {nbytes} bytes wrote beside the buffer")
    writer.close()
    reader.close()


def _errors(folder: Path, make_writer: Callable[[], BlobWriter], make_reader: Callable[[], BlobReader]) -> None:
    """Every failure is an OSError, from the call or from the ticket."""
    writer, reader, path = make_writer(), make_reader(), str(folder / "short")
    writer.write(path, [b"abc"]).wait()
    writer.sync(path)
    with raises(OSError, doing="reading past the end"):
        reader.read(path, 0, bytearray(4)).wait()
    with raises(OSError, doing="reading a file that is not there"):
        reader.read(str(folder / "none"), 0, bytearray(4)).wait()
    with raises(OSError, doing="writing into a folder that is not there"):
        writer.write(str(folder / "none" / "file"), [b"abc"]).wait()
    with raises(TypeError, BufferError, ValueError, doing="reading into bytes"):
        reader.read(path, 0, b"abc").wait()
    with raises(TypeError, doing="writing one buffer instead of several"):
        writer.write(path, b"abc").wait()  # type: ignore[arg-type]  # that is the mistake
    writer.close()
    reader.close()


def _threads(folder: Path, make_writer: Callable[[], BlobWriter], make_reader: Callable[[], BlobReader]) -> None:
    """Several threads write and read several files at once."""
    writer, reader = make_writer(), make_reader()
    wrong: list[str] = []

    def work(number: int) -> None:
        path, raw = str(folder / f"thread{number}"), _bytes(200_000 + number, number)
        for _ in range(5):
            try:
                writer.write(path, [raw[:1000], raw[1000:]]).wait()
                writer.sync(path)
                found = bytearray(len(raw))
                reader.read(path, 0, found).wait()
                if bytes(found) != raw:
                    wrong.append(f"thread {number} read other bytes than it wrote")
            except Exception as error:
                wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect(not wrong, "; ".join(wrong))
    writer.close()
    reader.close()


def _closes(folder: Path, make_writer: Callable[[], BlobWriter], make_reader: Callable[[], BlobReader]) -> None:
    """`close` finishes what is in flight, may be called again, and leaves no descriptor once the object is gone."""
    if not os.path.isdir("/proc/self/fd"):
        return
    make_writer().close()  # what an implementation keeps for the process is there from now on
    make_reader().close()
    before = len(os.listdir("/proc/self/fd"))
    writer, reader, path = make_writer(), make_reader(), str(folder / "closed")
    writer.write(path, [_bytes(100_000)])
    writer.close()
    writer.close()
    expect(Path(path).read_bytes() == _bytes(100_000), "`close` came before what was in flight")
    reader.read(path, 0, bytearray(10)).wait()
    reader.close()
    reader.close()
    del writer, reader
    gc.collect()
    expect(len(os.listdir("/proc/self/fd")) <= before, "descriptors are left after `close`")
