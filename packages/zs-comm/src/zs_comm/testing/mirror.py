"""A group of any size in one process: its peers do what this rank does."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import Tensor

from zs_comm.group import Group


def mirrored_group(size: int, axis: str = "dp") -> Group:
    """A simulated group of `size` ranks, of which this process is rank 0; nothing is initialised and nothing travels.

    What a peer "sends" is what this rank sent to it: agreements agree, a sum of gradients has terms of the right shape
    and size, and a gather finds this rank's part in every place. So it shows that a program runs at that size, and what
    it holds and sends; not that its numbers are right. CPU tensors only.
    """
    nobody: Any = _Nobody() if size > 1 else None
    return Group(axis, members=tuple(range(size)), process_group=nobody)


class _Nobody:
    """In the place of a process group."""

    def _get_backend(self, device: Any) -> _Mirror:
        return _Mirror()


class _Mirror:
    """As much of a torch backend as `zs_comm.p2p` calls; the messages of a collective have a tag of their own."""

    def __init__(self) -> None:
        self._sent: dict[int, dict[int, Tensor]] = {}

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        self._sent.setdefault(tag, {})[peer] = tensors[0]
        while len(self._sent) > _KEPT:
            del self._sent[next(iter(self._sent))]
        return _Done()

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return _Receive(self._sent, tag, peer, tensors[0])


_KEPT = 16  # collectives in flight


class _Done:
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


class _Receive:
    def __init__(self, sent: dict[int, dict[int, Tensor]], tag: int, peer: int, target: Tensor) -> None:
        self._sent, self._tag, self._peer, self._target = sent, tag, peer, target

    def wait(self, timeout: timedelta | None = None) -> bool:
        target = self._target.view(-1).zero_()
        mine = self._sent.get(self._tag, {})
        source = _own_slice(mine, target) if 1 in mine else None
        source = mine.get(self._peer) if source is None else source
        if source is not None:
            fits = min(target.numel(), source.numel())  # the last rank's part may be shorter
            target[:fits] = source.reshape(-1)[:fits]
        return True


def _own_slice(sent: dict[int, Tensor], target: Tensor) -> Tensor | None:
    """Rank 0's slice, where every peer is sent one of its own; None where all are sent the same.

    The slices of a buffer follow each other. With one peer it takes a look at where the message goes: a gather's goes
    behind what is sent.
    """
    first, second = sent[1], sent.get(2)
    start, count = first.storage_offset(), first.numel()
    if second is None:
        same = first.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
        scattered = start >= count and not same
    else:
        scattered = second.storage_offset() != start
    return first.as_strided((count,), (1,), start - count) if scattered else None
