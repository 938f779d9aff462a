"""What the ranks of a save or a load have to know of each other: one small message, and files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence

from zs_comm import Group, RankDisagreement, exchange

MOST_WAIT_S = 25.0  # for a rank that does not make the call: it is a mistake in the program, to be told soon


def meet(group: Group, call: str, *, mine: str = "", error: BaseException | None = None, what: str = "") -> list[str]:
    """Every rank's word, in rank order, once all ranks make the same `call`, are well, and agree on `what`.

    Args:
        call: "save" or "load", for the messages.
        mine: this rank's word, up to 60 characters.
        error: what is wrong on this rank.
        what: what has to be equal on all ranks, in words that a person can read.

    Raises:
        Exception: `error`, where there is one.
        RankDisagreement: another rank failed, or came with another `what`.
        CommTimeout, PeerLost: a rank did not come within 25 s, or the group's own bound.
    """
    digest = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
    text = "" if error is None else f"{type(error).__name__}: {error}"
    word = json.dumps([digest, mine, text]).encode()
    with _bounded(group):
        try:
            words = [json.loads(one) for one in exchange(word, group, label=f"zs_ckpt.{call}")]
        except Exception as failed:
            if error is not None:
                raise error from failed
            raise
        if error is not None:
            raise error
        failures = [f"rank {group.members[rank]} failed with {one[2]}" for rank, one in enumerate(words) if one[2]]
        if failures:
            raise RankDisagreement(f"{call}: " + "; ".join(failures))
        if len({one[0] for one in words}) > 1:
            sides = exchange(what[:500].encode(), group, label=f"zs_ckpt.{call}.sides")
            lines = [f"  rank {rank}: {side.decode()}" for rank, side in zip(group.members, sides, strict=True)]
            raise RankDisagreement(f"{call}: the ranks came with different arguments:\n" + "\n".join(lines))
    return [one[1] for one in words]


def failures_of(words: Sequence[tuple[int, str]], call: str) -> RankDisagreement:
    """The error of ranks that are well, where others are not."""
    return RankDisagreement(f"{call}: " + "; ".join(f"rank {rank} failed with {text}" for rank, text in words))


@contextlib.contextmanager
def _bounded(group: Group) -> Iterator[None]:
    before = group.timeout_s
    group.timeout_s = min(before, MOST_WAIT_S)
    try:
        yield
    finally:
        group.timeout_s = before
