"""Two slots a block: a step in files happens or does not, errors say where, and every byte is counted."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from zs_zero.block_store import BlockStore
from zs_zero.stores import FileStore, MemoryStore
from zs_zero.testing import Fault, FaultyStore
from zs_zero.tiers.files import TierFiles

Make = Callable[[], BlockStore]


@pytest.fixture(params=["memory", "file", "bounded"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FaultyStore]:
    inner: BlockStore = MemoryStore()
    if request.param != "memory":
        inner = FileStore(tmp_path / "blocks", cache_nbytes=1 << 16 if request.param == "bounded" else None)
    made = FaultyStore(inner, path="/disk/blocks")
    yield made
    made.close()


@pytest.fixture
def files(store: FaultyStore) -> TierFiles:
    made = TierFiles(store, kind="optimizer", name="/disk/blocks")
    made.reserve({"a": 5000, "b": 3})
    return made


def content(files: TierFiles, key: str, nbytes: int) -> bytes:
    target = files.buffer(nbytes)
    assert files.read(key, target).wait() == nbytes
    return bytes(target)


def committed(files: TierFiles, **new: bytes) -> None:
    for key, value in new.items():
        assert files.write(key, value).wait() == len(value)
    files.commit()


# -- what is current -------------------------------------------------------------------------------------------------


def test_what_is_written_becomes_current_at_commit(files: TierFiles) -> None:
    assert not files.has("a")
    committed(files, a=b"1" * 5000, b=b"abc")
    for turn in range(2, 6):
        new = bytes([turn]) * 5000
        files.write("a", new).wait()
        assert content(files, "a", 5000) == (b"1" * 5000 if turn == 2 else bytes([turn - 1]) * 5000)
        files.commit()
        assert content(files, "a", 5000) == new
        assert content(files, "b", 3) == b"abc", "a block that was not written is as it was"


def test_rollback_leaves_the_old_content(files: TierFiles) -> None:
    committed(files, a=b"1" * 5000, b=b"abc")
    for _ in range(3):
        files.write("a", b"2" * 5000).wait()
        files.write("b", b"xyz")  # nobody waits
        files.rollback()
        assert content(files, "a", 5000) + content(files, "b", 3) == b"1" * 5000 + b"abc"
        files.commit()
        assert content(files, "a", 5000) == b"1" * 5000, "a commit brings back what was rolled back"


def test_the_last_of_several_writes_is_committed(files: TierFiles) -> None:
    committed(files, b=b"old")
    tickets = [files.write("b", new) for new in (b"one", b"two")]
    for ticket in tickets:
        ticket.wait()
    files.commit()
    assert content(files, "b", 3) == b"two"


def test_overwrite_is_current_at_once_and_needs_no_commit(files: TierFiles) -> None:
    files.overwrite("b", b"one")
    assert files.has("b")
    assert content(files, "b", 3) == b"one"
    files.overwrite("b", b"two").wait()
    files.rollback()
    assert content(files, "b", 3) == b"two"


@pytest.mark.parametrize("first", [True, False])
def test_overwrite_beside_a_pending_write(files: TierFiles, first: bool) -> None:
    if not first:
        committed(files, b=b"old")
    files.write("b", b"new").wait()
    files.overwrite("b", b"set").wait()
    assert content(files, "b", 3) == b"set"
    files.commit()
    assert content(files, "b", 3) == b"new"


def test_one_slot_takes_half_the_space_and_no_write(store: FaultyStore) -> None:
    files = TierFiles(store, kind="gradients", name="x")
    files.reserve({"g": 10}, slots=1)
    assert store.count("reserve") == 1
    files.overwrite("g", b"0123456789").wait()
    assert content(files, "g", 10) == b"0123456789"
    with pytest.raises(ValueError, match="gradients block 'g' has one slot"):
        files.write("g", bytes(10))
    files.reserve({"g": 10})
    assert store.count("reserve") == 3
    committed(files, g=b"9876543210")
    assert content(files, "g", 10) == b"9876543210"
    with pytest.raises(ValueError, match="1 or 2 slots"):
        files.reserve({"h": 1}, slots=3)


def test_keys_that_are_not_there(files: TierFiles) -> None:
    assert not files.has("nobody")
    for call in (files.read, files.write, files.overwrite):
        with pytest.raises(KeyError, match="optimizer block 'nobody' is not reserved"):
            call("nobody", bytearray(3))
    with pytest.raises(KeyError, match="optimizer block 'a' was never written"):
        files.read("a", bytearray(5000))
    files.write("a", bytes(5000)).wait()
    with pytest.raises(KeyError, match="never written"):
        files.read("a", bytearray(5000))
    with pytest.raises(ValueError, match="5000 bytes"):
        files.write("a", bytes(4999))
    with pytest.raises(ValueError, match="not 5001|5001"):
        files.reserve({"a": 5001})


def test_commit_needs_tickets_that_were_waited_for(files: TierFiles, store: FaultyStore) -> None:
    committed(files, a=b"1" * 5000, b=b"old")
    ticket = files.write("b", b"new")
    files.write("a", b"2" * 5000).wait()
    with pytest.raises(RuntimeError, match="the write of block 'b' was not waited for"):
        files.commit()
    assert content(files, "a", 5000) + content(files, "b", 3) == b"1" * 5000 + b"old", "half a commit"
    ticket.wait()
    before = list(store.operations)
    files.commit()
    assert store.operations == before, "a commit does I/O"
    assert content(files, "a", 5000) + content(files, "b", 3) == b"2" * 5000 + b"new"


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_current_content(files: TierFiles, store: FaultyStore) -> None:
    committed(files, a=b"1" * 5000, b=b"old")
    store.fail_next("write", error=errno.ENOSPC)
    ticket = files.write("a", b"2" * 5000)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            ticket.wait()
        told = str(caught.value)
        assert "writing optimizer block 'a' of 5000 bytes" in told
        assert "No space left" in told and "at offset " in told and "/disk/blocks" in told
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/disk/blocks")
    with pytest.raises(RuntimeError, match="the write of block 'a' failed"):
        files.commit()
    assert content(files, "a", 5000) == b"1" * 5000
    files.rollback()
    assert content(files, "a", 5000) == b"1" * 5000
    committed(files, a=b"3" * 5000)
    assert content(files, "a", 5000) == b"3" * 5000


def test_a_write_that_is_tried_again_is_committed(files: TierFiles, store: FaultyStore) -> None:
    committed(files, b=b"old")
    store.fail_next("write")
    with pytest.raises(OSError):
        files.write("b", b"bad").wait()
    committed(files, b=b"new")
    assert content(files, "b", 3) == b"new"


def test_a_failed_overwrite_is_never_read(files: TierFiles, store: FaultyStore) -> None:
    committed(files, b=b"old")
    store.fail_next("write")
    ticket = files.overwrite("b", b"new")
    unknowing = files.read("b", bytearray(3))  # issued before anybody knows
    with pytest.raises(OSError, match="writing optimizer block 'b'"):
        ticket.wait()
    with pytest.raises(OSError, match="reading optimizer block 'b'"):
        unknowing.wait()
    for _ in range(2):
        with pytest.raises(OSError, match="optimizer block 'b' is lost, its last write failed: .*offset") as caught:
            files.read("b", bytearray(3))
        assert caught.value.errno == errno.EIO
    files.overwrite("b", b"set").wait()
    assert content(files, "b", 3) == b"set"


def test_a_write_and_a_commit_bring_a_lost_block_back(files: TierFiles, store: FaultyStore) -> None:
    committed(files, b=b"old")
    store.fail_next("write")
    with pytest.raises(OSError):
        files.overwrite("b", b"bad").wait()
    committed(files, b=b"new")
    assert content(files, "b", 3) == b"new"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.EACCES, errno.ETIMEDOUT])
def test_a_failed_read_keeps_its_class_and_can_be_tried_again(
    files: TierFiles, store: FaultyStore, number: int
) -> None:
    committed(files, b=b"old")
    store.fail_next("read", error=number)
    with pytest.raises(
        type(OSError(number, "")), match="reading optimizer block 'b' of 3 bytes: .* at offset"
    ) as caught:
        files.read("b", bytearray(3)).wait()
    assert caught.value.errno == number
    assert content(files, "b", 3) == b"old"


def test_a_device_that_times_out_failed_but_a_wait_that_does_goes_on(files: TierFiles, store: FaultyStore) -> None:
    committed(files, b=b"old")
    store.fail_next("write", error=errno.ETIMEDOUT)
    with pytest.raises(TimeoutError):
        files.write("b", b"bad").wait()
    with pytest.raises(RuntimeError, match="failed"):
        files.commit()
    files.rollback()

    store.fail_next("write", error="hang")
    ticket = files.write("b", b"new")
    with pytest.raises(TimeoutError, match=r"writing optimizer block 'b' of 3 bytes: .* at offset \d+ .*/disk/blocks"):
        ticket.wait(0.01)
    with pytest.raises(RuntimeError, match="was not waited for"):
        files.commit()
    store.release()
    ticket.wait()
    files.commit()
    assert content(files, "b", 3) == b"new"


def test_an_error_at_the_call_itself(files: TierFiles, store: FaultyStore) -> None:
    committed(files, b=b"old")
    for call in ("write", "overwrite", "read"):
        store.fail_next("read" if call == "read" else "write", early=True)
        with pytest.raises(OSError, match="optimizer block 'b': Input/output error .* at offset"):
            getattr(files, call)("b", bytearray(b"new"))
        files.rollback()
        assert content(files, "b", 3) == b"old"


def test_a_full_disk_is_found_at_reserve(store: FaultyStore) -> None:
    store.faults.append(Fault(op="reserve", error=errno.ENOSPC))
    files = TierFiles(store, kind="parameters", name="/disk/blocks")
    with pytest.raises(
        OSError, match=r"2,000 bytes for 1 blocks of parameters: No space left .*/disk/blocks"
    ) as caught:
        files.reserve({"a": 1000})
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(KeyError):
        files.write("a", bytes(1000))
    files.reserve({"a": 1000})
    committed(files, a=bytes(1000))


class Special(OSError):
    """As a store of its own makes them."""

    offset = nbytes = 0


class Mute(Special):
    def __str__(self) -> str:
        return f"ends at {self.offset}"


class Odd(OSError):
    def __init__(self) -> None:
        super().__init__(errno.EIO, "odd")


class Broken(MemoryStore):
    error: OSError

    def read(self, key: str, buf: object) -> object:  # type: ignore[override]
        raise self.error


@pytest.mark.parametrize("kind", [Special, Mute])
def test_the_classes_of_a_store_stay_where_their_text_can_tell(kind: type[Special]) -> None:
    store = Broken()
    files = TierFiles(store, kind="optimizer", name="/disk/blocks")
    files.reserve({"k": 3})
    committed(files, k=b"abc")
    store.error = kind(errno.EIO, "broken", "/their/path")
    store.error.offset = 4096
    with pytest.raises(OSError, match="optimizer block 'k'") as caught:
        files.read("k", bytearray(3))
    assert caught.value.filename == "/their/path"
    assert caught.value.__cause__ is store.error
    assert type(caught.value) is (Special if kind is Special else OSError)
    assert caught.value.offset == 4096  # type: ignore[attr-defined]
    if kind is Mute:
        assert "ends at 4096" in str(caught.value)


def test_an_error_of_another_shape_is_told_all_the_same() -> None:
    store = Broken()
    files = TierFiles(store, kind="optimizer", name="/disk/blocks")
    files.reserve({"k": 3})
    committed(files, k=b"abc")
    for error in (Odd(), OSError("no number")):
        store.error = error
        with pytest.raises(OSError, match="optimizer block 'k': .*(odd|no number).*/disk/blocks"):
            files.read("k", bytearray(3))


# -- counters --------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_without_padding(files: TierFiles) -> None:
    committed(files, a=bytes(5000), b=b"abc")
    assert (files.nbytes_read, files.nbytes_written) == (0, 5003)
    files.overwrite("b", b"xyz").wait()
    content(files, "a", 5000)
    content(files, "b", 3)
    with pytest.raises(KeyError):
        files.read("nobody", bytearray(3))
    with pytest.raises(ValueError, match="bytes"):
        files.write("a", bytes(3))
    assert (files.nbytes_read, files.nbytes_written) == (5003, 5006)


def test_stalls_and_time_in_flight_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("zs_zero.tiers.files.time.perf_counter", lambda: now[0])

    class Slow:
        done = False

        def wait(self, timeout_s: float = 120.0) -> int:
            now[0] += 0.0 if self.done else 2.0
            self.done = True
            return 3

    class SlowStore(MemoryStore):
        def write(self, key: str, buf: object) -> Slow:  # type: ignore[override]
            return Slow()

    files = TierFiles(SlowStore(), kind="optimizer", name="slow")
    files.reserve({"a": 3, "b": 3})
    now[0] = 10.0
    first = files.write("a", b"abc")
    now[0] = 11.0
    second = files.write("b", b"abc")
    now[0] = 12.0
    assert files.io_s == 2.0, "in flight since 10"
    first.wait()
    first.wait()
    assert (files.stall_s, files.io_s) == (2.0, 4.0)
    second.wait()
    assert (files.stall_s, files.io_s) == (4.0, 6.0)
    now[0] = 100.0
    assert files.io_s == 6.0, "nothing was in flight"
    third = files.write("a", b"abc")
    now[0] = 101.0
    third._inner.done = True  # type: ignore[attr-defined]
    assert files.io_s == 7.0
    now[0] = 200.0
    assert files.io_s == 7.0
    third.wait()
    assert files.stall_s == 4.0


def test_close_ends_it(files: TierFiles) -> None:
    ticket = files.write("a", bytes(5000))
    files.close()
    files.close()
    assert ticket.done
    with pytest.raises(ValueError, match="closed"):
        files.write("a", bytes(5000))


# -- a whole step, failed at each of its transfers ---------------------------------------------------------------------


def step(files: TierFiles, keys: list[str], value: int) -> None:
    """Reads each block and writes it anew: all or nothing."""
    try:
        for key in keys:
            buffer = files.buffer(1000)
            files.read(key, buffer).wait()
            buffer[:] = bytes([value]) * 1000
            files.write(key, buffer).wait()
    except OSError:
        files.rollback()
        raise
    files.commit()


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("early", [True, False])
def test_a_step_that_fails_anywhere_did_not_happen(op: str, early: bool) -> None:
    keys = [f"k{i}" for i in range(5)]
    for number in range(5):
        store = FaultyStore(MemoryStore())
        files = TierFiles(store, kind="optimizer", name="x")
        files.reserve(dict.fromkeys(keys, 1000))
        committed(files, **dict.fromkeys(keys, b"\1" * 1000))
        step(files, keys, 2)
        store.faults.append(Fault(op=op, number=store.count(op) + number, early=early))  # type: ignore[arg-type]
        with pytest.raises(OSError):
            step(files, keys, 3)
        assert {content(files, key, 1000) for key in keys} == {b"\2" * 1000}, f"{op} {number}"
        step(files, keys, 4)
        assert {content(files, key, 1000) for key in keys} == {b"\4" * 1000}
