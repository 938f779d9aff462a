"""Chunk size and depth: found on the traffic where they are left open, visible, and kept where they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from zs_offload_aio import Engine

MIB = 1 << 20


def of(engine: Engine, direction: str) -> dict[str, Any]:
    (found,) = [entry for entry in engine.stats()["calibration"] if entry["direction"] == direction]
    return found


@pytest.mark.parametrize("backend", ["io_uring", "libaio"])
def test_it_settles_on_one_of_what_it_tried(backend: str, tmp_path: Path) -> None:
    """Every candidate carries three windows of 32 MiB; what was tried and what was chosen is to be seen."""
    path, memory = tmp_path / "file", bytearray(64 * MIB)
    with Engine(backend=backend) as engine, engine.open(path, "w") as file:
        file.preallocate(len(memory))
        file.write(memory).wait()
        assert not of(engine, "read")["settled"]
        for _ in range(10):
            for ticket in [file.read(memory) for _ in range(8)]:
                ticket.wait()
            if of(engine, "read")["settled"]:
                break
        found = of(engine, "read")
        assert found["settled"]
        assert [entry["windows"] for entry in found["tried"]] == [3] * len(found["tried"])
        assert all(entry["gb_per_s"] > 0 for entry in found["tried"])
        assert (found["chunk_nbytes"], found["depth"]) in {
            (entry["chunk_nbytes"], entry["depth"]) for entry in found["tried"]
        }
        assert found["device"] == path.stat().st_dev
        chunks = -(-len(memory) // found["chunk_nbytes"])
        ticket = file.read(memory)
        ticket.wait()
        assert ticket.chunks <= chunks + 64 * MIB // MIB  # bounced parts are at most 1 MiB


def test_pauses_are_not_measured(tmp_path: Path) -> None:
    """One request at a time never fills the queue: nothing is concluded from it."""
    path, memory = tmp_path / "file", bytearray(4096)
    path.write_bytes(bytes(MIB))
    with Engine() as engine, engine.open(path) as file:
        for _ in range(300):
            file.read(memory).wait()
        found = of(engine, "read")
        assert all(entry["windows"] == 0 for entry in found["tried"])


def test_what_is_given_is_kept(backend: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    with Engine(backend=backend, chunk_nbytes=65536, depth=3, threads=3) as engine:
        with engine.open(tmp_path / "file") as file:
            ticket = file.read(bytearray(MIB))
            assert ticket.wait() == MIB
            assert ticket.chunks >= 16
        found = of(engine, "read")
        assert found["settled"] and found["tried"] == [] and found["chunk_nbytes"] == 65536
        assert found["depth"] == (1 if backend == "plain" else 3)
        assert engine.stats()["peak_depth"] <= 3


def test_carried_by_what_is_said(tmp_path: Path) -> None:
    """Linux AIO is asynchronous for direct I/O only; what is not direct is carried by plain calls, and told."""
    with Engine(backend="libaio") as engine, engine.open(tmp_path / "file", "w", direct=False) as file:
        file.write(bytes(MIB)).wait()
        assert file.mode == "buffered" and file.reason == "asked for; carried by pread and pwrite"
        assert engine.stats()["buffered_nbytes"] == MIB
