"""Calls that meet: truncation behind writes, closing beside other calls, several waiters of one ticket."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path

import pytest
from zs_offload_aio import AioWriter, Engine, _core, adapters

MIB = 1 << 20


@pytest.mark.row(21)
def test_truncation_is_ordered_behind_writes(engine: Engine, tmp_path: Path) -> None:
    for _ in range(10):
        with engine.open(tmp_path / "file", "rw") as file:
            file.write(bytes(4 * MIB))
            file.truncate(0)
            assert file.size == 0
            file.write(bytes(4 * MIB))
            with engine.open(tmp_path / "file", "w") as again:  # another handle of the same file
                again.write(b"new").wait()
                assert again.size == 3


@pytest.mark.row(22)
@pytest.mark.parametrize("call", ["open", "drain", "flush", "truncate", "preallocate", "close"])
def test_closing_beside_other_calls(backend: str, tmp_path: Path, call: str) -> None:
    """The other call is served or refused with ValueError; nothing is used after it is gone."""
    calls = {
        "open": lambda engine, file: engine.open(tmp_path / "file").close(),
        "drain": lambda engine, file: engine.drain(),
        "flush": lambda engine, file: file.flush("full"),
        "truncate": lambda engine, file: file.truncate(MIB),
        "preallocate": lambda engine, file: file.preallocate(MIB),
        "close": lambda engine, file: file.close(),
    }
    (tmp_path / "file").write_bytes(bytes(MIB))
    for _ in range(10):
        engine = Engine(backend=backend)
        file = engine.open(tmp_path / "file", "rw")
        others: list[BaseException] = []

        def work(engine: Engine = engine, file: _core.File = file, others: list[BaseException] = others) -> None:
            try:
                for _ in range(50):
                    calls[call](engine, file)
            except ValueError:
                pass
            except BaseException as error:
                others.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        file.write(bytes(MIB))
        for thread in threads:
            thread.start()
        time.sleep(0.001)
        if call in ("flush", "truncate", "preallocate"):
            file.close()
        engine.close()
        for thread in threads:
            thread.join(60)
        assert others == []
        file.close()


@pytest.mark.row(22)
def test_every_waiter_sees_what_finish_did(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's tensor is filled by `finish`, once, before any waiter returns; where it raises, the next one tries."""
    (tmp_path / "file").write_bytes(b"x" * 8192)
    memory, calls, seen = bytearray(8192), [], []

    def finish() -> None:
        calls.append("begun")
        if len(calls) == 1:
            raise RuntimeError("no device")
        time.sleep(0.05)
        calls.append("ended")

    class Tensor:
        pass

    host = (ctypes.c_char * 8192).from_buffer(memory)
    view = _core.View(ctypes.addressof(host), 8192, host, False, finish)
    original = adapters.as_buffer
    monkeypatch.setattr(
        adapters,
        "as_buffer",
        lambda obj, *, writable: view if isinstance(obj, Tensor) else original(obj, writable=writable),
    )
    with engine.open(tmp_path / "file") as file:
        ticket = file.read(Tensor())
        with pytest.raises(RuntimeError, match="no device"):
            ticket.wait()

        def wait() -> None:
            ticket.wait()
            seen.append(calls[-1])

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert seen == ["ended"] * 3
    assert calls == ["begun", "begun", "ended"]
    assert bytes(memory) == b"x" * 8192


def test_a_writer_checks_before_it_empties(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with AioWriter() as writer:
        for wrong in ([memoryview(bytes(16))[::2]], ["text"], [3]):
            with pytest.raises(TypeError):
                writer.write(tmp_path / "file", wrong)
    assert (tmp_path / "file").read_bytes() == b"precious"
