"""The handle of a collective in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .deadline import Deadline
from .group import Call, Group


class Work:
    """A collective in flight.

    The data moves in the background; :meth:`wait` does what is left (sums, checks), on the caller's thread, inside a
    span named after the collective. Inputs and receive buffers are dropped as soon as it completed; the result is kept,
    so waiting twice is fine.
    """

    __slots__ = (
        "__weakref__",
        "_call",
        "_error",
        "_finish",
        "_group",
        "_on_complete",
        "_on_error",
        "_poll",
        "_result",
        "relays",
    )

    def __init__(
        self,
        group: Group,
        call: Call,
        finish: Callable[[Deadline], Tensor | None] | None,
        *,
        result: Tensor | None = None,
        poll: Callable[[], bool] | None = None,
        relays: bool = False,
    ) -> None:
        self._group = group
        self._call = call
        self._finish = finish  # None: completed
        self._poll = poll
        self.relays = relays  # True: the peers' waits need this rank's wait, because not all was posted at once
        self._result = result
        self._error: BaseException | None = None
        self._on_complete: list[Callable[[Tensor | None], Any]] = []
        self._on_error: list[Callable[[BaseException], Any]] = []

    @property
    def done(self) -> bool:
        """True when :meth:`wait` would return at once.

        On gloo a message can only be asked for by waiting for it, so there it turns True in :meth:`wait`.
        """
        return self._finish is None or (self._poll is not None and self._poll())

    def wait(self, timeout_s: float | None = None) -> Tensor | None:
        """Wait until the collective completed and return its result.

        Args:
            timeout_s: the bound; default the group's.

        Raises:
            CommTimeout: it did not complete in time. The group is of no use afterwards.
            PeerLost: a peer's connection closed.
            RankDisagreement: the group is ``checked`` and a peer made another call.
        """
        finish = self._finish
        if finish is not None:
            group = self._group
            self._finish = self._poll = None
            bound = group.timeout_s if timeout_s is None else timeout_s
            try:
                # a reduction issued before may need this rank to go on (an all-reduce sends its sums once they are
                # there): were this rank to wait here first, and another there, both would wait for ever
                for earlier in [work for work in group.in_flight.values() if work.relays]:
                    if earlier is self:
                        break
                    earlier.wait(timeout_s)
                if group.observers.active:
                    with group.observers.span(self._call.op, self._call.label):
                        self._result = finish(Deadline(bound))
                else:
                    self._result = finish(Deadline(bound))
            except BaseException as error:
                self._error = error
                raise
            finally:
                group.in_flight.pop(id(self), None)
                del finish
                self._settle()
        if self._error is not None:
            raise self._error
        return self._result

    def on_complete(self, callback: Callable[[Tensor | None], Any]) -> None:
        """Call ``callback(result)`` in :meth:`wait`, on the waiting thread, once it completed (at once if it has)."""
        self._on_complete.append(callback)
        if self._finish is None:
            self._settle()

    def on_error(self, callback: Callable[[BaseException], Any]) -> None:
        """Call ``callback(error)`` in :meth:`wait`, on the waiting thread, if it fails (at once if it has)."""
        self._on_error.append(callback)
        if self._finish is None:
            self._settle()

    def _settle(self) -> None:
        complete, failed = self._on_complete, self._on_error
        self._on_complete, self._on_error = [], []
        if self._error is None:
            for done in complete:
                done(self._result)
        else:
            for handle in failed:
                handle(self._error)

    def __repr__(self) -> str:
        state = "in flight" if self._finish else "failed" if self._error else "done"
        return f"Work({self._call}, {state})"
