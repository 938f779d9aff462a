"""One pass over blocks: read k + 1, update k, write k - 1, through the slots there are.

    slot 0   | read 0 | update 0 | write 0 |        read 3  | update 3 | ...
    slot 1            | read 1   | update 1 | write 1 |        read 4  | ...
    slot 2                       | read 2   | update 2 | write 2 | ...

Blocks are queued when their gradients are there: all at the step, or unit by unit while a backward runs. `advance` does
what can be done without waiting, `finish` the rest. What is written goes to second slots of the store, and new values
of parameters that stay in memory are parked, so that nothing has happened until the owner of the sweep commits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from .blocks import Block
from .slots import Slot


class Sweep:
    """Blocks on their way through `slots`. `start` begins a block's reads, `update` computes and begins its writes.

    `ready`: whether a block may be updated; what is queued is read ahead before.
    """

    def __init__(
        self, slots: list[Slot], *, start: Callable[[Block, Slot], None], update: Callable[[Block, Slot], None],
        ready: Callable[[Block], bool],
    ) -> None:  # fmt: skip
        self._start, self._update, self._ready = start, update, ready
        self._slots = list(slots)
        self._free = deque(slots)  # the one used longest ago first
        self._waiting: deque[Block] = deque()
        self._reading: deque[tuple[Block, Slot]] = deque()
        self._writing: deque[Slot] = deque()
        self.done: list[Block] = []  # in the order of their updates

    def queue(self, blocks: Iterable[Block]) -> None:
        self._waiting.extend(blocks)

    def advance(self) -> None:
        """What needs no waiting: writes that are over free their slots, reads begin, blocks that are there are updated.

        Raises what went wrong with a transfer (OSError, TimeoutError).
        """
        self._run(wait=False)

    def finish(self) -> None:
        """Everything that was queued and is ready, written. Raises as `advance` does."""
        self._waiting = deque(block for block in self._waiting if self._ready(block))
        self._run(wait=True)
        while self._writing:
            self._freed(self._writing.popleft())

    def drain(self) -> None:
        """After an error: waits until nothing uses a slot's memory, whatever became of it."""
        for slot in self._slots:  # one may be neither read nor written: where its own start or update raised
            try:
                slot.wait()
            except (OSError, TimeoutError):
                continue
        self._waiting.clear()
        self._reading.clear()
        self._writing.clear()

    def _run(self, *, wait: bool) -> None:
        while True:
            self._begin()
            if self._reading:
                block, slot = self._reading[0]
                ready = self._ready(block)
                if not wait and not (ready and slot.idle):
                    return
                if not ready:  # nor will it be
                    self._reading.popleft()
                    self._freed(slot)
                    slot.forget()
                    continue
                slot.wait()
                self._reading.popleft()
                self._update(block, slot)
                self.done.append(block)
                self._writing.append(slot)
            elif not self._waiting:
                return
            elif wait:
                self._freed(self._writing.popleft())
            else:
                return

    def _begin(self) -> None:
        while self._writing and self._writing[0].idle:
            self._freed(self._writing.popleft())
        while self._waiting and self._free:
            block = self._waiting.popleft()
            slot = next((slot for slot in self._free if slot.block == block), self._free[0])
            self._free.remove(slot)
            slot.take(block)
            self._start(block, slot)
            self._reading.append((block, slot))

    def _freed(self, slot: Slot) -> None:
        slot.wait()
        self._free.append(slot)
