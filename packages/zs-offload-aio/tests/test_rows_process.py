"""Rows 23-25: fork, the end of the interpreter, and Ctrl-C, all with transfers in flight."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from faults_memory import MIB, Endless, aligned, pattern
from faults_mounts import frozen
from faults_process import in_child
from zs_offload_aio import AioCancelled, Engine

# ---- row 23 ----


@pytest.mark.row(23)
def test_child_must_not_use_the_engine(engine: Engine, backend: str, endless: Endless, tmp_path: Path) -> None:
    """Each use in a child raises and says what to do; the parent's transfers do not notice."""
    path = tmp_path / "file"
    source, target = engine.open(endless.path(engine.backend)), engine.open(path, "x")
    reading = source.read(endless.segments)
    writing = target.write(pattern(32 * MIB))
    over = target.read(bytearray())

    def uses() -> list[Callable[[], object]]:
        return [
            lambda: engine.open(path),
            lambda: engine.read(path, bytearray(1)),
            lambda: engine.write(path, b"x"),
            engine.drain,
            engine.stats,
            lambda: source.read(bytearray(1)),
            lambda: target.write(b"x"),
            lambda: target.flush("full"),
            lambda: target.truncate(0),
            lambda: target.preallocate(1),
            lambda: target.size,
            reading.wait,
            writing.wait,
            reading.result,
            reading.cancel,
            lambda: reading.state,
            lambda: reading.done,
            lambda: writing.done_nbytes,
            over.wait,
        ]

    def child() -> int:
        for number, use in enumerate(uses()):
            with pytest.raises(RuntimeError, match="after fork"):
                use()
                raise AssertionError(f"use {number} was allowed")
        with Engine(backend=backend) as own, own.open(path, "r+") as file:  # its own is as good as any
            assert file.write(b"child", 64 * MIB).wait() == 5
        return len(uses())

    assert in_child(child) == len(uses())
    assert writing.wait() == 32 * MIB
    assert reading.state == "pending" and reading.cancel()
    with pytest.raises(AioCancelled):
        reading.wait()
    assert path.read_bytes()[: 32 * MIB] == pattern(32 * MIB)
    assert target.write(b"goes on").wait() == 7


@pytest.mark.row(23)
def test_child_ends_without_touching_anything(engine: Engine, endless: Endless, tmp_path: Path) -> None:
    """A child that drops all it inherited, and finalises or not, neither hangs nor ends the parent's requests."""
    path = tmp_path / "file"
    target = engine.open(path, "x")
    held = [target, engine.open(endless.path(engine.backend))]
    held += [held[1].read(endless.segments), target.write(pattern(16 * MIB)), target.read(bytearray())]
    ended = target.write(b"an error that nobody waits for", 2**62)
    while not ended.done:
        pass
    held.append(ended)
    del ended

    def drop() -> None:
        held.clear()
        gc.collect()

    def leave() -> None:
        engine.close()

    for end in (drop, lambda: None):
        in_child(end)
    with pytest.raises(AssertionError, match="after fork"):
        in_child(leave)
    del target
    file, _, reading, writing, _, _ = held
    assert writing.wait() == 16 * MIB and path.read_bytes() == pattern(16 * MIB)
    assert reading.state == "pending" and reading.cancel()
    with pytest.raises(OSError):
        held.pop().wait()
    file.flush()
    assert engine.stats()["ops_done"] == 2


@pytest.mark.row(23)
@pytest.mark.repeats
def test_fork_at_any_moment(backend: str, tmp_path: Path) -> None:
    """A lock that another thread holds at the fork stays locked in the child: no call there may wait for it."""
    path = tmp_path / "file"
    path.write_bytes(pattern(MIB))
    stop = threading.Event()
    with Engine(backend=backend, chunk_nbytes=4096, depth=32) as engine, engine.open(path) as file:

        def busy() -> None:
            memory = aligned(MIB)
            while not stop.is_set():
                file.read(memory).wait()

        workers = [threading.Thread(target=busy) for _ in range(2)]
        for worker in workers:
            worker.start()
        tickets = [file.read(bytearray(MIB)) for _ in range(3)]
        tickets[0].wait()

        def child() -> None:
            for use in (lambda: tickets[0].done_nbytes, engine.stats, lambda: file.size, tickets[1].cancel):
                with pytest.raises(RuntimeError, match="after fork"):
                    use()
            tickets.clear()
            gc.collect()

        try:
            for _ in range(8):
                in_child(child, timeout_s=20)
        finally:
            stop.set()
            for worker in workers:
                worker.join(60)
        for ticket in tickets:
            assert ticket.wait() == MIB


# ---- row 24 ----

EXITS = """
import gc, os, sys, threading
from zs_offload_aio import Engine
backend, folder, endless, first = sys.argv[1:5]
kind, number = first, 240
for number in range(int(sys.argv[5])):  # each child ends as an interpreter does: off the end of this file
    pid = os.fork()
    if pid == 0:
        kind = ("end", "exit", "raise", "thread", "cycle", "module")[number % 6]
        break
    status = os.waitpid(pid, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code != (7 if number % 6 in (1, 2) else 0):
        sys.exit(f"exit number {number} ended with {code}")
else:
    if kind == "none":
        sys.exit(0)
def unraisable(what):
    os.write(2, repr(what).encode()); os._exit(99)
sys.unraisablehook = unraisable
sys.excepthook = lambda kind, error, trace: os._exit(98) if str(error) != "meant" else None
window = bytearray(1 << 24)
engine = Engine(backend=backend)
source = engine.open(endless)
target = engine.open(f"{folder}/{backend}-{kind}-{number}", "w")
reading = source.read([window] * 4096)
data = bytes([number % 251]) * (1 << 20)
writing = [target.write(data, piece << 20) for piece in range(4)]
if number % 2:
    del writing[::2], reading
if kind == "exit":
    sys.exit(7)
elif kind == "raise":
    def hook(kind, error, trace):
        sys.stderr.flush()
    import atexit
    try:
        raise SystemExit(7)
    finally:
        del target
elif kind == "thread":
    def forever(ticket=writing[-1]):
        try:
            ticket.wait()
            source.read([window] * 4096).wait(100)
        except (OSError, ValueError):  # cancelled, or too late: the main thread is leaving
            pass
    threading.Thread(target=forever, daemon=True).start()
elif kind == "cycle":
    class Cycle: pass
    cycle = Cycle()
    cycle.all = (cycle, engine, source, target, writing)
    del engine, source, target, writing
    gc.disable()
elif kind == "module":
    sys.modules["zs_offload_aio"].kept = (engine, source, target)
    del engine
"""


@pytest.mark.row(24)
@pytest.mark.repeats
def test_interpreter_exits_in_flight(backend: str, endless: Endless, tmp_path: Path) -> None:
    """Six ways to end, with a long read and some writes in flight: no hang, no crash, and the writes are on the disk;
    with all backends, 208 times.

    Interpreters are forked from one that has the package imported, but each is finalised for itself.
    """
    script = tmp_path / "exits.py"
    script.write_text(textwrap.dedent(EXITS))
    count = 48
    arguments = [sys.executable, "-X", "faulthandler", os.fspath(script), backend, os.fspath(tmp_path)]
    forks = subprocess.run(
        [*arguments, endless.path("disk"), "none", str(count)], capture_output=True, text=True, timeout=240, check=False
    )
    assert (forks.returncode, forks.stderr) == (0, "")
    fresh = ("end", "exit", "cycle", "module")
    for kind in fresh:
        whole = subprocess.run(
            [*arguments, endless.path("disk"), kind, "0"], capture_output=True, text=True, timeout=60, check=False
        )
        assert (whole.returncode, whole.stderr) == (7 if kind == "exit" else 0, "")
    written = sorted(path for path in tmp_path.iterdir() if path != script)
    assert len(written) == count + len(fresh)
    for path in written:
        number = int(path.name.rpartition("-")[2])
        assert path.read_bytes() == bytes([number % 251]) * (4 * MIB), path.name


# ---- row 25 ----


@pytest.mark.row(25)
def test_ctrl_c_during_wait(backend: str, endless: Endless, tmp_path: Path) -> None:
    """KeyboardInterrupt comes while the request is still in flight; the engine goes on, and so does the request."""

    def work() -> tuple[str, str, int]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Engine(backend=backend) as engine, engine.open(endless.path(backend)) as file:
            ticket = file.read(endless.segments)
            states = []
            for wait in (ticket.wait, lambda: ticket.wait(100.0), engine.drain, lambda: file.flush("data")):
                if wait.__name__ == "<lambda>" and len(states) == 3:
                    continue  # a flush waits for writes only
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(KeyboardInterrupt):
                    wait()
                states.append(ticket.state)
            assert ticket.cancel()
            with pytest.raises(AioCancelled):
                ticket.wait()
            memory = aligned(MIB)
            with engine.open(tmp_path / "file", "w") as other:
                assert other.write(pattern(MIB)).wait() == MIB
                assert other.read(memory).wait() == MIB
            assert memory == pattern(MIB)
            return (*states,)

    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert in_child(work) == ("pending",) * 3
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.root
@pytest.mark.row(25)
def test_ctrl_c_while_the_disk_stands_still(backend: str, small_ext4: Path) -> None:
    """Nothing moves at all: each wait can be left, those of close too, and the write is on the disk later."""
    path = small_ext4 / "file"
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = Engine(backend=backend)
    file = engine.open(path, "x")
    try:
        with frozen(small_ext4):
            ticket = file.write(pattern(MIB))
            for wait in (ticket.wait, file.flush, engine.drain, file.close, engine.close):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(KeyboardInterrupt):
                    wait()
                assert ticket.state == "pending"
            with pytest.raises(TimeoutError):
                ticket.result()
        assert ticket.wait() == MIB
        engine.close()
        assert path.read_bytes() == pattern(MIB)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        engine.close()
        path.unlink()


@pytest.mark.row(25)
def test_wait_has_an_end(engine: Engine, endless: Endless) -> None:
    """TimeoutError says how far it is, and the request goes on."""
    with engine.open(endless.path(engine.backend)) as file:
        ticket = file.read(endless.segments)
        with pytest.raises(TimeoutError, match=str(endless.nbytes)):
            ticket.wait(timeout_s=0.05)
        with pytest.raises(TimeoutError):
            ticket.result()
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="timeout_s"):
                ticket.wait(timeout_s=wrong)
        before = ticket.done_nbytes
        with pytest.raises(TimeoutError):
            ticket.wait(0.05)
        assert ticket.done_nbytes > before and ticket.state == "pending"
        assert ticket.cancel()
