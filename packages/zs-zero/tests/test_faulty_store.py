"""The store that fails on demand is a store, and fails exactly where it is told."""

from __future__ import annotations

import errno

import pytest
from zs_zero.stores import MemoryStore
from zs_zero.testing import Fault, FaultyStore, check_block_store


@pytest.fixture
def store() -> FaultyStore:
    made = FaultyStore(MemoryStore(), path="/disk/blocks")
    made.reserve({"a": 4, "b": 4})
    made.write("a", b"aaaa").wait()
    made.write("b", b"bbbb").wait()
    return made


def test_without_faults_it_conforms() -> None:
    check_block_store(lambda: FaultyStore(MemoryStore()))


def test_operations_are_counted(store: FaultyStore) -> None:
    store.read("a", bytearray(4))
    assert store.operations == [("reserve", "a"), ("reserve", "b"), ("write", "a"), ("write", "b"), ("read", "a")]
    assert [store.count(op) for op in ("reserve", "write", "read")] == [2, 2, 1]  # type: ignore[arg-type]
    assert store.count("write", lambda key: key == "b") == 1


def test_the_chosen_operation_fails_and_no_other(store: FaultyStore) -> None:
    store.faults.append(Fault(op="write", number=2, keys=lambda key: key == "b", error=errno.ENOSPC))
    store.write("b", b"1111").wait()  # number 1 of "b"
    store.write("a", b"2222").wait()
    with pytest.raises(OSError, match="while writing 4 bytes at offset 4: '/disk/blocks'") as caught:
        store.write("b", b"3333").wait()
    assert caught.value.errno == errno.ENOSPC
    target = bytearray(4)
    assert store.read("a", target).wait() == 4
    assert target == b"2222"
    with pytest.raises(OSError, match="No space left"):
        store.read("b", target).wait()
    assert target[2:] != b"33", "a failed write is read"
    store.write("b", b"4444").wait()
    store.read("b", target).wait()
    assert target == b"4444"


def test_several_in_a_row(store: FaultyStore) -> None:
    store.faults.append(Fault(op="read", number=1, count=2))
    outcomes = []
    for _ in range(5):
        try:
            outcomes.append(store.read("a", bytearray(4)).wait())
        except OSError as error:
            outcomes.append(-error.errno)
    assert outcomes == [4, -errno.EIO, -errno.EIO, 4, 4]


def test_a_failed_read_leaves_rubbish_and_the_block_as_it_was(store: FaultyStore) -> None:
    store.fail_next("read")
    target = bytearray(4)
    ticket = store.read("a", target)
    with pytest.raises(OSError, match="reading 4 bytes at offset 0"):
        ticket.wait()
    assert target not in (b"aaaa", bytes(4))
    store.read("a", target).wait()
    assert target == b"aaaa"


def test_early_faults_raise_from_the_call_and_change_nothing(store: FaultyStore) -> None:
    for op in ("read", "write"):
        store.fail_next(op, early=True)  # type: ignore[arg-type]
        with pytest.raises(OSError):
            getattr(store, op)("a", bytearray(4))
    target = bytearray(4)
    store.read("a", target).wait()
    assert target == b"aaaa"


def test_a_reservation_that_fails_takes_nothing(store: FaultyStore) -> None:
    store.faults.append(Fault(op="reserve", keys=lambda key: key == "d", error=errno.ENOSPC))
    with pytest.raises(OSError, match="reserving 3 bytes at offset 8"):
        store.reserve({"c": 1, "d": 2})
    with pytest.raises(KeyError):
        store.write("c", b"1")
    store.reserve({"c": 1, "d": 2})
    store.write("c", b"1").wait()


def test_what_hangs_times_out_at_once_and_goes_on_when_let_go(store: FaultyStore) -> None:
    store.fail_next("write", error="hang")
    ticket = store.write("a", b"cccc")
    assert not ticket.done
    for _ in range(2):
        with pytest.raises(TimeoutError, match="4 bytes at offset 0 of /disk/blocks is not done after 60"):
            ticket.wait(60)
    store.release()
    assert ticket.wait() == 4 and ticket.done
    target = bytearray(4)
    store.read("a", target).wait()
    assert target == b"cccc"


def test_close_lets_go(store: FaultyStore) -> None:
    store.fail_next("read", error="hang")
    ticket = store.read("a", bytearray(4))
    store.close()
    assert ticket.wait() == 4
