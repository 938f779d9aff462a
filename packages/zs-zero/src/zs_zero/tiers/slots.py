"""Slots: the bounded memory that blocks pass through, its size known before training.

A slot holds every region of one block. What it held last stays valid until something else changes that block, so a
sweep in the other direction finds the blocks of the last one's end here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..block_store import Ticket
from .blocks import Block

_ALIGN = 4096  # bytes: of each region, so that every transfer can be direct


class Slot:
    """Memory for the regions of one block."""

    def __init__(self, buffer: memoryview, sizes: Mapping[str, int]) -> None:
        self._memory = buffer
        self._bytes = (
            torch.frombuffer(buffer, dtype=torch.uint8) if buffer.nbytes else torch.empty(0, dtype=torch.uint8)
        )
        self._offsets = offsets_of(sizes)
        self.block: Block | None = None
        self.valid: set[str] = set()  # regions of `block` that equal what is stored
        self.tickets: list[Ticket] = []  # of transfers that use this memory
        self._overdue: list[Ticket] = []  # given up on, and still using it

    def tensor(self, region: str, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) over the region's memory."""
        at = self._offsets[region]
        return self._bytes[at : at + numel * dtype.itemsize].view(dtype)

    def view(self, region: str, nbytes: int) -> memoryview:
        """The same as bytes, for a store."""
        at = self._offsets[region]
        return self._memory[at : at + nbytes]

    def take(self, block: Block) -> None:
        """The slot is `block`'s now. Raises TimeoutError while an earlier transfer that was given up on uses it."""
        settle(self._overdue)
        if self.block != block:
            self.block, self.valid = block, set()

    def forget(self) -> None:
        self.block, self.valid = None, set()

    @property
    def idle(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return all(ticket.done for ticket in self.tickets)

    def wait(self) -> None:
        """For the transfers that use this memory. Raises what went wrong with the first, after all of them.

        What is not over by then is given up on, and keeps the slot from its next block.
        """
        tickets, self.tickets = self.tickets, []
        try:
            wait_for_all(tickets)
        finally:
            self._overdue += [ticket for ticket in tickets if not ticket.done]


class Refused:
    """The ticket of a transfer that its store refused to begin."""

    done = True

    def __init__(self, error: OSError) -> None:
        self._error = error

    def wait(self, timeout_s: float = 120.0) -> int:
        raise self._error


def begun(begin: Callable[[str, Any], Ticket], key: str, buf: memoryview) -> Ticket:
    """`begin(key, buf)`; an error of the call comes from the ticket, as all others do."""
    try:
        return begin(key, buf)
    except OSError as error:
        return Refused(error)


def wait_for_all(tickets: Sequence[Ticket]) -> None:
    """Waits for each; then raises what went wrong with the first that failed."""
    failure: OSError | None = None
    for ticket in tickets:
        try:
            ticket.wait()
        except OSError as error:  # TimeoutError too
            failure = failure or error
    if failure is not None:
        raise failure


def settle(overdue: list[Ticket]) -> None:
    """Waits for what was given up on, whatever became of it, and empties the list. TimeoutError if it still is due."""
    while overdue:
        try:
            overdue[0].wait()
        except OSError:
            if not overdue[0].done:
                raise
        del overdue[0]


def offsets_of(sizes: Mapping[str, int]) -> dict[str, int]:
    """Where each region of these sizes (bytes) begins."""
    offsets, end = {}, 0
    for region, nbytes in sizes.items():
        offsets[region] = end
        end += -(-nbytes // _ALIGN) * _ALIGN
    return offsets


def slot_nbytes(sizes: Mapping[str, int]) -> int:
    """Bytes of a slot with room for regions of these sizes."""
    return sum(-(-nbytes // _ALIGN) * _ALIGN for nbytes in sizes.values())
