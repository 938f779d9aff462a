"""The collectives that add: reduce-scatter and all-reduce.

An element's sum does not depend on the bucket it is in, nor on the way it takes (rank order, fp32, rounded once), so
bucketed and unbucketed, large and small, CPU and CUDA, synchronous and asynchronous give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from . import native
from .calls import begin, factors, in_background, local, slice_numel, start, start_native
from .deadline import Deadline
from .errors import ConfigError
from .group import Call, Group
from .pieces import Bucket, Part, Pieces, Pipeline, Pool, slices
from .sums import combine
from .work import Work

SMALL_NBYTES = 64 * 1024  # up to here one round trip costs more than sending everything to everyone
PART_NBYTES = 4 * 2**20  # of a reduce-scatter
PART_NUMEL_LEAST = 16 * 1024
BUCKET_NBYTES = 16 * 2**20  # of an all-reduce
WINDOW = 3  # buckets under way at a time

TensorsT = TypeVar("TensorsT", bound=Tensor | Sequence[Tensor])


@overload
def reduce_scatter(
    flat: Tensor,
    group: Group,
    *,
    op: str = ...,
    out: Tensor | None = ...,
    pre_factor: float | None = ...,
    post_factor: float | None = ...,
    label: str = ...,
    async_op: Literal[False] = ...,
) -> Tensor: ...
@overload
def reduce_scatter(
    flat: Tensor,
    group: Group,
    *,
    op: str = ...,
    out: Tensor | None = ...,
    pre_factor: float | None = ...,
    post_factor: float | None = ...,
    label: str = ...,
    async_op: Literal[True],
) -> Work: ...
@overload
def reduce_scatter(
    flat: Tensor,
    group: Group,
    *,
    op: str = ...,
    out: Tensor | None = ...,
    pre_factor: float | None = ...,
    post_factor: float | None = ...,
    label: str = ...,
    async_op: bool,
) -> Tensor | Work: ...
def reduce_scatter(
    flat: Tensor,
    group: Group,
    *,
    op: str = "mean",
    out: Tensor | None = None,
    pre_factor: float | None = None,
    post_factor: float | None = None,
    label: str = "",
    async_op: bool = False,
) -> Tensor | Work:
    """Reduce every rank's ``flat`` and keep this rank's slice: ``round(post * sum over ranks of (pre * slice))``.

    The sum is in rank order, in fp32 (fp64 for fp64), and rounded once to the dtype of ``flat``, which is also the
    dtype on the wire. Receive buffers never hold more than 2 n elements.

    Args:
        flat: (size * n,) 1-d contiguous; unchanged, and not to be changed before completion.
        op: "mean" (``post_factor`` defaults to 1 / size) or "sum" (to 1).
        out: (n,) contiguous, same dtype, takes the result; may be this rank's slice of ``flat``. Default: a new tensor.
        pre_factor: each rank's piece is multiplied by it before the sum.
        post_factor: the sum is multiplied by it before it is rounded.
        label: unit or module, for spans, the log and messages.
        async_op: return a :class:`Work`, whose result is ``out``.

    Returns:
        ``out``, (n,).
    """
    n = slice_numel(flat, group, "reduce_scatter")
    pre, post = factors(op, pre_factor, post_factor, group.size, flat.dtype, "reduce_scatter")
    if out is None:
        out = flat.new_empty(n)
    elif out.shape != (n,) or out.dtype != flat.dtype or not out.is_contiguous():
        raise ConfigError(
            f"reduce_scatter '{label}': out is {tuple(out.shape)} {out.dtype}; "
            f"it must be ({n},) {flat.dtype}, contiguous"
        )
    work = _reduce_scatter(flat, group, out, pre, post, label)
    if async_op:
        return in_background(work, group)
    work.wait()
    return out


def _reduce_scatter(flat: Tensor, group: Group, out: Tensor, pre: float | None, post: float | None, label: str) -> Work:
    n, size, rank = out.numel(), group.size, group.rank
    if size == 1:
        return local(group, "reduce_scatter", label, combine([flat], out, pre=pre, post=post))
    wire_nbytes = (size - 1) * n * flat.element_size()
    # cut so that the sum of one part runs beside the transfer of the next, and that what is received at a time, from
    # size - 1 peers each, is at most 2 n: all parts are under way at once with 3 ranks, fewer with more
    numel = max(1, min(n, PART_NBYTES // flat.element_size(), max(2 * n // (size - 1), PART_NUMEL_LEAST)))
    starts = range(0, max(n, 1), numel)
    call, check = begin(group, "reduce_scatter", label, flat, wire_nbytes=wire_nbytes, seqs=len(starts))
    if flat.is_cuda:
        return start_native(group, call, check, native.reduce_scatter(flat, group, out, pre, post))
    pool = Pool()
    in_place = out.data_ptr() == flat[rank * n :].data_ptr()
    parts = [
        Pieces(
            group,
            call._replace(seq=call.seq + i),
            [flat[r * n + at : min(r * n + at + numel, (r + 1) * n)] for r in range(size)],
            out[at : at + numel],
            pool,
            pre=pre,
            post=post,
            into_out=not in_place,
        )
        for i, at in enumerate(starts)
    ]
    for part in parts:
        part.send()
    window = 2 * n // ((size - 1) * numel)
    relays = window < len(parts) > 1  # the peers' sends of the later parts need this rank to come and receive them
    pipeline = Pipeline(parts, window)
    parts.clear()

    def finish(deadline: Deadline) -> Tensor:
        pipeline.finish(deadline)
        return out

    return start(group, call, check, finish, relays=relays)


@overload
def all_reduce(
    tensors: TensorsT,
    group: Group,
    *,
    op: str = ...,
    bucket_numel: int | None = ...,
    pre_factor: float | None = ...,
    post_factor: float | None = ...,
    label: str = ...,
    async_op: Literal[False] = ...,
) -> TensorsT: ...
@overload
def all_reduce(
    tensors: TensorsT,
    group: Group,
    *,
    op: str = ...,
    bucket_numel: int | None = ...,
    pre_factor: float | None = ...,
    post_factor: float | None = ...,
    label: str = ...,
    async_op: Literal[True],
) -> Work: ...
@overload
def all_reduce(
    tensors: TensorsT,
    group: Group,
    *,
    op: str = ...,
    bucket_numel: int | None = ...,
    pre_factor: float | None = ...,
    post_factor: float | None = ...,
    label: str = ...,
    async_op: bool,
) -> TensorsT | Work: ...
def all_reduce(
    tensors: TensorsT,
    group: Group,
    *,
    op: str = "mean",
    bucket_numel: int | None = None,
    pre_factor: float | None = None,
    post_factor: float | None = None,
    label: str = "",
    async_op: bool = False,
) -> TensorsT | Work:
    """Reduce tensors over the ranks, in place: each becomes ``round(post * sum over ranks of (pre * tensor))``.

    Args:
        tensors: a tensor, or several (of any shapes; those of one dtype share buckets).
        op: "mean" (``post_factor`` defaults to 1 / size), "sum", "max" or "min".
        bucket_numel: reduce in flat buckets of at most so many elements; by default of 16 MiB. The bits are the same.
        pre_factor: each rank's tensor is multiplied by it before the sum.
        post_factor: the sum is multiplied by it before it is rounded.
        label: unit or module, for spans, the log and messages.
        async_op: return a :class:`Work`; its result is the tensor, or None for several.

    Returns:
        ``tensors``.
    """
    several: list[Tensor] = [tensors] if isinstance(tensors, Tensor) else [*tensors]
    if bucket_numel is not None and bucket_numel < 1:
        raise ConfigError(f"all_reduce '{label}': bucket_numel is {bucket_numel}; it must be positive")
    work = _all_reduce(several, group, op, bucket_numel, pre_factor, post_factor, label)
    if async_op:
        return in_background(work, group)
    work.wait()
    return tensors


def _all_reduce(
    tensors: list[Tensor],
    group: Group,
    op: str,
    bucket_numel: int | None,
    pre_factor: float | None,
    post_factor: float | None,
    label: str,
) -> Work:
    result = tensors[0] if len(tensors) == 1 else None
    scale = {t.dtype: factors(op, pre_factor, post_factor, group.size, t.dtype, "all_reduce") for t in tensors}
    if group.size == 1 or not any(t.numel() for t in tensors):
        for tensor in tensors:
            combine([tensor], tensor, pre=scale[tensor.dtype][0], post=scale[tensor.dtype][1])
        return local(group, "all_reduce", label, result)

    packed = list(_pack(tensors, bucket_numel))
    call, check = begin(
        group,
        "all_reduce",
        label,
        tensors[0],
        nbytes=sum(t.nbytes for t in tensors),
        wire_nbytes=sum(_wire_nbytes(bucket, group) for bucket in packed),
        seqs=len(packed),
    )
    pool = Pool()
    parts: list[Part] = [
        _PackedBucket(group, call._replace(seq=call.seq + i), bucket, pool, op, *scale[bucket[0].dtype])
        for i, bucket in enumerate(packed)
    ]
    packed.clear()
    pipeline = Pipeline(parts, WINDOW)
    parts.clear()

    def finish(deadline: Deadline) -> Tensor | None:
        pipeline.finish(deadline)
        return result

    return start(group, call, check, finish, relays=True)


class _PackedBucket:
    """A bucket of tensors, flat only while it is under way. A lone contiguous tensor is reduced where it lies."""

    def __init__(
        self,
        group: Group,
        call: Call,
        tensors: list[Tensor],
        pool: Pool,
        op: str,
        pre: float | None,
        post: float | None,
    ) -> None:
        self._group = group
        self._call = call
        self._tensors = tensors
        self._pool = pool
        self._op = "sum" if op == "mean" else op
        self._pre, self._post = pre, post
        self._flat: Tensor | None = None
        self._part: Part | None = None

    def start(self) -> None:
        tensors = self._tensors
        in_place = len(tensors) == 1 and tensors[0].is_contiguous()
        flat = tensors[0].view(-1) if in_place else torch.cat([t.reshape(-1) for t in tensors])
        self._flat = None if in_place else flat
        small = flat.nbytes <= SMALL_NBYTES
        if flat.is_cuda:
            self._part = native.Bucket(self._group, flat, small=small, op=self._op, pre=self._pre, post=self._post)
        else:
            self._part = Bucket(
                self._group, self._call, flat, self._pool, small=small, op=self._op, pre=self._pre, post=self._post
            )
        self._part.start()

    def reduce(self, deadline: Deadline) -> None:
        if self._part is not None:
            self._part.reduce(deadline)

    def finish(self, deadline: Deadline) -> None:
        if self._part is not None:
            self._part.finish(deadline)
        if self._flat is not None:
            parts = self._flat.split_with_sizes([t.numel() for t in self._tensors])
            for tensor, part in zip(self._tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))
        self._flat = self._part = None
        self._tensors = []


def _pack(tensors: list[Tensor], bucket_numel: int | None) -> Iterator[list[Tensor]]:
    """Lists of tensors, each to be one bucket; a tensor above the limit is cut into views of itself."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        limit = bucket_numel or BUCKET_NBYTES // dtype.itemsize
        bucket: list[Tensor] = []
        room = limit
        for tensor in tensors:
            numel = tensor.numel()
            if tensor.dtype != dtype or numel == 0:
                continue
            if numel > limit and tensor.is_contiguous():
                flat = tensor.view(-1)
                yield from ([flat[at : at + limit]] for at in range(0, numel, limit))
                continue
            if bucket and numel > room:
                yield bucket
                bucket, room = [], limit
            bucket.append(tensor)
            room -= numel
        if bucket:
            yield bucket


def _wire_nbytes(bucket: list[Tensor], group: Group) -> int:
    numel, itemsize = sum(t.numel() for t in bucket), bucket[0].element_size()
    if numel * itemsize <= SMALL_NBYTES:
        return numel * itemsize * (group.size - 1)
    own = slices(torch.empty(numel, device="meta"), group.size)[group.rank].numel()
    return (numel - own + own * (group.size - 1)) * itemsize
