"""Fingerprints: what each rank is about to do, so that ranks on different paths are told apart at once.

While a group is ``checked`` a header of 64 bytes travels with each collective. It is compared when the collective is
waited for, before its data; data of different calls never pair up (see ``p2p.message_tag``), so it may be under way
already.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import torch

from .deadline import Deadline
from .errors import RankDisagreement
from .group import Call, Group
from .p2p import Messages, header_tag
from .postmortem import describe, last_calls, leave_word, read_words

HEADER_NBYTES = 64
_HEADER = struct.Struct("<QQII40s")  # sequence number, bytes, hash of the label, hash of the dtype, op


def post_fingerprint(group: Group, call: Call, dtype: str) -> Callable[[Deadline], None]:
    """Send this rank's header; returns the check, to be called with a deadline before the data is waited for.

    The check raises :class:`~zs_comm.RankDisagreement` on every member as soon as one differs.
    """
    header = _HEADER.pack(
        call.seq, call.nbytes, zlib.crc32(call.label.encode()), zlib.crc32(dtype.encode()), call.op.encode()[:40]
    )
    mine = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    theirs = torch.empty(group.size, HEADER_NBYTES, dtype=torch.uint8)
    messages = Messages(group, call, header_tag(call.seq))
    for peer in group.peers:
        messages.recv(theirs[peer], peer)
        messages.send(mine, peer)

    def check(deadline: Deadline) -> None:
        messages.wait(deadline)
        theirs[group.rank] = mine
        if not bool((theirs == mine).all()):
            raise _disagreement(group, call, dtype)

    return check


def _disagreement(group: Group, call: Call, dtype: str) -> RankDisagreement:
    name = getattr(group.process_group, "group_name", group.axis)
    topic = f"fingerprint/{name}/{call.seq}"
    mine = {"call": f"{call} {dtype}".rstrip(), "calls": [str(one) for one in group.hub.last_calls]}
    leave_word(group, topic, mine)
    words = read_words(group, topic, {group.members[peer]: 2.0 for peer in group.peers})
    words[group.members[group.rank]] = mine
    lines = [f"{describe(group, call)}: the ranks made different calls"]
    lines += [f"  rank {rank}: " + (words[rank]["call"] if rank in words else "no word") for rank in group.members]
    calls = {rank: tuple(word["calls"]) for rank, word in words.items()}
    return RankDisagreement("\n".join(lines) + "\n" + last_calls(group, calls))
