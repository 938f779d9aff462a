"""Rows 16, 17, 19 and 20: memory that cannot be used, and memory that changes or goes away during a transfer."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import os
import weakref
from pathlib import Path
from threading import Thread

import pytest
from faults_memory import MIB, Endless, aligned, pattern
from faults_mounts import frozen
from zs_offload_aio import AioCancelled, AioError, Engine

# ---- row 16 ----


@pytest.mark.row(16)
def test_strided_views(engine: Engine, tmp_path: Path) -> None:
    """Every second byte, or backwards: a TypeError, and neither the file nor the memory has changed."""
    path = tmp_path / "file"
    path.write_bytes(pattern(100))
    memory = bytearray(200)
    with engine.open(path, "r+") as file:
        for view in (memoryview(memory)[::2], memoryview(memory)[::-1], memoryview(memory).cast("I")[::3]):
            for transfer in (file.read, file.write):
                with pytest.raises(TypeError):
                    transfer(view)
                with pytest.raises(TypeError):
                    transfer([bytearray(1), view])
    assert memory.count(0) == 200 and path.read_bytes() == pattern(100)


@pytest.mark.row(16)
def test_contiguous_memory_of_any_format(engine: Engine, tmp_path: Path) -> None:
    """Whatever the elements are: the bytes are moved."""
    floats = array.array("d", [1.5, -2.5, float("inf")])
    numbers = (ctypes.c_int32 * 4)(1, -2, 3, -4)
    grid = memoryview(bytearray(range(24))).cast("B", (2, 3, 4))
    with engine.open(tmp_path / "file", "x") as file:
        assert file.write([floats, numbers, grid]).wait() == 24 + 16 + 24
        back = (array.array("d", [0, 0, 0]), (ctypes.c_int32 * 4)(), memoryview(bytearray(24)).cast("B", (4, 3, 2)))
        assert file.read(back).wait() == 64
    assert back[0] == floats and list(back[1]) == list(numbers) and back[2].tobytes() == grid.tobytes()


@pytest.mark.row(16)
def test_no_memory_at_all(engine: Engine, tmp_path: Path) -> None:
    with engine.open(tmp_path / "file", "x") as file:
        for wrong in (None, 5, "text", object(), {1: 2}, [None], [[b"nested"]]):
            for transfer in (file.read, file.write):
                with pytest.raises(TypeError):
                    transfer(wrong)
        assert file.size == 0
    assert engine.stats()["ops_submitted"] == 0


# ---- row 17 ----


@pytest.mark.row(17)
def test_read_into_read_only_memory(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(4096))
    text = bytes(4096)
    with (
        open(path, "rb") as plain,
        mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        engine.open(path) as file,
    ):
        for target in (text, memoryview(text), memoryview(bytearray(4096)).toreadonly(), mapped):
            with pytest.raises(TypeError):
                file.read(target)
            with pytest.raises(TypeError):
                file.read([bytearray(1), target])
    assert text.count(0) == 4096 and path.read_bytes() == pattern(4096)


# ---- row 19 ----


@pytest.mark.row(19)
@pytest.mark.parametrize("residue", [0, 1])
def test_snapshot(engine: Engine, tmp_path: Path, residue: int) -> None:
    """Changed by another thread, from the moment write returned: the file has the bytes as they were."""
    path = tmp_path / "file"
    memory = aligned(16 * MIB + residue)[residue:]
    data = pattern(16 * MIB)
    memory[:] = data

    def overwrite() -> None:
        for start in range(0, memory.nbytes, MIB):
            memory[start : start + MIB] = bytes(MIB)

    with engine.open(path, "x") as file:
        ticket = file.write([memory[: 5 * MIB + 1], memory[5 * MIB + 1 :]], snapshot=True)
        changer = Thread(target=overwrite)
        changer.start()
        assert ticket.wait() == 16 * MIB
        changer.join()
    assert path.read_bytes() == data


@pytest.mark.row(19)
def test_snapshot_lets_go_of_the_buffer(engine: Engine, tmp_path: Path) -> None:
    """A bytearray that is exported cannot be resized: after a snapshot it is the caller's again."""
    memory = bytearray(pattern(MIB))
    with engine.open(tmp_path / "file", "x") as file:
        ticket = file.write(memory, snapshot=True)
        memory.clear()
        assert ticket.wait() == MIB
    assert (tmp_path / "file").read_bytes() == pattern(MIB)


@pytest.mark.root
@pytest.mark.row(19)
def test_snapshot_of_a_write_that_waits(engine: Engine, small_ext4: Path) -> None:
    """The file system stands still: the transfer is certainly after the change."""
    path = small_ext4 / "file"
    memory = bytearray(pattern(MIB))
    try:
        with engine.open(path, "x") as file:
            with frozen(small_ext4):
                ticket = file.write(memory, snapshot=True)
                memory[:] = bytes(MIB)
                with pytest.raises(TimeoutError):
                    ticket.wait(timeout_s=0.02)
                assert ticket.state == "pending" and not ticket.done
            assert ticket.wait() == MIB
        assert path.read_bytes() == pattern(MIB)
    finally:
        path.unlink()


@pytest.mark.row(19)
def test_what_may_not_change_is_documented() -> None:
    from zs_offload_aio import engine

    assert "must not change until" in " ".join((engine.__doc__ or "").split())
    assert "snapshot" in (engine.__doc__ or "")


# ---- row 20 ----


class Watched(bytearray):
    """A buffer that can be watched as it goes away."""


@pytest.mark.row(20)
@pytest.mark.parametrize("residue", [0, 1])
def test_buffers_dropped_in_flight(engine: Engine, tmp_path: Path, residue: int) -> None:
    """Nobody but the ticket, then nobody but the engine, has the memory: it stays until the bytes are moved."""
    path = tmp_path / "file"
    file = engine.open(path, "x")
    tickets = []
    for piece in range(24):
        memory = aligned(MIB + residue)[residue:]
        memory[:] = pattern(MIB, seed=piece)
        ticket = file.write(memory, MIB * piece)
        if piece % 2:
            tickets.append(ticket)
        del memory, ticket
    gc.collect()
    reuse = [aligned(MIB) for _ in range(24)]
    for memory in reuse:
        memory[:] = b"\xff" * MIB
    del file
    gc.collect()
    assert [ticket.wait() for ticket in tickets] == [MIB] * 12
    engine.drain()
    assert path.read_bytes() == b"".join(pattern(MIB, seed=piece) for piece in range(24))


@pytest.mark.row(20)
def test_target_dropped_in_flight(engine: Engine, endless: Endless) -> None:
    """A dropped read goes on, into memory that is nobody else's; once it has ended, the memory is given back."""
    memory = Watched(MIB)
    gone = weakref.ref(memory)
    file = engine.open(endless.path(engine.backend))
    ticket = file.read([memory, *endless.segments])
    del memory
    gc.collect()
    assert gone() is not None
    assert ticket.cancel()
    with pytest.raises(AioCancelled):
        ticket.wait()
    gc.collect()
    assert gone() is None
    file.close()


@pytest.mark.row(20)
def test_exported_until_done(engine: Engine, endless: Endless) -> None:
    """While it is read into, a bytearray can be neither resized nor freed, an mmap not closed."""
    memory, mapped = bytearray(MIB), mmap.mmap(-1, MIB)
    with engine.open(endless.path(engine.backend)) as file:
        ticket = file.read([memory, mapped, *endless.segments])
        with pytest.raises(BufferError):
            memory.extend(b"more")
        with pytest.raises(BufferError):
            mapped.close()
        ticket.cancel()
        with pytest.raises(AioCancelled):
            ticket.wait()
        memory.extend(b"more")
        mapped.close()


@pytest.mark.row(20)
def test_file_dropped_in_flight(engine: Engine, tmp_path: Path) -> None:
    """The request has the file open, whoever closed or lost it, and whatever its name means by now."""
    path = tmp_path / "file"
    ticket = engine.open(path, "x").write(pattern(8 * MIB))
    gc.collect()
    path.rename(tmp_path / "moved")
    path.write_bytes(b"another")
    assert ticket.wait() == 8 * MIB
    assert (tmp_path / "moved").read_bytes() == pattern(8 * MIB) and path.read_bytes() == b"another"


@pytest.mark.row(20)
def test_by_path(engine: Engine, tmp_path: Path) -> None:
    """Opened for one request, closed with it."""
    path = tmp_path / "file"
    before = len(os.listdir("/proc/self/fd"))
    assert engine.write(path, pattern(MIB)).wait() == MIB
    assert engine.write(os.fspath(path), b"start").wait() == 5  # not truncated
    target = bytearray(MIB)
    assert engine.read(path, target).wait() == MIB
    assert target == b"start" + pattern(MIB)[5:]
    gc.collect()
    engine.drain()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.root
@pytest.mark.row(20)
@pytest.mark.parametrize("end", ["close", "drop"])
def test_file_closed_while_its_write_waits(engine: Engine, small_ext4: Path, end: str) -> None:
    """M19: the descriptor's number is free again only when the transfer has ended."""
    path = small_ext4 / "file"
    try:
        file = engine.open(path, "x")
        with frozen(small_ext4):
            ticket = file.write(pattern(MIB))
            if end == "drop":
                del file
                gc.collect()
                decoys = [os.open(small_ext4, os.O_RDONLY) for _ in range(8)]
            assert not ticket.done
        if end == "close":
            file.close()
            assert ticket.done
        assert ticket.wait() == MIB
        if end == "drop":
            for fd in decoys:
                os.close(fd)
        assert path.read_bytes() == pattern(MIB)
    finally:
        path.unlink()


@pytest.mark.row(20)
def test_engine_closed_in_flight(backend: str, endless: Endless, tmp_path: Path) -> None:
    """Reads are cancelled, writes finished; then every use says that the engine is closed."""
    path = tmp_path / "file"
    engine = Engine(backend=backend)
    source, target = engine.open(endless.path(backend)), engine.open(path, "x")
    reading, writing = source.read(endless.segments), target.write(pattern(8 * MIB))
    engine.close()
    assert (reading.state, writing.state) == ("cancelled", "done")
    assert writing.wait() == 8 * MIB and path.read_bytes() == pattern(8 * MIB)
    with pytest.raises(AioError) as caught:
        reading.wait()
    assert isinstance(caught.value, AioCancelled)
    engine.close()
    for use in (engine.stats, engine.drain, lambda: engine.open(path), lambda: source.read(bytearray(1))):
        with pytest.raises(ValueError, match="closed"):
            use()
    target.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        target.write(b"x")


@pytest.mark.row(20)
def test_engine_dropped_in_flight(backend: str, tmp_path: Path) -> None:
    """Nobody closes anything, nobody waits: the engine goes away, and what was issued is on the disk by then."""
    path = tmp_path / "file"
    threads, descriptors = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
    for piece in range(4):
        engine = Engine(backend=backend)
        gone = weakref.ref(engine)
        engine.open(path, "rw").write(pattern(4 * MIB, seed=piece), 4 * MIB * piece)
        del engine
        gc.collect()
        assert gone() is None
    assert path.read_bytes() == b"".join(pattern(4 * MIB, seed=piece) for piece in range(4))
    assert len(os.listdir("/proc/self/task")) <= threads and len(os.listdir("/proc/self/fd")) <= descriptors
