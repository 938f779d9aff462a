"""The collectives that move data and do no arithmetic.

At size 1 each is the identity, and nothing needs to be initialised.

CPU tensors travel point to point (``p2p``), so their bytes on the wire are the theory's; CUDA tensors by the device's
backend (``native``).
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import native
from .calls import (
    begin,
    in_background,
    local,
    require_contiguous,
    require_position,
    slice_numel,
    start,
    start_native,
)
from .deadline import Deadline
from .errors import ConfigError
from .group import Group
from .p2p import Messages
from .work import Work


@overload
def all_gather(
    flat: Tensor, group: Group, *, shard: Tensor | None = ..., label: str = ..., async_op: Literal[False] = ...
) -> Tensor: ...
@overload
def all_gather(
    flat: Tensor, group: Group, *, shard: Tensor | None = ..., label: str = ..., async_op: Literal[True]
) -> Work: ...
@overload
def all_gather(
    flat: Tensor, group: Group, *, shard: Tensor | None = ..., label: str = ..., async_op: bool
) -> Tensor | Work: ...
def all_gather(
    flat: Tensor, group: Group, *, shard: Tensor | None = None, label: str = "", async_op: bool = False
) -> Tensor | Work:
    """Gather every rank's shard into ``flat``, in place.

    Args:
        flat: (size * n,) 1-d contiguous. This rank's shard is ``flat[rank * n : (rank + 1) * n]``.
        shard: (n,), copied into its place first. By default it is there already.
        label: unit or module, for spans, the log and messages.
        async_op: return a :class:`Work`; ``flat`` must not be touched until it completed.

    Returns:
        ``flat``, every rank's shard in its place.
    """
    n = slice_numel(flat, group, "all_gather")
    own = flat[group.rank * n : (group.rank + 1) * n]
    if shard is not None:
        if shard.numel() != n:
            raise ConfigError(f"all_gather '{label}': the shard has {shard.numel()} elements, flat takes {n} per rank")
        if shard.data_ptr() != own.data_ptr() or shard.dtype != own.dtype:
            own.copy_(shard.reshape(-1))
    work = _all_gather(flat, own, group, label)
    if async_op:
        return in_background(work, group)
    work.wait()
    return flat


def _all_gather(flat: Tensor, own: Tensor, group: Group, label: str) -> Work:
    if group.size == 1:
        return local(group, "all_gather", label, flat)
    n = own.numel()
    call, check = begin(group, "all_gather", label, flat, wire_nbytes=own.nbytes * (group.size - 1))
    if flat.is_cuda:
        return start_native(group, call, check, native.all_gather(flat, own, group))
    messages = Messages(group, call)
    for peer in group.peers:
        messages.recv(flat[peer * n : (peer + 1) * n], peer)
        messages.send(own, peer)
    return start(group, call, check, messages.giving(flat))


@overload
def broadcast(
    tensor: Tensor, group: Group, *, src: int = ..., label: str = ..., async_op: Literal[False] = ...
) -> Tensor: ...
@overload
def broadcast(tensor: Tensor, group: Group, *, src: int = ..., label: str = ..., async_op: Literal[True]) -> Work: ...
@overload
def broadcast(tensor: Tensor, group: Group, *, src: int = ..., label: str = ..., async_op: bool) -> Tensor | Work: ...
def broadcast(tensor: Tensor, group: Group, *, src: int = 0, label: str = "", async_op: bool = False) -> Tensor | Work:
    """Overwrite ``tensor`` with that of the rank at position ``src`` of the group, in place.

    Args:
        tensor: any shape, contiguous; the same shape and dtype on all ranks.
        src: a position in the group, not a global rank.
        label: unit or module, for spans, the log and messages.
        async_op: return a :class:`Work`; ``tensor`` must not be touched until it completed.

    Returns:
        ``tensor``.
    """
    require_contiguous(tensor, "broadcast")
    require_position(src, group, "broadcast")
    work = _broadcast(tensor, group, src, label)
    if async_op:
        return in_background(work, group)
    work.wait()
    return tensor


def _broadcast(tensor: Tensor, group: Group, src: int, label: str) -> Work:
    if group.size == 1:
        return local(group, "broadcast", label, tensor)
    mine = tensor.nbytes * (group.size - 1) if group.rank == src else 0
    call, check = begin(group, "broadcast", label, tensor, wire_nbytes=mine)
    if tensor.is_cuda:
        return start_native(group, call, check, native.broadcast(tensor, group, src))
    messages = Messages(group, call)
    if group.rank == src:
        for peer in group.peers:
            messages.send(tensor, peer)
    else:
        messages.recv(tensor, src)
    return start(group, call, check, messages.giving(tensor))


def scatter(flat: Tensor | None, out: Tensor, group: Group, *, src: int = 0, label: str = "") -> Tensor:
    """The rank at position ``src`` sends slice r of its ``flat`` to rank r.

    Args:
        flat: (size * n,) on ``src``, contiguous; None on the others.
        out: (n,), this rank's slice; same dtype.
        src: a position in the group, not a global rank.
        label: unit or module, for spans, the log and messages.

    Returns:
        ``out``.
    """
    require_contiguous(out, "scatter")
    require_position(src, group, "scatter")
    n, size = out.numel(), group.size
    is_src = group.rank == src
    if is_src:
        if flat is None:
            raise ConfigError(f"scatter '{label}': the source rank must give the tensor to scatter")
        require_contiguous(flat, "scatter")
        if flat.numel() != n * size or flat.dtype != out.dtype:
            raise ConfigError(
                f"scatter '{label}': {flat.numel()} elements of {flat.dtype} != {size} x {n} of {out.dtype}"
            )
        flat = flat.view(-1)
    if size == 1 and flat is not None:
        return out.copy_(flat.view(out.shape))
    mine = out.nbytes * (size - 1) if is_src else 0
    call, check = begin(group, "scatter", label, out, wire_nbytes=mine, nbytes=out.nbytes * size)
    if out.is_cuda:
        if check is not None:
            check(Deadline(group.timeout_s))
        return native.scatter(flat if is_src else None, out, group, src)(Deadline(group.timeout_s))
    messages = Messages(group, call)
    if is_src and flat is not None:
        for peer in group.peers:
            messages.send(flat[peer * n : (peer + 1) * n], peer)
        out.copy_(flat[src * n : (src + 1) * n].view(out.shape))
    else:
        messages.recv(out, src)
    start(group, call, check, messages.giving(out)).wait()
    return out


@overload
def all_to_all(
    out: Tensor, inp: Tensor, group: Group, *, label: str = ..., async_op: Literal[False] = ...
) -> Tensor: ...
@overload
def all_to_all(out: Tensor, inp: Tensor, group: Group, *, label: str = ..., async_op: Literal[True]) -> Work: ...
@overload
def all_to_all(out: Tensor, inp: Tensor, group: Group, *, label: str = ..., async_op: bool) -> Tensor | Work: ...
def all_to_all(out: Tensor, inp: Tensor, group: Group, *, label: str = "", async_op: bool = False) -> Tensor | Work:
    """Send slice r of ``inp`` to rank r and put what rank r sends at slice r of ``out``.

    Args:
        out: as many elements as ``inp``, contiguous, same dtype; must not overlap it.
        inp: (size * m, ...), contiguous: equal slices along dim 0.
        label: unit or module, for spans, the log and messages.
        async_op: return a :class:`Work`; neither tensor must be touched until it completed.

    Returns:
        ``out``.
    """
    require_contiguous(out, "all_to_all")
    require_contiguous(inp, "all_to_all")
    if out.numel() != inp.numel() or out.dtype != inp.dtype or inp.dim() == 0 or inp.shape[0] % group.size:
        raise ConfigError(
            f"all_to_all '{label}': {tuple(inp.shape)} {inp.dtype} -> {tuple(out.shape)} {out.dtype} over {group.size} "
            "ranks; both need the same numel and dtype, and the ranks must divide the first dimension"
        )
    work = _all_to_all(out, inp, group, label)
    if async_op:
        return in_background(work, group)
    work.wait()
    return out


def _all_to_all(out: Tensor, inp: Tensor, group: Group, label: str) -> Work:
    if group.size == 1:
        return local(group, "all_to_all", label, out.copy_(inp.view(out.shape)))
    n = inp.numel() // group.size
    source, target = inp.view(-1), out.view(-1)
    call, check = begin(group, "all_to_all", label, inp, wire_nbytes=(group.size - 1) * n * inp.element_size())
    if inp.is_cuda:
        return start_native(group, call, check, native.all_to_all(out, target, source, group))
    messages = Messages(group, call)
    for peer in group.peers:
        messages.recv(target[peer * n : (peer + 1) * n], peer)
        messages.send(source[peer * n : (peer + 1) * n], peer)
    own = slice(group.rank * n, (group.rank + 1) * n)
    target[own].copy_(source[own])
    return start(group, call, check, messages.giving(out))
