"""Messages between the ranks of a group on the CPU backend (gloo).

gloo's own reduce-scatter is an all-reduce underneath (it carries twice the bytes that are due), and its gathers copy;
sends and receives carry what they should, straight between the tensors, in the background, several times faster.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor

from .deadline import Deadline
from .group import Call, Group
from .postmortem import Outcome, failure

_ARRIVED_WAIT = timedelta(milliseconds=1)


def message_tag(call: Call, phase: int = 0) -> int:
    """The tag of a call's messages: its sequence number and a hash of the call.

    With the hash in it, messages of different calls never pair up: ranks that took different paths run into the bounded
    wait. (If they paired, gloo would end the process on differing sizes, and give wrong numbers on equal ones.)
    """
    text = f"{call.op}\0{call.label}\0{call.nbytes}\0{phase}"
    return (call.seq & 0x7FFF) << 16 | (zlib.crc32(text.encode()) & 0xFFFE)


def header_tag(seq: int) -> int:
    """The tag of the fingerprint of the call ``seq``; odd, as no message tag is, and the same whatever the call."""
    return (seq & 0x7FFF) << 16 | 1


class Messages:
    """The messages of one collective, or of one phase of it; at most one receive from each peer at a time."""

    __slots__ = ("_arrived", "_backend", "_call", "_group", "_recvs", "_sends", "_tag")

    def __init__(self, group: Group, call: Call, tag: int | None = None) -> None:
        self._group = group
        self._call = call
        self._tag = message_tag(call) if tag is None else tag
        self._backend = group.cpu_backend
        self._sends: list[tuple[int, Any, Tensor]] = []
        self._recvs: dict[int, tuple[Any, Tensor]] = {}  # the tensors are kept alive until their message is through
        self._arrived: set[int] = set()

    def send(self, tensor: Tensor, peer: int) -> None:
        """Post a send of a contiguous tensor; it must not change until :meth:`wait` returned. Empty ones do not go."""
        if tensor.numel():
            try:
                self._sends.append((peer, self._backend.send([tensor], peer, self._tag), tensor))
            except RuntimeError as error:
                raise self._failed(error, peer) from error

    def recv(self, tensor: Tensor, peer: int) -> None:
        """Post a receive into a contiguous tensor."""
        if tensor.numel():
            try:
                self._recvs[peer] = (self._backend.recv([tensor], peer, self._tag), tensor)
            except RuntimeError as error:
                raise self._failed(error, peer) from error
        else:
            self._arrived.add(peer)

    def wait_recv(self, peer: int, deadline: Deadline) -> None:
        """Wait until the message from ``peer`` is in its tensor."""
        if peer in self._recvs:
            self._wait(self._recvs[peer][0], peer, deadline)
            del self._recvs[peer]
            self._arrived.add(peer)

    def wait(self, deadline: Deadline) -> None:
        """Wait for everything that was posted."""
        for peer in tuple(self._recvs):
            self.wait_recv(peer, deadline)
        while self._sends:
            peer, work, _ = self._sends[-1]
            self._wait(work, peer, deadline)
            self._sends.pop()

    def giving(self, result: Tensor) -> Callable[[Deadline], Tensor]:
        """What is left to do when all that remains is to wait: a function of the deadline that gives ``result``."""

        def finish(deadline: Deadline) -> Tensor:
            self.wait(deadline)
            return result

        return finish

    def _wait(self, work: Any, peer: int, deadline: Deadline) -> None:
        try:
            work.wait(deadline.remaining())
        except RuntimeError as error:
            raise self._failed(error, peer, deadline.elapsed_s()) from error

    def _failed(self, error: RuntimeError, peer: int, seconds: float = 0.0) -> Exception:
        text = str(error)
        timed_out = "Timed out" in text
        if not (timed_out or _is_closed(text)):
            return error
        missing, closed = {peer}, set() if timed_out else {peer}
        for other, (work, _) in self._recvs.items():
            if other != peer:
                try:
                    work.wait(_ARRIVED_WAIT)
                    self._arrived.add(other)
                except RuntimeError as reason:
                    missing.add(other)
                    if "closed by peer" in str(reason):
                        closed.add(other)
        self._recvs.clear()
        self._sends.clear()
        return failure(self._group, self._call, Outcome(timed_out, seconds, self._arrived - {peer}, missing, closed))


def _is_closed(text: str) -> bool:
    return any(sign in text for sign in ("closed", "closure", "reset by peer", "Broken pipe", "refused"))
