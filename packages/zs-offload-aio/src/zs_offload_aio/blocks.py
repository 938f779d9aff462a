"""One block of a store, and one transfer of it."""

from __future__ import annotations

from ._core import Ticket
from .errors import AioError


class Block:
    """One reserved block: where it is, and the latest write to it."""

    def __init__(self, key: str, offset: int, nbytes: int) -> None:
        self.key = key
        self.offset = offset
        self.nbytes = nbytes
        self.written: BlockTicket | None = None


class BlockTicket:
    """One transfer of a block in flight. It holds its buffer until it is done."""

    def __init__(self, block: Block, inner: Ticket | None, *, after: BlockTicket | None = None) -> None:
        self.block = block
        self.nbytes = block.nbytes
        self.writes = after is None
        self._inner = inner  # None once its outcome is known
        self._after = after  # of a read: the write that it reads
        self._failure: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        inner = self._inner
        return inner is None or inner.done

    def wait(self, timeout_s: float = 120.0) -> int:
        """Number of bytes moved: all of the block. May be called again, from any thread, after the store's `close` too.

        Raises `AioError` where the transfer failed, and where the block it reads was not written whole; `TimeoutError`
        where it is not done after `timeout_s` seconds (it goes on).
        """
        failure = self.outcome(timeout_s)
        if failure is not None:
            raise failure
        return self.nbytes

    def outcome(self, timeout_s: float) -> Exception | None:
        """As `wait`, but a failure is returned."""
        inner, after = self._inner, self._after
        if inner is not None:
            try:
                inner.wait(timeout_s)
            except TimeoutError:
                raise
            except Exception as error:  # AioError; or of another kind, where bringing it to a device failed
                self._failure = error
            if after is not None and (cause := after.outcome(timeout_s)) is not None:
                # neither the old content nor the new one; the engine went on to the read all the same
                self._failure = _unwritten(self.block, cause)
            self._inner = self._after = None  # the buffer is the caller's alone again
        return self._failure


def _unwritten(block: Block, cause: Exception) -> Exception:
    if not isinstance(cause, AioError):
        return cause
    error = AioError(cause.errno, f"block {block.key!r} was not written whole: {cause.strerror}", cause.filename)
    error.offset, error.nbytes, error.backend, error.done_nbytes = block.offset, block.nbytes, cause.backend, 0
    return error
