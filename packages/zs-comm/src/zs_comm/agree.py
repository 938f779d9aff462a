"""Agreement between ranks: what one rank finds out is an error on all of them, and nobody waits in vain."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

from .errors import CommError, RankDisagreement
from .exchange import exchange
from .group import Group

_SHOWN = 400  # characters of a value in a message


def agree(group: Group, error: BaseException | None = None, *, what: str = "") -> None:
    """Find out whether every rank is well; every rank of the group calls it.

    A rank that passes an error raises it again. The others raise :class:`RankDisagreement` with that rank, the error's
    type and its text. An error of a collective is raised at once, because the group is of no use after it.

    Args:
        error: what went wrong on this rank, or None.
        what: what was being done ("building the model"), for the message.
    """
    if group.size == 1 or isinstance(error, CommError):
        if error is not None:
            raise error
        return
    mine = b"" if error is None else f"{type(error).__name__}: {error}".encode()
    try:
        words = exchange(mine, group, label=what)
    except CommError as failed:
        if error is not None:
            raise error from failed
        raise
    if error is not None:
        raise error
    failures = [(group.members[rank], word.decode()) for rank, word in enumerate(words) if word]
    if failures:
        doing = f"{what}: " if what else ""
        raise RankDisagreement(doing + "; ".join(f"rank {rank} failed with {text}" for rank, text in failures))


@contextlib.contextmanager
def agreed(group: Group, what: str) -> Iterator[None]:
    """``with agreed(group, "reading the index"): ...``: the body's exception on one rank is an error on all."""
    try:
        yield
    except Exception as error:
        agree(group, error, what=what)
    else:
        agree(group, what=what)


def same_everywhere(value: bytes | str, group: Group, *, what: str) -> None:
    """Check that all ranks came with the same value.

    Raises:
        RankDisagreement: they did not; every rank's value is in the message (long ones cut short).
    """
    if group.size == 1:
        return
    raw = value.encode() if isinstance(value, str) else bytes(value)
    digests = exchange(hashlib.blake2b(raw, digest_size=32).digest(), group, label=what)
    if len(set(digests)) == 1:
        return
    lines = [f"{what} differs between the ranks of axis {group.axis}:"]
    for member, other in zip(group.members, exchange(_excerpt(raw), group, label=what), strict=True):
        lines.append(f"  rank {member}: {other.decode()}")
    raise RankDisagreement("\n".join(lines))


def _excerpt(raw: bytes) -> bytes:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw[:_SHOWN].hex()
    return (text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)").encode()
