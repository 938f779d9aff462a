"""What to say when a collective fails: which ranks arrived, which are gone, and what each called last.

A rank that gives up leaves its last calls in the rendezvous store and waits briefly for those of the others. The store
is the one thing that still works then, since gloo closes every connection of a group when one wait runs out.

    rank 0            rank 1            rank 2
    waits for 2       waits for 2       (elsewhere)
    times out                                          gloo closes 0's connections
    leaves word       sees 0 closed
    reads 1's word    leaves word, reads 0's           "0 timed out waiting for 2": rank 1 says so too
    CommTimeout       CommTimeout       (arrives) sees all closed, reads both: CommTimeout
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .errors import CommError, CommFacts, CommTimeout, PeerLost
from .group import Call, Group

WORD_WAIT_S = 2.0  # for a peer that may be about to give up too
CLOSED_WAIT_S = 0.5  # for a peer whose connection is closed: it leaves word at once, or it is dead
_POISON_TAG = 0x7FFFFFFF


class Outcome(NamedTuple):
    """How a collective stood when it failed. All ranks here are positions in the group."""

    timed_out: bool
    seconds: float
    arrived: set[int]
    missing: set[int]
    closed: set[int]


def failure(group: Group, call: Call, outcome: Outcome) -> CommError:
    """The error for a collective that did not finish; it is marked on the group too. Takes two seconds at most."""
    mine = {
        "kind": "timeout" if outcome.timed_out else "closed",
        "call": str(call),
        "what": [call.op, call.label, call.nbytes],
        "seconds": outcome.seconds,
        "missing": _ranks(group, outcome.missing),
        "closed": _ranks(group, outcome.closed),
        "calls": [str(one) for one in group.hub.last_calls],
    }
    leave_word(group, "last", mine)
    close_connections(group)
    patience = {group.members[p]: CLOSED_WAIT_S if p in outcome.closed else WORD_WAIT_S for p in group.peers}
    words = read_words(group, "last", patience)
    words[group.members[group.rank]] = mine

    closed = {rank for word in words.values() for rank in word["closed"]}
    lost = tuple(sorted(closed - words.keys()))
    gave_up = {rank: word for rank, word in words.items() if word["kind"] == "timeout"}
    facts = CommFacts(
        op=call.op,
        label=call.label,
        axis=call.axis,
        nbytes=call.nbytes,
        members=group.members,
        seconds=outcome.seconds,
        arrived=tuple(_ranks(group, outcome.arrived)),
        missing=tuple(_ranks(group, outcome.missing)),
        lost=lost,
        last_calls={rank: tuple(word["calls"]) for rank, word in sorted(words.items())},
    )
    kind: type[CommError] = PeerLost if lost or not gave_up else CommTimeout
    if lost:
        what = f"the connection to {_name(lost)} closed after {outcome.seconds:.1f} s (did the process end?)"
    elif outcome.timed_out:
        what = f"not finished in {outcome.seconds:.1f} s"
    elif gave_up:
        rank, word = min(gave_up.items())
        what = (
            f"rank {rank} gave up after {word['seconds']:.1f} s in {word['call']}, waiting for {_name(word['missing'])}"
        )
    else:
        what = f"the connection to {_name(sorted(closed))} closed after {outcome.seconds:.1f} s"
    if not lost and any(word["what"] != mine["what"] for word in words.values()):
        what += " (the ranks made different calls)"
    error = kind(f"{describe(group, call)}: {what}; {_who(facts)}\n{last_calls(group, facts.last_calls)}", facts)
    group.failed = error
    return error


def describe(group: Group, call: Call) -> str:
    """``all_gather 'blocks.3' of 1,024 bytes on axis dp (members 0, 1)``."""
    label = f" '{call.label}'" if call.label else ""
    members = ", ".join(map(str, group.members))
    return f"{call.op}{label} of {call.nbytes:,} bytes on axis {call.axis} (members {members})"


def last_calls(group: Group, calls: dict[int, tuple[str, ...]]) -> str:
    """The last calls of every member as lines of text; a member that left none is named too."""
    lines = ["last calls:"]
    lines += [f"  rank {rank}: " + ("; ".join(calls[rank]) if rank in calls else "no word") for rank in group.members]
    return "\n".join(lines)


def leave_word(group: Group, topic: str, word: dict[str, Any]) -> None:
    """Put this rank's word about ``topic`` into the store; a store that is gone is no further error."""
    with contextlib.suppress(Exception):
        _store().set(_key(topic, group.members[group.rank]), json.dumps(word))


def read_words(group: Group, topic: str, patience: dict[int, float]) -> dict[int, dict[str, Any]]:
    """The words of other (global) ranks about ``topic``, each waited for ``patience[rank]`` seconds at most."""
    start = time.monotonic()
    words: dict[int, dict[str, Any]] = {}
    pending = dict(patience)
    with contextlib.suppress(Exception):
        store = _store()
        while pending:
            for rank in tuple(pending):
                if store.check([_key(topic, rank)]):
                    words[rank] = json.loads(store.get(_key(topic, rank)))
                    del pending[rank]
                elif time.monotonic() - start > pending[rank]:
                    del pending[rank]
            if pending:
                time.sleep(0.01)
    return words


def close_connections(group: Group) -> None:
    """Close the group's connections, so that peers that wait for this rank learn of the failure now.

    gloo has no call for it, but closes all of a group's connections when a wait runs out: so let one run out.
    """
    with contextlib.suppress(Exception):
        group.cpu_backend.recv([torch.empty(1)], group.peers[0], _POISON_TAG).wait(timedelta(milliseconds=1))


def _store() -> Any:
    find: Callable[[], Any] = dist.distributed_c10d._get_default_store
    return find()


def _key(topic: str, rank: int) -> str:
    return f"zs_comm/{topic}/{rank}"


def _ranks(group: Group, positions: Iterable[int]) -> list[int]:
    return [group.members[position] for position in sorted(positions)]


def _name(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    if not names:
        return "a peer"
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)


def _who(facts: CommFacts) -> str:
    arrived = f"{_name(facts.arrived)} had arrived" if facts.arrived else "no other rank had arrived"
    waiting = [rank for rank in facts.missing if rank not in facts.lost]
    return f"{arrived}, {_name(waiting)} had not" if waiting else arrived
