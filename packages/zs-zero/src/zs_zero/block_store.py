"""Keyed blocks of bytes in a lower tier: the `BlockStore` Protocol.

    reserve({"a": 4096})        space is taken now, so that a full disk is found before training
    write("a", x) -> Ticket     at once; `x` must not change before the ticket is done
    read("a", y)  -> Ticket     ordered after the write: `y` receives `x`
    discard("a")                the space may be reserved again

Transfers of one key take effect in the order in which they were issued; transfers of different keys overlap. A block is
always moved whole. What every implementation must do is executable: `zs_zero.testing.check_block_store`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Buffer

PROTOCOL = 1


@runtime_checkable
class Ticket(Protocol):
    """One transfer in flight. It holds its buffer until it is done."""

    @property
    def done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""

    def wait(self, timeout_s: float = 120.0) -> int:
        """Number of bytes moved: all of the block. May be called again, from any thread.

        Raises `OSError` (path and offset in its text) where the transfer failed, at every call; `TimeoutError`
        where it is not done after `timeout_s` seconds (it goes on, and can be waited for again).
        """


@runtime_checkable
class BlockStore(Protocol):
    """Keyed blocks of fixed sizes outside of device memory, moved asynchronously. Safe to call from several threads."""

    PROTOCOL: int  # version of this contract; checked before use
    alignment: int  # bytes, a power of two: the address of each `buffer`

    def buffer(self, nbytes: int) -> memoryview:
        """Writable memory of `nbytes` bytes (format `B`), aligned: the memory this store moves fastest.

        It stays valid after `close` for as long as something refers to it. `read` and `write` take any other
        contiguous buffer as well. Raises `ValueError` where `nbytes` is negative.
        """

    def reserve(self, blocks: Mapping[str, int]) -> None:
        """Take space for new blocks, `{key: nbytes}`; all of them or, on an error, none.

        A key that has a block of the same size already keeps it with its content; another size is a `ValueError`
        (`discard` it first), and so is a negative one. No space is an `OSError`.
        """

    def write(self, key: str, buf: Buffer) -> Ticket:
        """Start replacing the whole block. Raises, at once: `KeyError` (no such block), `ValueError` (`buf` is
        not of the block's size), `TypeError` or `BufferError` (`buf` is no contiguous buffer)."""

    def read(self, key: str, buf: Buffer) -> Ticket:
        """Start filling `buf` with the whole block. Raises as `write` does, `TypeError` where `buf` is
        read-only, and `KeyError` for a block that was never written: its content is nobody's."""

    def discard(self, key: str) -> None:
        """Give up a block, after its transfers in flight; nothing happens where there is none."""

    def close(self) -> None:
        """Finish what is in flight and give everything back. May be called again; every other call then raises
        `ValueError`. Tickets given out before still answer."""
