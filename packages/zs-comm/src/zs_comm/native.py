"""Collectives of CUDA tensors, by the device's backend (NCCL).

Each is issued at once and returns a :class:`Started`, which orders the current stream after it and does the local part.
Nothing here blocks the host: a collective that hangs is bounded by the process group's timeout (NCCL's watchdog).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .deadline import Deadline
from .group import Group
from .sums import accumulator


class Started:
    """A device collective in flight; ``inputs`` stay alive until it completed."""

    __slots__ = ("_inputs", "_local", "_work")

    def __init__(self, work: Any, local: Callable[[], Tensor], *inputs: Tensor | None) -> None:
        self._work = work
        self._local = local
        self._inputs = inputs

    def poll(self) -> bool:
        """True once the device has finished the collective."""
        return bool(self._work.is_completed())

    def __call__(self, deadline: Deadline) -> Tensor:
        """Order the current stream behind the collective; do the local part; return the result."""
        self._work.wait()
        return self._local()


def all_gather(flat: Tensor, own: Tensor, group: Group) -> Started:
    """``own`` is flat's own slice: NCCL gathers in place then."""
    work = _all_gather(flat, own, group)
    return Started(work, lambda: flat, own)


def reduce_scatter(flat: Tensor, group: Group, out: Tensor, pre: float | None, post: float | None) -> Started:
    """As an all-to-all and a local sum: the bytes of the ring form, but a sum in rank order and in fp32."""
    received = torch.empty_like(flat)
    work = dist.all_to_all_single(received, flat, group=group.process_group, async_op=True)
    return Started(work, lambda: out.copy_(reduce_rows(received.view(group.size, -1), "sum", pre, post)), flat)


def reduce_rows(rows: Tensor, op: str, pre: float | None, post: float | None) -> Tensor:
    """(size, n) -> (n,): as :func:`zs_comm.sums.combine`; the casts run inside the kernels, so no chunks are needed."""
    acc_dtype = accumulator(rows.dtype)
    acc = rows[0].to(acc_dtype, copy=True)
    if pre is not None:
        acc.mul_(pre)
    for row in rows[1:]:
        value = row if pre is None else row.to(acc_dtype, copy=True).mul_(pre)
        if op == "sum":
            acc.add_(value)
        else:
            (torch.maximum if op == "max" else torch.minimum)(acc, value.to(acc_dtype), out=acc)
    if post is not None:
        acc.mul_(post)
    return acc.to(rows.dtype)


def broadcast(tensor: Tensor, group: Group, src: int) -> Started:
    """``src`` is a position in the group."""
    work = dist.broadcast(tensor, src=group.members[src], group=group.process_group, async_op=True)
    return Started(work, lambda: tensor)


def scatter(flat: Tensor | None, out: Tensor, group: Group, src: int) -> Started:
    """``flat`` (size * n,) on the source only."""
    slices = None if flat is None else list(flat.view(group.size, *out.shape).unbind(0))
    work = dist.scatter(out, slices, src=group.members[src], group=group.process_group, async_op=True)
    return Started(work, lambda: out, flat)


def all_to_all(out: Tensor, target: Tensor, source: Tensor, group: Group) -> Started:
    """``target`` is ``out`` as 1-d."""
    work = dist.all_to_all_single(target, source, group=group.process_group, async_op=True)
    return Started(work, lambda: out, source)


def gather_rows(tensor: Tensor, group: Group) -> tuple[Any, Tensor]:
    """Every rank's ``tensor`` (n,): the work in flight and the rows (size, n)."""
    rows = tensor.new_empty(group.size, tensor.numel())
    return _all_gather(rows.view(-1), tensor, group), rows


def _all_gather(flat: Tensor, own: Tensor, group: Group) -> Any:
    # torch 2.13 renamed it, and warns of the old name
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(flat, own, group=group.process_group, async_op=True)


class Bucket:
    """One bucket of an all-reduce; its second collective is issued where the first is waited for, in stream order."""

    def __init__(
        self, group: Group, flat: Tensor, *, small: bool, op: str, pre: float | None, post: float | None
    ) -> None:
        self._group = group
        self._flat = flat
        self._small = small
        self._padded = flat
        self._op, self._pre, self._post = op, pre, post
        self._sum: Started | None = None
        self._gather: Started | None = None

    def start(self) -> None:
        """Send every rank this rank's piece of its slice; small buckets go to all as they are."""
        flat, group, op, pre, post = self._flat, self._group, self._op, self._pre, self._post
        if self._small:
            work, rows = gather_rows(flat, group)
            self._sum = Started(work, lambda: flat.copy_(reduce_rows(rows, op, pre, post)))
            return
        padding = -flat.numel() % group.size
        if padding:
            self._padded = torch.nn.functional.pad(flat, (0, padding))
        received = torch.empty_like(self._padded)
        work = dist.all_to_all_single(received, self._padded, group=group.process_group, async_op=True)
        self._sum = Started(work, lambda: reduce_rows(received.view(group.size, -1), op, pre, post))

    def reduce(self, deadline: Deadline) -> None:
        """Sum this rank's slice, and send it to all."""
        if self._sum is None:
            return
        own = self._sum(deadline)
        self._sum = None
        if not self._small:
            self._gather = all_gather(self._padded, own, self._group)

    def finish(self, deadline: Deadline) -> None:
        """Take in the other slices."""
        if self._gather is not None:
            whole = self._gather(deadline)
            if whole is not self._flat:
                self._flat.copy_(whole[: self._flat.numel()])
        self._gather = None
