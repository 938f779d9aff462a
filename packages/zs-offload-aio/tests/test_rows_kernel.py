"""Rows 7, 11, 12 and 28: system calls interrupted, refused and forbidden; limits of the process and the machine."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from faults_memory import MIB, aligned, pattern
from faults_process import (
    become_nobody,
    exhaust_aio_contexts,
    exhaust_files,
    forbid,
    forbid_threads,
    in_child,
    limit_memory,
    signal_storm,
)
from zs_offload_aio import AioError, Engine, backends


def moves(engine: Engine, path: Path, nbytes: int = 2 * MIB + 77, residue: int = 0) -> None:
    """Bytes go out and come back, through several transfers."""
    data = pattern(nbytes, seed=nbytes)
    target = aligned(nbytes + residue)[residue:]
    with engine.open(path, "w") as file:
        assert file.write(data).wait() == nbytes
        assert file.read(target).wait() == nbytes
        assert bytes(target) == data
        file.flush()
    assert path.read_bytes() == data


# ---- row 7 ----


@pytest.mark.row(7)
@pytest.mark.parametrize("faults", ["eintr=3", "eagain=5", "eintr=2,eagain=7,short=3", "eintr=3,partial=1"])
def test_transient_errors(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str) -> None:
    monkeypatch.setenv("ZS_AIO_FAULTS", faults)
    with Engine(backend=backend, chunk_nbytes=64 * 1024, depth=8) as engine:
        for residue in (0, 1):
            moves(engine, tmp_path / "file", residue=residue)
        stats = engine.stats()
        assert stats["retried"] > 0 and stats["ops_failed"] == 0


@pytest.mark.row(7)
def test_partial_submission(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several transfers, the kernel takes a part; the rest is submitted again and nothing is waited for in vain."""
    monkeypatch.setenv("ZS_AIO_FAULTS", "partial=1")
    with Engine(backend=backend, chunk_nbytes=4096, depth=64) as engine:
        moves(engine, tmp_path / "file")
        assert engine.stats()["ops_done"] == 2


@pytest.mark.row(7)
def test_errors_without_end_are_raised(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrying has an end: a typed error, not a hang."""
    monkeypatch.setenv("ZS_AIO_FAULTS", "eintr=1")
    with Engine(backend=backend) as engine, engine.open(tmp_path / "file", "x") as file:
        with pytest.raises(AioError) as caught:
            file.write(pattern(4096)).wait()
        assert caught.value.errno in (errno.EINTR, errno.EAGAIN) and caught.value.filename == os.fspath(
            tmp_path / "file"
        )


@pytest.mark.row(7)
def test_signal_storm(backend: str, tmp_path: Path) -> None:
    def work() -> int:
        with signal_storm() as came, Engine(backend=backend, chunk_nbytes=4096, depth=4) as engine:
            for residue in (0, 1, 0, 1):
                moves(engine, tmp_path / "file", residue=residue)
        return came[0]

    assert in_child(work) > 10


# ---- row 11 ----

FORBID = {  # to make the engine choose this one: what must not work
    "io_uring": {},
    "libaio": {"io_uring_setup": errno.EPERM},
    "threads": {"io_uring_setup": errno.ENOSYS, "io_setup": errno.ENOSYS},
}


@pytest.mark.row(11)
def test_next_backend_is_chosen(backend: str, tmp_path: Path) -> None:
    """What a container forbids is passed over, with the reason; what is left does the same."""

    def work() -> dict[str, str]:
        os.environ.pop("ZS_AIO_BACKEND", None)
        forbid(**FORBID[backend])
        with Engine() as engine:
            assert engine.backend == backend
            moves(engine, tmp_path / "file")
            assert engine.stats()["why_not"].keys() == backends_before(backend)
            return engine.stats()["why_not"]

    for reason in in_child(work).values():
        assert "not permitted" in reason or "not implemented" in reason


def backends_before(backend: str) -> set[str]:
    order = ["io_uring", "libaio", "threads", "plain"]
    return set(order[: order.index(backend)])


@pytest.mark.row(11)
def test_forced_and_forbidden(backend: str) -> None:
    """A backend that was asked for by name is never replaced: the error says why it does not work."""
    number = {"io_uring": errno.EPERM, "libaio": errno.ENOSYS}.get(backend, errno.EAGAIN)

    def work() -> None:
        forbid(io_uring_setup=errno.EPERM, io_setup=errno.ENOSYS)
        forbid_threads()
        for ask in ({"backend": backend}, {}):
            os.environ["ZS_AIO_BACKEND"] = backend
            with pytest.raises(AioError, match=backend) as caught:
                Engine(**ask)
            assert caught.value.errno in (number, errno.EAGAIN) and caught.value.backend == backend

    in_child(work)


@pytest.mark.row(11)
def test_forced_by_environment(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZS_AIO_BACKEND", backend)
    with Engine() as engine:
        assert engine.backend == engine.stats()["backend"] == backend
    monkeypatch.setenv("ZS_AIO_BACKEND", "carrier pigeon")
    with pytest.raises(ValueError, match="carrier pigeon"):
        Engine()
    assert backends()[backend] == ""


@pytest.mark.row(11)
def test_nothing_works(backend: str) -> None:
    """Not even a thread: an error that says so for each backend, no abort."""

    def work() -> str:
        os.environ.pop("ZS_AIO_BACKEND", None)
        forbid(io_uring_setup=errno.EPERM, io_setup=errno.ENOSYS)
        forbid_threads()
        with pytest.raises(OSError) as caught:
            Engine()
        return str(caught.value)

    assert backend in in_child(work)


# ---- row 12 ----


@pytest.mark.row(12)
def test_ordinary_user(backend: str, public_folder: Path) -> None:
    """No privileges, and 8 MiB of lockable memory: 64 MiB move all the same."""

    def work() -> None:
        become_nobody()
        with Engine(backend=backend) as engine:
            moves(engine, public_folder / "file", nbytes=64 * MIB)

    in_child(work)


@pytest.mark.row(12)
def test_no_lockable_memory(backend: str, public_folder: Path) -> None:
    """Older kernels and this one count a ring as locked memory: then io_uring says so, and is passed over."""

    def work() -> None:
        become_nobody(memlock_nbytes=0)
        if backend == "io_uring":
            os.environ.pop("ZS_AIO_BACKEND", None)
        with Engine(backend=None if backend == "io_uring" else backend) as engine:
            moves(engine, public_folder / "file")
            if engine.backend != backend:
                assert engine.backend == "libaio" and "io_uring_setup" in engine.stats()["why_not"]["io_uring"]

    in_child(work)


# ---- row 28 ----


@pytest.mark.row(28)
def test_no_descriptor_for_a_file(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(10_000))

    def work() -> None:
        with Engine(backend=backend) as engine:
            moves(engine, tmp_path / "other")
            taken = exhaust_files()
            with pytest.raises(AioError) as caught:
                engine.open(path)
            assert caught.value.errno == errno.EMFILE and caught.value.filename == os.fspath(path)
            os.close(taken.pop())
            buffer = aligned(10_000)
            with engine.open(path) as file:  # one descriptor left: the second one, for direct I/O, is not to be had
                assert file.mode == "buffered" and file.reason
                assert file.read(buffer).wait() == 10_000
            assert bytes(buffer) == pattern(10_000)
            for fd in taken:
                os.close(fd)
            moves(engine, tmp_path / "other")

    in_child(work)


@pytest.mark.row(28)
@pytest.mark.parametrize("left", range(4))
def test_no_descriptor_for_the_engine(backend: str, tmp_path: Path, left: int) -> None:
    """An engine, or an AioError that names the backend and the reason; never a leaked descriptor."""

    def work() -> None:
        taken = exhaust_files(left)
        before = len(os.listdir("/proc/self/fd")) if left else 0
        refusal: AioError | None = None
        try:
            Engine(backend=backend).close()
        except AioError as error:
            refusal = error
        if refusal is not None:
            assert refusal.errno == errno.EMFILE and refusal.backend == backend and backend in str(refusal)
        if left:
            assert len(os.listdir("/proc/self/fd")) == before
        for fd in taken:
            os.close(fd)
        with Engine(backend=backend) as engine:
            moves(engine, tmp_path / "file")

    in_child(work)


@pytest.mark.row(28)
@pytest.mark.address_space
@pytest.mark.parametrize("more_mib", [0, 1, 4, 12, 64])
def test_no_memory(backend: str, tmp_path: Path, more_mib: int) -> None:
    """With next to no address space left: the exact bytes, MemoryError or ENOMEM (EAGAIN for a thread)."""
    data, target = pattern(4 * MIB + 5), aligned(4 * MIB + 6)[1:]

    def work() -> str:
        limit_memory(more_mib * MIB)
        try:
            with Engine(backend=backend) as engine, engine.open(tmp_path / "file", "w") as file:
                assert file.write(data).wait() == len(data)
                assert file.read(target).wait() == len(data)
        except MemoryError:
            return "MemoryError"
        except AioError as error:
            return errno.errorcode[error.errno or 0]
        return "done" if bytes(target[: 2 * MIB]) == data[: 2 * MIB] else "wrong bytes"

    assert in_child(work) in ("done", "MemoryError", "ENOMEM", "EAGAIN")


@pytest.mark.row(28)
def test_no_aio_context(backend: str, tmp_path: Path) -> None:
    """The machine's `aio-max-nr` is used up: libaio says so where it is forced, and is passed over where it is not."""

    def work() -> None:
        with Engine(backend=backend) as before:
            exhaust_aio_contexts()
            moves(before, tmp_path / "file")
        exhaust_aio_contexts()
        if backend == "libaio":
            with pytest.raises(AioError, match="io_setup") as caught:
                Engine(backend=backend)
            assert caught.value.errno == errno.EAGAIN
            os.environ.pop("ZS_AIO_BACKEND", None)
            forbid(io_uring_setup=errno.EPERM)
            with Engine() as engine:
                assert engine.backend == "threads" and "io_setup" in engine.stats()["why_not"]["libaio"]
                moves(engine, tmp_path / "file")
        else:
            with Engine(backend=backend) as engine:
                moves(engine, tmp_path / "file")

    in_child(work)


@pytest.mark.row(28)
def test_many_engines(backend: str, tmp_path: Path) -> None:
    """Thirty at once: none takes more of the machine's limits than it can give back."""
    engines = [Engine(backend=backend) for _ in range(30)]
    try:
        for number in (0, 29):
            moves(engines[number], tmp_path / "file")
    finally:
        for engine in engines:
            engine.close()
