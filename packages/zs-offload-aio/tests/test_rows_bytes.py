"""Rows 13-15 and 18: the exact bytes, for every address, offset and length, and nothing but them."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from faults_memory import GIB, GUARD, MIB, Guarded, aligned, huge_buffer, pattern, sparse_file, sparse_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zs_offload_aio import AioError, Engine

SIZE = 1 * MIB  # of the file under test
ORIGINAL = pattern(SIZE, seed=13)
EDGES = [0, 1, 3, 63, 64, 511, 512, 513, 1024, 4095, 4096, 4097, 8192, 65535, 65536, 65537]

residues = st.one_of(st.sampled_from([0, 1, 8, 64, 511, 512, 513, 4095]), st.integers(0, 4095))
offsets = st.one_of(
    st.sampled_from(EDGES), st.integers(0, 255).map(lambda block: block * 4096), st.integers(0, SIZE - 1)
)
lengths = st.one_of(st.sampled_from(EDGES), st.integers(0, 3 * 4096), st.integers(0, SIZE))
chunks = st.sampled_from([None, 4096, 12288, 65536])
depths = st.sampled_from([1, 3, 32])
cuts = st.lists(st.floats(0, 1), max_size=4)  # where a request is cut into segments

varied = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def segments(nbytes: int, where: list[float], residue: int) -> list[Guarded]:
    """Memory of `nbytes` bytes in all, in pieces, each at an address of its own."""
    borders = [0, *sorted(int(nbytes * cut) for cut in where), nbytes]
    return [Guarded(end - start, (residue + 7 * start) % 4096) for start, end in pairwise(borders)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bytes") / "original"
    path.write_bytes(ORIGINAL)
    return path


# ---- row 13 ----


@pytest.mark.row(13)
@pytest.mark.row(18)
@varied
@given(offset=offsets, nbytes=lengths, residue=residues, chunk=chunks, depth=depths, where=cuts, direct=st.booleans())
def test_any_read(
    engines: Callable[..., Engine],
    backend: str,
    original: Path,
    offset: int,
    nbytes: int,
    residue: int,
    chunk: int | None,
    depth: int,
    where: list[float],
    direct: bool,
) -> None:
    """Reads what os.pread reads, into the target and nowhere else."""
    nbytes = min(nbytes, SIZE - offset)
    pieces = segments(nbytes, where, residue)
    with engines(backend, chunk_nbytes=chunk, depth=depth).open(original, direct=direct) as file:
        assert file.read([piece.view for piece in pieces], offset).wait() == nbytes
    assert b"".join(bytes(piece.view) for piece in pieces) == ORIGINAL[offset : offset + nbytes]
    assert all(piece.intact() for piece in pieces)


@pytest.mark.row(13)
@pytest.mark.row(18)
@varied
@given(offset=offsets, nbytes=lengths, residue=residues, chunk=chunks, depth=depths, where=cuts, direct=st.booleans())
def test_any_write(
    engines: Callable[..., Engine],
    backend: str,
    tmp_path: Path,
    offset: int,
    nbytes: int,
    residue: int,
    chunk: int | None,
    depth: int,
    where: list[float],
    direct: bool,
) -> None:
    """The file is what os.pwrite would have made of it: longer where the request ends beyond it, the rest untouched."""
    path = tmp_path / "file"
    before = ORIGINAL[: 2 * 65536 + 100]
    path.write_bytes(before)
    offset %= 3 * 65536
    nbytes = min(nbytes, 4 * 65536)
    pieces = segments(nbytes, where, residue)
    for seed, piece in enumerate(pieces):
        piece.view[:] = pattern(piece.nbytes, seed)
    data = b"".join(bytes(piece.view) for piece in pieces)
    with engines(backend, chunk_nbytes=chunk, depth=depth).open(path, "r+", direct=direct) as file:
        assert file.write([piece.view for piece in pieces], offset).wait() == nbytes
    expected = bytearray(before)
    if nbytes:
        expected.extend(bytes(max(0, offset + nbytes - len(expected))))
        expected[offset : offset + nbytes] = data
    assert path.read_bytes() == expected


@pytest.mark.row(13)
@pytest.mark.parametrize("block", [1, 512])
def test_every_residue(
    engines: Callable[..., Engine], backend: str, original: Path, tmp_path: Path, block: int
) -> None:
    """Residues of address and offset that differ, against each other, and lengths around the borders."""
    engine = engines(backend, chunk_nbytes=4096, depth=8)
    near = (0, 1, 2, 255, 256, 510, 511) if block == 1 else (0, 512, 1024, 3584)
    lengths = (1, 511, 512, 513, 4097) if block == 1 else (512, 4096, 8192 + 512)
    path = tmp_path / "file"
    path.write_bytes(ORIGINAL[:65536])
    expected = bytearray(ORIGINAL[:65536])
    tickets = []
    with engine.open(original) as source, engine.open(path, "r+") as target:
        for address in near:
            for start in near:
                for number, nbytes in enumerate(lengths):
                    memory = Guarded(nbytes, address)
                    offset = 4096 * number + start
                    ticket = source.read(memory.view, offset)
                    assert ticket.wait() == nbytes
                    assert memory.view == ORIGINAL[offset : offset + nbytes] and memory.intact()
                    memory.view[:] = pattern(nbytes, seed=nbytes + start)
                    tickets.append((target.write(memory.view, offset), nbytes, memory))
                    expected[offset : offset + nbytes] = memory.view
        for ticket, nbytes, _ in tickets:
            assert ticket.wait() == nbytes
    assert path.read_bytes() == expected


# ---- row 14 ----


@pytest.mark.row(14)
def test_nothing_to_transfer(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with engine.open(path, "x") as file:
        for buffers in (b"", bytearray(), memoryview(b""), [], (), [bytearray(), b""]):
            ticket = file.write(buffers, 12345)
            assert ticket.done and ticket.wait() == ticket.result() == ticket.nbytes == ticket.chunks == 0
            assert ticket.state == "done" and not ticket.cancel()
        assert file.size == 0
        for buffers in (bytearray(), [], [bytearray(), bytearray()]):
            assert file.read(buffers, 12345).wait() == 0  # beyond the end, but nothing is missing
    assert path.read_bytes() == b""


@pytest.mark.row(14)
def test_one_byte(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    target = Guarded(1, 5)
    with engine.open(path, "x") as file:
        for offset in (0, 511, 512, 4095, 4096, 100_000):
            assert file.write([b"", bytes([offset % 251]), b""], offset).wait() == 1
            assert file.read([bytearray(), target.view], offset).wait() == 1
            assert target.view[0] == offset % 251 and target.intact()
        assert file.size == 100_001


# ---- row 15 ----

LARGE = 4 * GIB + 64 * MIB
MARKS = [0, 2 * GIB - MIB, 2 * GIB, 4 * GIB - MIB, 4 * GIB, LARGE - MIB]


@pytest.mark.row(15)
@pytest.mark.repeats
def test_read_over_4_gib(engine: Engine, tmp_path: Path) -> None:
    """One request into one buffer of over 4 GiB; its pages, but for some around each border, are the same 64 MiB."""
    marks = {offset: pattern(MIB, seed=offset) for offset in MARKS}
    with huge_buffer(LARGE, own=tuple(MARKS)) as buffer, sparse_memory(LARGE, marks) as memory:
        on_disk = sparse_file(tmp_path / "large", LARGE, marks)
        path = memory if engine.backend == "plain" else on_disk  # holes would fill the page cache
        with engine.open(path) as file:
            ticket = file.read(buffer)
            assert ticket.wait() == ticket.nbytes == ticket.done_nbytes == LARGE
        view = memoryview(buffer).cast("B")
        for offset, expected in marks.items():
            assert view[offset : offset + MIB] == expected, offset
        assert engine.stats()["read_nbytes"] == LARGE
        view.release()


@pytest.mark.row(15)
@pytest.mark.repeats
def test_write_over_4_gib(engine: Engine) -> None:
    """The bytes go nowhere, but all of them have to: one system call would take 0x7ffff000."""
    with huge_buffer(LARGE) as buffer, engine.open("/dev/null", "r+") as file:
        assert file.write(buffer).wait() == LARGE
        assert engine.stats()["written_nbytes"] == LARGE


@pytest.mark.row(15)
@pytest.mark.parametrize("direct", [True, False])
def test_offsets_over_4_gib(engine: Engine, tmp_path: Path, direct: bool) -> None:
    path = sparse_file(tmp_path / "large", 0)
    with engine.open(path, "r+", direct=direct) as file, open(path, "rb") as plain:
        for offset in (2 * GIB - 100, 4 * GIB - 4096, 4 * GIB - 1, 4 * GIB + 512, 9 * GIB + 7, 1024 * GIB):
            source, target = pattern(20_000, seed=offset), Guarded(20_000, offset % 4096)
            assert file.write(source, offset).wait() == 20_000
            assert os.pread(plain.fileno(), 20_000, offset) == source
            assert file.read(target.view, offset).wait() == 20_000
            assert target.view == source and target.intact()
        assert file.size == 1024 * GIB + 20_000


@pytest.mark.row(15)
def test_offsets_that_cannot_be(engine: Engine, tmp_path: Path) -> None:
    """Refused before anything is transferred, and nothing wraps around."""
    path = tmp_path / "file"
    path.write_bytes(ORIGINAL[:8192])
    target = bytearray(bytes([GUARD]) * 4096)
    with engine.open(path, "r+") as file:
        for offset in (-1, -4096, -(2**63), 2**63, 2**64, 2**64 + 1, 2**63 - 4095):
            for transfer in (file.read, file.write):
                with pytest.raises(ValueError, match=str(abs(offset))):
                    transfer(target, offset)
        for offset in (2**63 - 1 - 4096, 2**62):  # a number like any other, but no file reaches there
            for transfer in (file.read, file.write):
                with pytest.raises((AioError, ValueError), match=str(offset)) as caught:
                    transfer(target, offset).wait()
                if isinstance(caught.value, AioError):
                    assert (caught.value.filename, caught.value.offset) == (os.fspath(path), offset)
        with pytest.raises(TypeError):
            file.read(target, 0.5)
        for nbytes in (-1, 2**63):
            with pytest.raises(ValueError):
                file.preallocate(nbytes)
            with pytest.raises(ValueError):
                file.truncate(nbytes)
    assert target.count(GUARD) == 4096 and path.read_bytes() == ORIGINAL[:8192]


# ---- row 18 ----


@pytest.mark.row(18)
def test_slices(engine: Engine, original: Path) -> None:
    """Pieces of one buffer, read at the same time, each with its own neighbours."""
    memory = aligned(64 * 1024)
    memory[:] = bytes([GUARD]) * memory.nbytes
    slices = [(start, start + nbytes) for start, nbytes in ((1, 100), (512, 512), (4096, 4096), (9000, 30_000))]
    with engine.open(original) as file:
        tickets = [file.read(memory[start:end], 3 * start) for start, end in slices]
        assert [ticket.wait() for ticket in tickets] == [end - start for start, end in slices]
    expected = bytearray(bytes([GUARD]) * memory.nbytes)
    for start, end in slices:
        expected[start:end] = ORIGINAL[3 * start : 3 * start + end - start]
    assert memory == expected
