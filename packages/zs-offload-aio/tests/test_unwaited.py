"""A write that failed and that nobody waited for: flush and close say so, whoever still holds its ticket."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from zs_offload_aio import AioError, AioWriter, Engine, File


def failing(engine: Engine) -> File:
    return engine.open("/dev/full", "r+")


@pytest.mark.parametrize("level", ["none", "data", "full"])
@pytest.mark.row(1)
def test_flush_tells_of_a_write_whose_ticket_is_kept(engine: Engine, level: str) -> None:
    file = failing(engine)
    ticket = file.write(b"x" * 8192)
    with pytest.raises(AioError, match="ENOSPC"):
        file.flush(level)  # type: ignore[arg-type]
    with pytest.raises(AioError, match="ENOSPC"):
        ticket.wait()  # the ticket keeps saying it
    if level == "none":
        file.flush(level)  # type: ignore[arg-type]  # told once
    file.close()


@pytest.mark.row(1)
def test_close_tells_of_it_too(engine: Engine) -> None:
    file = failing(engine)
    tickets = [file.write(b"x" * 8192, 8192 * index) for index in range(3)]
    with pytest.raises(AioError, match="ENOSPC"):
        file.close()
    assert file.closed
    assert [ticket.state for ticket in tickets] == ["failed"] * 3


@pytest.mark.row(1)
def test_what_was_waited_for_is_not_told_twice(engine: Engine) -> None:
    file = failing(engine)
    ticket = file.write(b"x" * 8192)
    with pytest.raises(AioError, match="ENOSPC"):
        ticket.wait()
    file.flush("none")
    file.close()


@pytest.mark.row(1)
def test_a_dropped_ticket_is_told_by_flush(engine: Engine) -> None:
    file = failing(engine)
    file.write(b"x" * 8192)
    gc.collect()
    with pytest.raises(AioError, match="ENOSPC"):
        file.flush("none")
    file.close()


def test_a_writer_tells_at_close_what_no_sync_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of files that it put away meanwhile, and not again once it was told; a new write that is refused at its
    start hides nothing."""
    writer = AioWriter()
    writer.write("/dev/full", [bytes(8192)])
    with pytest.raises(AioError, match="ENOSPC"):
        writer.sync("/dev/full")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no")

    with monkeypatch.context() as patched:
        patched.setattr(writer._engine, "open", refuse)
        with pytest.raises(PermissionError):
            writer.write("/dev/full", [bytes(8192)])
    with pytest.raises(AioError, match="ENOSPC"):
        writer.sync("/dev/full")
    writer.write("/dev/full", [bytes(8192)])
    for index in range(70):  # more than it keeps open
        writer.write(tmp_path / str(index), [b"fine"])
    with pytest.raises(AioError, match="ENOSPC"):
        writer.close()
    writer.close()
    assert (tmp_path / "69").read_bytes() == b"fine"


@pytest.mark.row(26)
def test_what_cancel_says_is_what_happens(engine: Engine, tmp_path: Path) -> None:
    """True: it ends as cancelled, also where one of its transfers fails meanwhile."""
    memory = bytearray(8 << 20)
    (tmp_path / "file").write_bytes(bytes(5 << 20))
    with engine.open(tmp_path / "file") as file:
        for _ in range(50):
            ticket = file.read(memory)
            said = ticket.cancel()
            with pytest.raises(AioError):
                ticket.wait()
            assert ticket.state == ("cancelled" if said else "failed")
