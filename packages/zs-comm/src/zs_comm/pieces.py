"""The parts into which a reduction of CPU tensors is cut, so that sums run beside transfers; a few go at a time.

part 0   pieces -> | sum | sums ->           (an all-reduce sends its sums on; a reduce-scatter is through)
part 1      pieces ->    | sum | sums ->
part 2                   pieces -> | sum | sums ->
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .deadline import Deadline
from .errors import ZsError
from .group import Call, Group
from .p2p import Messages, message_tag
from .sums import combine


class Part(Protocol):
    """A part of a reduction: ``start`` sends the pieces, ``reduce`` sums them, ``finish`` waits for the rest."""

    def start(self) -> None:
        """Post the messages."""

    def reduce(self, deadline: Deadline) -> None:
        """Wait for the pieces and sum them."""

    def finish(self, deadline: Deadline) -> None:
        """Wait for everything else and drop the buffers."""


class Pipeline:
    """Parts of one reduction, at most ``window`` of them under way; the first are started at once."""

    def __init__(self, parts: Sequence[Part], window: int) -> None:
        self._parts = list(parts)
        self._window = max(window, 1)
        for part in self._parts[: self._window]:
            part.start()

    def finish(self, deadline: Deadline) -> None:
        """Take all parts through to the end, and drop them."""
        parts, self._parts = self._parts, []
        for i, part in enumerate(parts):
            part.reduce(deadline)
            if i:
                parts[i - 1].finish(deadline)
            if i + self._window < len(parts):
                parts[i + self._window].start()
        parts[-1].finish(deadline)


class Pool:
    """Receive buffers that the parts of one reduction hand on to each other: warm memory, and no more than needed."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, like: Tensor) -> Tensor:
        """A 1-d tensor of ``numel`` elements with the dtype of ``like``."""
        for i, buffer in enumerate(self._free):
            if buffer.numel() >= numel and buffer.dtype == like.dtype:
                return self._free.pop(i)[:numel]
        return like.new_empty(numel)

    def give(self, buffer: Tensor) -> None:
        """Hand a buffer back."""
        self._free.append(buffer)


class Pieces:
    """Every rank's piece of one stretch of data comes to the rank that sums it.

    Args:
        call: with this part's own sequence number.
        sent: what each rank gets of this rank's data, by position; ``sent[rank]`` stays here.
        out: takes the sum; as long as ``sent[rank]``, and may be it.
        into_out: the first piece to come is received into ``out``, which must not overlap ``sent[rank]`` then.
    """

    def __init__(
        self,
        group: Group,
        call: Call,
        sent: Sequence[Tensor],
        out: Tensor,
        pool: Pool,
        *,
        op: str = "sum",
        pre: float | None = None,
        post: float | None = None,
        into_out: bool = False,
    ) -> None:
        self._group = group
        self._call = call
        self._sent: Sequence[Tensor] = sent
        self._out = out
        self._pool = pool
        self._op, self._pre, self._post = op, pre, post
        self._into_out = into_out
        self._received: dict[int, Tensor] = {}
        self._messages: Messages | None = None

    def send(self) -> None:
        """Post the sends: they need no memory, and no peer's wait then depends on what this rank waits for."""
        self._messages = messages = Messages(self._group, self._call)
        for peer in self._group.peers:
            messages.send(self._sent[peer], peer)

    def start(self) -> None:
        """Post the receives, in rank order (and the sends, if they are not)."""
        if self._messages is None:
            self.send()
        group, out, messages = self._group, self._out, self._posted()
        for peer in range(group.size):
            if peer != group.rank:
                direct = self._into_out and not self._received
                self._received[peer] = out if direct else self._pool.take(out.numel(), out)
                messages.recv(self._received[peer], peer)

    def reduce(self, deadline: Deadline) -> None:
        """Sum the pieces into ``out`` in rank order."""
        group, messages = self._group, self._posted()
        for peer in self._received:
            messages.wait_recv(peer, deadline)
        own = self._sent[group.rank]
        if any(own.data_ptr() == sent.data_ptr() for peer, sent in enumerate(self._sent) if peer != group.rank):
            messages.wait(deadline)  # the sum overwrites what is being sent
        pieces = [own if rank == group.rank else self._received[rank] for rank in range(group.size)]
        combine(pieces, self._out, op=self._op, pre=self._pre, post=self._post)
        for buffer in self._received.values():
            if buffer is not self._out:
                self._pool.give(buffer)
        self._received.clear()

    def finish(self, deadline: Deadline) -> None:
        """Wait for the sends."""
        self._posted().wait(deadline)
        self._messages = None
        self._sent = ()

    def _posted(self) -> Messages:
        if self._messages is None:
            raise ZsError(
                f"{self._call}: a part is taken further before its pieces were sent, or after it was finished"
            )
        return self._messages


class Bucket:
    """One flat bucket of an all-reduce: each rank sums its slice and sends it round, or all sum all of a small one."""

    def __init__(
        self,
        group: Group,
        call: Call,
        flat: Tensor,
        pool: Pool,
        *,
        small: bool,
        op: str,
        pre: float | None,
        post: float | None,
    ) -> None:
        self._group = group
        self._call = call
        self._flat = flat
        self._small = small
        self._slices = [flat] * group.size if small else slices(flat, group.size)
        own = self._slices[group.rank]
        self._pieces = Pieces(group, call, self._slices, own, pool, op=op, pre=pre, post=post)
        self._results: Messages | None = None

    def start(self) -> None:
        """Send every rank this rank's piece of its slice."""
        self._pieces.send()
        self._pieces.start()

    def reduce(self, deadline: Deadline) -> None:
        """Sum this rank's slice, and send it to all."""
        self._pieces.reduce(deadline)
        if self._small:
            return
        self._results = Messages(self._group, self._call, message_tag(self._call, phase=1))
        for peer in self._group.peers:
            # a peer sends its slice's sum after it took this rank's piece of that slice, so the slice is free by then
            self._results.recv(self._slices[peer], peer)
            self._results.send(self._slices[self._group.rank], peer)

    def finish(self, deadline: Deadline) -> None:
        """Wait for the other slices."""
        self._pieces.finish(deadline)
        if self._results is not None:
            self._results.wait(deadline)
        self._results = None


def slices(flat: Tensor, size: int) -> list[Tensor]:
    """``flat`` cut into equal slices, the last ones shorter or empty."""
    n = -(-flat.numel() // size)
    return [flat[min(r * n, flat.numel()) : min((r + 1) * n, flat.numel())] for r in range(size)]
