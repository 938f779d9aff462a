"""Sums of the ranks' pieces: in rank order, in fp32 (fp64 for fp64), rounded once.

The same order and the same accumulator on every path make results equal bit for bit, however the data was cut into
buckets. The work is done in chunks that stay in the cache, so scaling and rounding cost no second trip to memory, and
the fp32 accumulator of 16-bit data never has the size of the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_NUMEL = 1 << 16


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pieces of ``dtype`` are summed."""
    if dtype.is_floating_point and dtype not in (torch.float32, torch.float64):
        return torch.float32
    return dtype


def combine(
    pieces: Sequence[Tensor], out: Tensor, *, op: str = "sum", pre: float | None = None, post: float | None = None
) -> Tensor:
    """``out = round(post * (pre * pieces[0] + pre * pieces[1] + ...))``, or the largest or smallest of the pieces.

    Args:
        pieces: every rank's piece in rank order, each (n,), one dtype.
        out: (n,), same dtype. May be one of the pieces.
        op: "sum", "max" or "min".
    """
    dtype = out.dtype
    acc_dtype = accumulator(dtype)
    direct = len(pieces) <= 2 and pre is None and (acc_dtype == dtype or _rounds_once(dtype, op, post))
    if direct and post is None:  # one pass needs no chunks
        return _pair(pieces, out, op)
    numel = out.numel()
    chunk = CHUNK_NUMEL * max(1, torch.get_num_threads())
    scratch = None if direct else torch.empty(min(chunk, numel), dtype=acc_dtype, device=out.device)
    for start in range(0, numel, chunk):
        parts = [piece[start : start + chunk] for piece in pieces]
        target = out[start : start + chunk]
        if scratch is None:
            _pair(parts, target, op)
            if post is not None:
                target.mul_(post)
            continue
        acc = scratch[: target.numel()]
        _accumulate(parts, acc, op, pre, fresh=True)
        if post is not None:
            acc.mul_(post)
        target.copy_(acc)
    return out


def _rounds_once(dtype: torch.dtype, op: str, post: float | None) -> bool:
    """torch adds two bf16 numbers in fp32 and rounds once; halving after it is exact (denormals, below 1e-38, aside).

    Not so for fp16, whose sum may overflow where the mean does not.
    """
    return dtype == torch.bfloat16 and op == "sum" and (post is None or math.frexp(post)[0] == 0.5)


def _pair(pieces: Sequence[Tensor], out: Tensor, op: str) -> Tensor:
    if len(pieces) == 1:
        return out if out is pieces[0] else out.copy_(pieces[0])
    first, second = pieces
    if op == "sum":
        return torch.add(first, second, out=out)
    return torch.maximum(first, second, out=out) if op == "max" else torch.minimum(first, second, out=out)


def _accumulate(pieces: Sequence[Tensor], acc: Tensor, op: str, pre: float | None, *, fresh: bool) -> None:
    for piece in pieces:
        # pre is multiplied in by itself: add(alpha=) may or may not fuse, depending on the place in the vector
        value = piece if pre is None else piece.to(acc.dtype, copy=True).mul_(pre)
        if fresh:
            acc.copy_(value)
        elif op == "sum":
            acc.add_(value)
        elif op == "max":
            torch.maximum(acc, value.to(acc.dtype), out=acc)
        else:
            torch.minimum(acc, value.to(acc.dtype), out=acc)
        fresh = False
