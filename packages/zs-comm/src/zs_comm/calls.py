"""What the collectives share: numbering, recording and starting a call, and checking what was passed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import native
from .deadline import Deadline
from .errors import ConfigError
from .fingerprint import HEADER_NBYTES, post_fingerprint
from .group import Call, Group
from .work import Work

Check = (
    Callable[[Deadline], None] | None
)  # compares the fingerprints, given a deadline; None in a group that is not checked
Finish = Callable[[Deadline], Tensor | None]  # what is left of a collective, given a deadline


def begin(
    group: Group,
    op: str,
    label: str,
    tensor: Tensor | None,
    *,
    wire_nbytes: int,
    nbytes: int | None = None,
    seqs: int = 1,
) -> tuple[Call, Check]:
    """Number, record and log a collective, and send its fingerprint where the group is checked.

    Args:
        tensor: what is communicated; gives ``nbytes`` unless given, which must be equal on all ranks.
        wire_nbytes: what this rank sends.
        seqs: how many sequence numbers it takes.
    """
    if group.failed is not None:
        raise type(group.failed)(f"{op} '{label}': the group failed before: {group.failed}", group.failed.facts)
    if nbytes is None:
        nbytes = 0 if tensor is None else tensor.nbytes
    call = Call(op, label, nbytes, group.axis, group.next_seq(seqs))
    group.hub.last_calls.append(call)
    check = None
    if group.checked:
        wire_nbytes += HEADER_NBYTES * (group.size - 1)
        check = post_fingerprint(group, call, "" if tensor is None else str(tensor.dtype))
    group.observers.collective(op, group.axis, label, nbytes, wire_nbytes)
    return call, check


def start(
    group: Group,
    call: Call,
    check: Check,
    finish: Finish,
    *,
    poll: Callable[[], bool] | None = None,
    relays: bool = False,
) -> Work:
    """The Work of a collective whose messages are posted."""

    def checked(deadline: Deadline) -> Tensor | None:
        if check is not None:
            check(deadline)
        return finish(deadline)

    return Work(group, call, finish if check is None else checked, poll=poll, relays=relays)


def start_native(group: Group, call: Call, check: Check, started: native.Started) -> Work:
    """The Work of a device collective in flight."""
    return start(group, call, check, started, poll=started.poll)


def local(group: Group, op: str, label: str, result: Tensor | None) -> Work:
    """A Work that has completed: what a group of one gives."""
    return Work(group, Call(op, label, 0 if result is None else result.nbytes, group.axis, 0), None, result=result)


def in_background(work: Work, group: Group) -> Work:
    """``work``, kept alive by its group until it completed."""
    if not work.done:
        group.in_flight[id(work)] = work
    return work


def factors(
    op: str, pre: float | None, post: float | None, size: int, dtype: torch.dtype, name: str
) -> tuple[float | None, float | None]:
    """The factors of a reduction; those that change nothing are None."""
    if op not in ("mean", "sum", "max", "min"):
        raise ConfigError(f"{name}: op is {op!r}; it must be mean or sum" + (", max or min" * (name == "all_reduce")))
    if op in ("max", "min"):
        if name != "all_reduce" or pre is not None or post is not None:
            raise ConfigError(f"{name}: op {op!r} is for all_reduce, and takes no factors")
        return None, None
    if op == "mean" and post is None:
        post = 1.0 / size
    pre = None if pre == 1.0 else pre
    post = None if post == 1.0 else post
    if (pre is not None or post is not None) and not (dtype.is_floating_point or dtype.is_complex):
        raise ConfigError(f"{name}: {dtype} cannot be scaled; use op='sum'")
    return pre, post


def slice_numel(flat: Tensor, group: Group, op: str) -> int:
    """Elements of one rank's slice of a flat tensor."""
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ConfigError(
            f"{op}: a 1-d contiguous tensor is needed, not {tuple(flat.shape)} with strides {flat.stride()}"
        )
    n, rest = divmod(flat.numel(), group.size)
    if rest:
        raise ConfigError(f"{op}: {flat.numel()} elements do not divide by {group.size} ranks of axis {group.axis}")
    return n


def require_contiguous(tensor: Tensor, op: str) -> None:
    """Raise ConfigError unless ``tensor`` is contiguous."""
    if not tensor.is_contiguous():
        raise ConfigError(
            f"{op}: a contiguous tensor is needed, not {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def require_position(src: int, group: Group, op: str) -> None:
    """Raise ConfigError unless ``src`` is a position in the group."""
    if not 0 <= src < group.size:
        raise ConfigError(f"{op}: src is {src}; it must be a position in the group, 0 to {group.size - 1}")
