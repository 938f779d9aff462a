"""What a `BlockStore` must do, as a check to run on any of them."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable

from ..block_store import PROTOCOL, BlockStore, Ticket
from ._expect import expect, refused, run_checks

_BOUND_S = 60.0  # no wait of these checks lasts longer


def check_block_store(make: Callable[[], BlockStore]) -> None:
    """Raise `AssertionError`, naming the rule, where the stores made by `make` break the Protocol.

    `make()` returns an empty open store each time; several are alive one after another, never two at once. They hold
    at most 8 MiB.
    """
    run_checks(_CHECKS, make, lambda store: store.close())


def _move(ticket: Ticket, nbytes: int, what: str) -> None:
    moved = ticket.wait(_BOUND_S)
    expect(moved == nbytes, f"{what}: wait returned {moved}, not {nbytes}")
    expect(ticket.done, f"{what}: not done after wait")


def _write(store: BlockStore, key: str, content: bytes) -> None:
    _move(store.write(key, content), len(content), f"write of {key!r}")


def _content(store: BlockStore, key: str, nbytes: int) -> bytes:
    target = store.buffer(nbytes)
    target[:] = b"\xa5" * nbytes
    _move(store.read(key, target), nbytes, f"read of {key!r}")
    return bytes(target)


def _bytes(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def _says_what_it_is(store: BlockStore) -> None:
    """PROTOCOL and alignment are there"""
    expect(isinstance(store, BlockStore), "a member of the Protocol is missing")
    expect(store.PROTOCOL == PROTOCOL, f"PROTOCOL is {store.PROTOCOL}, not {PROTOCOL}")
    align = store.alignment
    expect(align > 0 and align & (align - 1) == 0, f"alignment {align} is no power of two")


def _buffers(store: BlockStore) -> None:
    """a buffer is aligned, writable and of the asked size"""
    kept = [store.buffer(nbytes) for nbytes in (1, 7, 512, 4096, 4097, 100_000)]
    for view, nbytes in zip(kept, (1, 7, 512, 4096, 4097, 100_000), strict=True):
        expect(view.nbytes == nbytes and view.format == "B" and view.ndim == 1, f"buffer({nbytes}) is {view!r}")
        expect(not view.readonly, f"buffer({nbytes}) is read-only")
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        expect(address % store.alignment == 0, f"buffer({nbytes}) is at {address:#x}")
    for number, view in enumerate(kept):
        view[:] = bytes([number]) * view.nbytes
    for number, view in enumerate(kept):
        expect(bytes(view) == bytes([number]) * view.nbytes, "two buffers share memory")
    expect(store.buffer(0).nbytes == 0, "buffer(0) is not empty")
    with refused(ValueError, what="buffer(-1)"):
        store.buffer(-1)


def _round_trips(store: BlockStore) -> None:
    """what was written is read back, whatever the size and the memory"""
    sizes = (0, 1, 511, 512, 513, 4095, 4096, 4097, 65_537, 1_000_003)
    store.reserve({f"block {n}": n for n in sizes})
    for n in sizes:
        _write(store, f"block {n}", _bytes(n, n))
    for n in reversed(sizes):
        expect(_content(store, f"block {n}", n) == _bytes(n, n), f"block of {n} bytes: other bytes came back")
        target = bytearray(n + 2)
        _move(store.read(f"block {n}", memoryview(target)[1 : n + 1]), n, "read into unaligned memory")
        expect(
            bytes(target) == b"\0" + _bytes(n, n) + b"\0", f"unaligned read of {n} bytes: wrong, or beyond its target"
        )
    _write(store, "block 4097", _bytes(4097, 1))
    expect(_content(store, "block 4097", 4097) == _bytes(4097, 1), "a second write did not replace the first")
    expect(_content(store, "block 4096", 4096) == _bytes(4096, 4096), "a write changed another block")


def _order(store: BlockStore) -> None:
    """transfers of one key take effect in the order of the calls"""
    n = 300_000
    store.reserve({"k": n, "other": n})
    first, second = store.buffer(n), store.buffer(n)
    first[:], second[:] = _bytes(n, 1), _bytes(n, 2)
    _write(store, "k", bytes(n))
    for _ in range(20):
        targets = [bytearray(n) for _ in range(3)]
        tickets = [
            store.read("k", targets[0]),
            store.write("k", first),
            store.write("other", second),
            store.read("k", targets[1]),
            store.write("k", second),
            store.read("k", targets[2]),
            store.write("k", bytes(n)),
        ]
        for ticket in reversed(tickets):
            _move(ticket, n, "overlapping transfer")
        expect(targets[0] == bytes(n), "a read saw a later write")
        expect(targets[1] == first, "a read did not see the write before it, or saw the one after it")
        expect(targets[2] == second, "a read did not see the second of two writes")


def _many_in_flight(store: BlockStore) -> None:
    """hundreds of tickets of many keys may be in flight, and are waited for in any order"""
    keys = [f"k{i}" for i in range(100)]
    store.reserve({key: 1000 + i for i, key in enumerate(keys)})
    tickets = [(store.write(key, _bytes(1000 + i, i)), 1000 + i) for i, key in enumerate(keys)]
    targets = [bytearray(1000 + i) for i in range(100)]
    tickets += [(store.read(key, target), len(target)) for key, target in zip(keys, targets, strict=True)]
    random.Random(0).shuffle(tickets)
    for ticket, nbytes in tickets:
        _move(ticket, nbytes, "one of many")
    for i, target in enumerate(targets):
        expect(target == _bytes(1000 + i, i), f"key {i} got other bytes")


def _tickets(store: BlockStore) -> None:
    """a ticket answers again and again, from any thread, and holds its buffer"""
    store.reserve({"k": 200_000})
    _write(store, "k", bytes(200_000))
    ticket = store.write("k", bytearray(_bytes(200_000, 3)))  # nobody else refers to the buffer
    garbage = [bytearray(200_000) for _ in range(8)]
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ticket.wait(_BOUND_S))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_BOUND_S)
    expect(answers == [200_000] * 4, f"four threads waited for one ticket: {answers}")
    _move(ticket, 200_000, "a ticket waited for again")
    expect(_content(store, "k", 200_000) == _bytes(200_000, 3), "a dropped buffer was not written")
    expect(len(garbage) == 8, "")


def _threads(store: BlockStore) -> None:
    """several threads may use one store"""
    store.reserve({f"k{i}": 5000 for i in range(6)})
    failures: list[str] = []

    def use(i: int) -> None:
        try:
            for turn in range(15):
                store.write(f"k{i}", _bytes(5000, i * 100 + turn))
                if _content(store, f"k{i}", 5000) != _bytes(5000, i * 100 + turn):
                    failures.append(f"thread {i}, turn {turn}: other bytes")
        except Exception as error:
            failures.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=use, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_BOUND_S)
    expect(not any(thread.is_alive() for thread in threads), "a thread hangs")
    expect(not failures, "; ".join(failures))


def _unknown_keys(store: BlockStore) -> None:
    """a key without a block, or without a content, is a KeyError at once"""
    with refused(KeyError, what="write of an unknown key"):
        store.write("nobody", b"abc")
    with refused(KeyError, what="read of an unknown key"):
        store.read("nobody", bytearray(3))
    store.reserve({"k": 3})
    with refused(KeyError, what="read of a block that was never written"):
        store.read("k", bytearray(3))
    store.discard("nobody")


def _wrong_sizes(store: BlockStore) -> None:
    """a block is moved whole: a buffer of another size is a ValueError, and nothing moves"""
    store.reserve({"k": 1000, "next": 1000})
    _write(store, "k", _bytes(1000, 1))
    _write(store, "next", _bytes(1000, 2))
    for nbytes in (0, 1, 999, 1001, 2000):
        with refused(ValueError, what=f"write of {nbytes} bytes to a block of 1000"):
            store.write("k", bytes(nbytes))
        target = bytearray(nbytes)
        with refused(ValueError, what=f"read of a block of 1000 bytes into {nbytes}"):
            store.read("k", target)
        expect(target == bytes(nbytes), "a refused read wrote into its target")
    expect(_content(store, "k", 1000) == _bytes(1000, 1), "a refused write changed the block")
    expect(_content(store, "next", 1000) == _bytes(1000, 2), "a refused write changed the next block")


def _wrong_buffers(store: BlockStore) -> None:
    """memory that is read-only, strided or none at all is refused at once"""
    store.reserve({"k": 8})
    _write(store, "k", b"01234567")
    with refused(TypeError, what="read into bytes"):
        store.read("k", bytes(8))
    with refused(TypeError, ValueError, BufferError, what="read into strided memory"):
        store.read("k", memoryview(bytearray(16))[::2])
    with refused(TypeError, ValueError, BufferError, what="write from reversed memory"):
        store.write("k", memoryview(bytearray(8))[::-1])
    with refused(TypeError, what="write of a string"):
        store.write("k", "01234567")  # type: ignore[arg-type]
    expect(_content(store, "k", 8) == b"01234567", "a refused write changed the block")
    _write_shaped = memoryview(b"76543210").cast("I")
    _move(store.write("k", _write_shaped), 8, "write of two 4-byte items")
    expect(_content(store, "k", 8) == b"76543210", "items of several bytes were not taken as their bytes")


def _reserving(store: BlockStore) -> None:
    """reserve keeps what is there, refuses another size, and takes all or nothing"""
    store.reserve({})
    store.reserve({"k": 100})
    _write(store, "k", _bytes(100, 1))
    store.reserve({"k": 100, "l": 50})
    expect(_content(store, "k", 100) == _bytes(100, 1), "a repeated reserve lost the content")
    with refused(ValueError, what="reserve of a negative size"):
        store.reserve({"m": -1})
    with refused(ValueError, what="reserve of a key with another size"):
        store.reserve({"n": 10, "k": 101})
    with refused(KeyError, what="write to a block of a refused reserve"):
        store.write("n", bytes(10))
    expect(_content(store, "k", 100) == _bytes(100, 1), "a refused reserve lost the content")


def _discarding(store: BlockStore) -> None:
    """discard forgets the block and its content; the key may come back with another size"""
    store.reserve({"a": 5000, "b": 5000, "c": 5000})
    for seed, key in enumerate("abc"):
        _write(store, key, _bytes(5000, seed))
    flying = store.write("b", _bytes(5000, 7))
    store.discard("b")
    _move(flying, 5000, "a write in flight at discard")
    with refused(KeyError, what="read of a discarded key"):
        store.read("b", bytearray(5000))
    store.reserve({"b": 4000, "d": 6000})
    with refused(KeyError, what="read of a key that came back and was not written"):
        store.read("b", bytearray(4000))
    _write(store, "b", _bytes(4000, 3))
    _write(store, "d", _bytes(6000, 4))
    for key, n, seed in (("a", 5000, 0), ("b", 4000, 3), ("c", 5000, 2), ("d", 6000, 4)):
        expect(_content(store, key, n) == _bytes(n, seed), f"{key!r} lost its content beside a discarded block")


def _closing(store: BlockStore) -> None:
    """close finishes what is in flight, may be repeated, and ends every other call"""
    store.reserve({"k": 500_000})
    kept = store.buffer(16)
    _write(store, "k", _bytes(500_000, 1))
    target = bytearray(500_000)
    tickets = [store.read("k", target), store.write("k", bytes(500_000))]
    store.close()
    store.close()
    for ticket in tickets:
        expect(ticket.done, "close left a transfer in flight")
        _move(ticket, 500_000, "a ticket after close")
    expect(target == _bytes(500_000, 1), "a read that was in flight at close has other bytes")
    kept[:] = b"0123456789abcdef"
    with refused(ValueError, what="write after close"):
        store.write("k", bytes(500_000))
    with refused(ValueError, what="read after close"):
        store.read("k", target)
    with refused(ValueError, what="reserve after close"):
        store.reserve({"l": 1})
    with refused(ValueError, what="discard after close"):
        store.discard("k")
    with refused(ValueError, what="buffer after close"):
        store.buffer(1)


_CHECKS: list[Callable[[BlockStore], None]] = [
    _says_what_it_is,
    _buffers,
    _round_trips,
    _order,
    _many_in_flight,
    _tickets,
    _threads,
    _unknown_keys,
    _wrong_sizes,
    _wrong_buffers,
    _reserving,
    _discarding,
    _closing,
]
