"""Rows 21, 22, 26 and 27: order, threads, cancellation, and nothing that grows."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from threading import Barrier, Thread

import pytest
from faults_memory import MIB, Endless, aligned, pattern
from faults_process import in_child
from zs_offload_aio import AioCancelled, AioError, Engine

# ---- row 21 ----


@pytest.mark.row(21)
@pytest.mark.repeats
@pytest.mark.parametrize("residue", [0, 1])
def test_write_k_then_read_k(backend: str, tmp_path: Path, residue: int) -> None:
    """A thousand times: the read, issued at once after the write, receives what was written."""
    with Engine(backend=backend) as engine, engine.open(tmp_path / "file", "x") as file:
        source, target = aligned(20_000 + residue)[residue:], aligned(20_000 + residue)[residue:]
        for k in range(1000):
            nbytes = (4096, 8192, 5000, 20_000)[k % 4]
            source[:nbytes] = bytes([k % 251 + 1]) * nbytes
            writing = file.write(source[:nbytes], 4096 * (k % 3))
            reading = file.read(target[:nbytes], 4096 * (k % 3))
            assert reading.wait() == nbytes and writing.done
            assert target[:nbytes] == source[:nbytes], k


@pytest.mark.row(21)
@pytest.mark.repeats
@pytest.mark.parametrize("direct", [True, False])
def test_any_order_of_overlapping_requests(backend: str, tmp_path: Path, direct: bool) -> None:
    """A thousand reads and writes over one another, up to 24 in flight: as if done one by one in their order."""
    size, rng = 256 * 1024, random.Random(21)
    path = tmp_path / "file"
    model = bytearray(pattern(size, seed=21))
    path.write_bytes(model)
    flying: list[tuple] = []

    def finish(ticket, memory, expected) -> None:
        assert ticket.wait() == memory.nbytes
        assert expected is None or memory == expected

    with Engine(backend=backend, chunk_nbytes=16384, depth=16) as engine:
        handles = [engine.open(path, "r+", direct=direct), engine.open(path, "r+", direct=not direct)]
        for _ in range(1000):
            offset = rng.choice((rng.randrange(size), 4096 * rng.randrange(size // 4096)))
            nbytes = min(rng.choice((1, 512, 4096, 10_000, rng.randrange(1, 70_000))), size - offset)
            memory = aligned(nbytes + 1)[rng.randrange(2) :][:nbytes]
            file = handles[rng.random() < 0.2]
            if rng.random() < 0.5:
                memory[:] = rng.randbytes(nbytes)
                model[offset : offset + nbytes] = memory
                flying.append((file.write(memory, offset), memory, None))
            else:
                flying.append((file.read(memory, offset), memory, bytes(model[offset : offset + nbytes])))
            if len(flying) == 24:
                finish(*flying.pop(rng.randrange(24)))
        for entry in flying:
            finish(*entry)
        for file in handles:
            file.close()
    assert path.read_bytes() == model


@pytest.mark.row(21)
def test_two_writers_to_one_range(engine: Engine, tmp_path: Path) -> None:
    """Serialised: the range is all the last one's, also where the requests are cut into many transfers."""
    path = tmp_path / "file"
    with engine.open(path, "x") as one, engine.open(path, "r+") as two:
        for turn in range(6):
            tickets = [(one, two)[k % 2].write(bytes([10 * turn + k]) * (3 * MIB + 100), 100) for k in range(6)]
            assert [ticket.wait() for ticket in tickets] == [3 * MIB + 100] * 6
            assert path.read_bytes()[100:] == bytes([10 * turn + 5]) * (3 * MIB + 100)


@pytest.mark.row(21)
def test_after_a_failed_request(engine: Engine, tmp_path: Path) -> None:
    """What is ordered behind a request that fails is carried all the same."""
    path = tmp_path / "file"
    path.write_bytes(pattern(MIB))
    target = bytearray(MIB)
    with engine.open(path, "r+") as file, engine.open("/dev/full", "r+") as full:
        failing, after = file.read(bytearray(2 * MIB)), file.write(b"after")
        last = file.read(target)
        with pytest.raises(AioError):
            failing.wait()
        assert after.wait() == 5 and last.wait() == MIB
        refused, behind = full.write(b"x" * MIB), full.read(memoryview(bytearray(b"x" * MIB)))
        assert behind.wait() == MIB and refused.state == "failed"
        with pytest.raises(AioError):
            refused.wait()
    assert path.read_bytes() == target == b"after" + pattern(MIB)[5:]


# ---- row 22 ----


@pytest.mark.row(22)
@pytest.mark.repeats
def test_32_threads(backend: str, tmp_path: Path) -> None:
    """32 threads x 200 requests on one file through handles of their own: each ends once, with its own bytes."""
    threads, requests, part = 32, 200, 16384
    path = tmp_path / "file"
    path.write_bytes(bytes(threads * part))
    failures: list[str] = []
    start = Barrier(threads)

    def work(number: int, engine: Engine) -> None:
        start.wait(30)
        rng = random.Random(number)
        try:
            with engine.open(path, "r+") as file:
                for _ in range(requests // 2):
                    offset = rng.choice((0, 512, 1, 8192, rng.randrange(part - 1)))
                    data = rng.randbytes(rng.randrange(1, part - offset))
                    target = bytearray(len(data))
                    tickets = file.write(data, number * part + offset), file.read(target, number * part + offset)
                    if [ticket.wait() for ticket in tickets] != [len(data)] * 2 or target != data:
                        failures.append(f"thread {number}: other bytes")
        except BaseException as error:
            failures.append(f"thread {number}: {error!r}")

    with Engine(backend=backend) as engine:
        workers = [Thread(target=work, args=(number, engine)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert failures == [] and not any(worker.is_alive() for worker in workers)
        stats = engine.stats()
        assert stats["ops_submitted"] == stats["ops_done"] == threads * requests
        assert stats["ops_failed"] == stats["ops_cancelled"] == stats["in_flight"] == 0
        assert stats["read_nbytes"] == stats["written_nbytes"]


@pytest.mark.row(22)
def test_one_ticket_many_waiters(engine: Engine, endless: Endless) -> None:
    """Everybody who waits is told, each of them as often as he asks."""
    ended: list[str] = []
    with engine.open(endless.path(engine.backend)) as file:
        ticket = file.read(endless.segments)

        def wait() -> None:
            for _ in range(3):
                try:
                    ticket.wait()
                except AioCancelled as error:
                    ended.append(type(error).__name__)

        waiters = [Thread(target=wait) for _ in range(8)]
        for waiter in waiters:
            waiter.start()
        assert ticket.cancel()
        for waiter in waiters:
            waiter.join(60)
    assert ended == ["AioCancelled"] * 24


# ---- row 26 ----


@pytest.mark.row(26)
def test_cancel(backend: str, endless: Endless) -> None:
    """No transfer is begun after it, those in flight end first, and the memory is then left alone."""
    chunk = MIB
    with Engine(backend=backend, chunk_nbytes=chunk, depth=4) as engine:
        with engine.open(endless.path(backend)) as file:
            ticket = file.read(endless.segments)
            while ticket.done_nbytes < 8 * chunk:
                pass
            assert ticket.state == "pending"
            assert ticket.cancel()
            begun = ticket.chunks
            with pytest.raises(AioCancelled) as caught:
                ticket.wait()
            assert ticket.state == "cancelled" and ticket.done
            assert ticket.chunks == begun < endless.nbytes // chunk
            assert caught.value.done_nbytes == ticket.done_nbytes == begun * chunk
            endless.window[:] = b"\x5a" * endless.window.nbytes
            transfers = engine.stats()["transfers"]
            small = bytearray(4096)
            assert file.read(small).wait() == 4096  # the engine goes on
            assert engine.stats()["transfers"] == transfers + 1
            assert bytes(endless.window).count(0x5A) == endless.window.nbytes
            assert ticket.cancel() and ticket.chunks == begun
            with pytest.raises(AioCancelled):
                ticket.result()
        assert engine.stats()["ops_cancelled"] == 1


@pytest.mark.row(26)
def test_cancel_before_it_began(backend: str, endless: Endless) -> None:
    """A request in the queue behind others is cancelled without a single transfer."""
    with Engine(backend=backend, chunk_nbytes=MIB, depth=1) as engine, engine.open(endless.path(backend)) as file:
        first = file.read(endless.segments)
        while not first.chunks:
            pass
        target = bytearray(b"\xa5" * MIB)
        second = file.read(target)
        assert second.cancel()
        with pytest.raises(AioCancelled):
            second.wait()
        assert second.chunks == second.done_nbytes == 0 and target.count(0xA5) == MIB
        assert not first.done and first.cancel()


@pytest.mark.row(26)
def test_cancel_of_what_is_over(engine: Engine, tmp_path: Path) -> None:
    with engine.open(tmp_path / "file", "x") as file:
        ticket = file.write(b"done")
        assert ticket.wait() == 4
        assert not ticket.cancel() and ticket.state == "done" and ticket.wait() == 4
        failed = file.read(bytearray(5))
        with pytest.raises(AioError):
            failed.wait()
        assert not failed.cancel() and failed.state == "failed"


@pytest.mark.row(26)
def test_cancel_of_what_others_wait_for(engine: Engine, endless: Endless, tmp_path: Path) -> None:
    """A write ordered behind a cancelled read is carried once the read has ended."""
    path = tmp_path / "sparse"
    with open(path, "wb") as sparse:
        sparse.truncate(endless.nbytes)
    source = endless.path("plain") if engine.backend == "plain" else os.fspath(path)
    with engine.open(source, "r+") as file:
        reading = file.read(endless.segments)
        writing = file.write(b"after")
        target = bytearray(5)
        checking = file.read(target)
        assert not writing.done
        assert reading.cancel()
        assert writing.wait() == 5 and reading.done
        assert checking.wait() == 5 and target == b"after"


# ---- row 27 ----


def usage() -> tuple[int, int, int]:
    """Descriptors, threads and resident bytes of this process."""
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident


@pytest.mark.row(27)
@pytest.mark.repeats
def test_nothing_leaks(backend: str, tmp_path: Path) -> None:
    """10,000 transfers of every kind: as many descriptors and threads as before, and no more memory."""
    path = tmp_path / "file"
    path.write_bytes(pattern(MIB))

    def some(engine: Engine, count: int) -> None:
        memory = aligned(8192)
        kept = engine.open(path, "r+")
        for number in range(count // 5):
            kept.read(memory[:4096], 4096 * (number % 100)).wait()
            kept.read(memory[1:4000], number).wait()
            kept.write(memory[:4096], 4096 * (number % 100))  # nobody waits for it
            with pytest.raises(AioError):
                kept.read(memory, MIB).wait()
            with engine.open(path) as file:
                ticket = file.read(memory)
                ticket.cancel()
        kept.close()
        engine.drain()

    def work() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        with Engine(backend=backend) as engine:
            some(engine, 2000)
            gc.collect()
            before = usage()
            some(engine, 10_000)
            return before, usage()

    before, after = in_child(work)
    assert after[0] == before[0]
    assert after[1] <= before[1] + (2 if backend == "io_uring" else 0)  # the kernel's own workers come and go
    assert after[2] <= before[2] + 2 * MIB


@pytest.mark.row(27)
@pytest.mark.repeats
def test_engines_leave_nothing(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(MIB))

    def some(count: int) -> None:
        memory = aligned(MIB)
        for _ in range(count):
            with Engine(backend=backend) as engine:
                file = engine.open(path)
                file.read(memory)
                file.read(memory[1:])

    def work() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        some(10)
        gc.collect()
        before = usage()
        some(40)
        return before, usage()

    before, after = in_child(work)
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 2 * MIB
