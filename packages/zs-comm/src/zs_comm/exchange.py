"""Small messages of every rank to every rank: bytes, or nothing at all (a barrier)."""

from __future__ import annotations

import struct

import torch
import torch.distributed as dist
from torch import Tensor

from . import native
from .calls import begin, start
from .deadline import Deadline
from .group import Group
from .p2p import Messages, message_tag

FRAME_NBYTES = 256
_LENGTH = struct.Struct("<Q")
_ROOM = FRAME_NBYTES - _LENGTH.size


def exchange(payload: bytes, group: Group, *, label: str = "") -> list[bytes]:
    """Every rank's bytes, in rank order. One round for payloads of up to 248 bytes, two for longer ones."""
    if group.size == 1:
        return [bytes(payload)]
    tail = bytearray(payload[_ROOM:])
    wire_nbytes = (FRAME_NBYTES + len(tail)) * (group.size - 1)
    call, check = begin(group, "exchange", label, None, wire_nbytes=wire_nbytes)
    frame = bytearray((_LENGTH.pack(len(payload)) + payload[:_ROOM]).ljust(FRAME_NBYTES, b"\0"))
    if not group.has_cpu:
        return _device_exchange(frame, tail, group)

    frames = [frame if rank == group.rank else bytearray(FRAME_NBYTES) for rank in range(group.size)]
    tails = [tail if rank == group.rank else bytearray() for rank in range(group.size)]
    first = Messages(group, call)
    for peer in group.peers:
        first.recv(_tensor(frames[peer]), peer)
        first.send(_tensor(frame), peer)

    def finish(deadline: Deadline) -> None:
        first.wait(deadline)
        second = Messages(group, call, message_tag(call, phase=1))
        for peer in group.peers:
            tails[peer] = bytearray(_tail_nbytes(frames[peer]))
            if tails[peer]:
                second.recv(_tensor(tails[peer]), peer)
            if tail:
                second.send(_tensor(tail), peer)
        second.wait(deadline)

    start(group, call, check, finish).wait()
    return [_payload(one, rest) for one, rest in zip(frames, tails, strict=True)]


def barrier(group: Group, *, label: str = "") -> None:
    """Wait until every rank of the group is here; bounded like every wait."""
    if group.size == 1:
        return
    call, check = begin(group, "barrier", label, None, wire_nbytes=group.size - 1)
    if not group.has_cpu:
        dist.barrier(group.process_group, device_ids=[torch.cuda.current_device()])
        return
    messages = Messages(group, call)
    mine = torch.zeros(1, dtype=torch.uint8)
    theirs = torch.empty(group.size, 1, dtype=torch.uint8)
    for peer in group.peers:
        messages.recv(theirs[peer], peer)
        messages.send(mine, peer)
    start(group, call, check, messages.giving(theirs)).wait()


def _tensor(raw: bytearray) -> Tensor:
    """``raw`` as a tensor over the same memory."""
    return torch.frombuffer(raw, dtype=torch.uint8)


def _tail_nbytes(frame: bytes | bytearray) -> int:
    (nbytes,) = _LENGTH.unpack(frame[: _LENGTH.size])
    return max(int(nbytes) - _ROOM, 0)


def _payload(frame: bytes | bytearray, tail: bytes | bytearray) -> bytes:
    (nbytes,) = _LENGTH.unpack(frame[: _LENGTH.size])
    return bytes(frame[_LENGTH.size : _LENGTH.size + nbytes]) + bytes(tail)


def _device_exchange(frame: bytearray, tail: bytearray, group: Group) -> list[bytes]:
    """The same over a group that carries device tensors only; tails are padded to the longest."""
    frames = _gather(frame, group)
    rests = [_tail_nbytes(one) for one in frames]
    tails = _gather(tail.ljust(max(rests), b"\0"), group) if max(rests) else [b""] * group.size
    return [_payload(one, padded[:rest]) for one, padded, rest in zip(frames, tails, rests, strict=True)]


def _gather(raw: bytearray, group: Group) -> list[bytes]:
    work, rows = native.gather_rows(_tensor(raw).cuda(), group)
    work.wait()
    return [bytes(row) for row in rows.tolist()]
