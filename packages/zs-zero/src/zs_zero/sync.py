"""Replicas start equal: rank 0's parameters and buffers everywhere, and one model on all ranks."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from zs_comm import Group, broadcast, exchange, same_everywhere

log = logging.getLogger("zs_zero")


def check_same_model(description: str, group: Group) -> None:
    """Raises RankDisagreement, with every rank's lines that differ, unless all ranks describe the same model."""
    same_everywhere(description, group, what="the model given to zs_zero.shard (names, shapes, dtypes, options)")


def send_from_first(tensors: Mapping[str, Tensor], group: Group) -> list[str]:
    """Makes `tensors` rank 0's on every rank, sending only those that differ; returns their names."""
    if group.size == 1 or not tensors:
        return []
    mine = b"".join(checksum(tensor).to_bytes(8, "little") for tensor in tensors.values())
    sums = exchange(mine, group, label="parameter checksums")
    differing = []
    for index, (name, tensor) in enumerate(tensors.items()):
        if len({part[8 * index : 8 * index + 8] for part in sums}) > 1:
            values = tensor.detach().contiguous()
            broadcast(values.view(-1), group, src=0, label=name)
            tensor.detach().copy_(values)
            differing.append(name)
    return differing


def report_differing(names: Iterable[str], group: Group) -> None:
    names = list(names)
    if names and group.rank == 0:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.warning("%d tensors differed between ranks and were replaced by rank 0's: %s", len(names), shown)


def checksum(tensor: Tensor) -> int:
    """64 bits over a tensor's bytes that change when values change or move. Not cryptographic."""
    data = tensor.detach().contiguous().view(-1)
    if not data.numel():
        return 0
    raw = data.view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words, rest = raw[:whole].view(torch.int64), raw[whole:].to(torch.int64)
    rows = words[: words.numel() // 1024 * 1024].view(-1, 1024)
    total = 0
    for sums in (rows.sum(0), rows.sum(1), words[rows.numel() :], rest):  # along both dims: a move changes one of them
        weights = 2 * torch.arange(sums.numel(), device=sums.device) + 1
        total = total * 1_000_003 + int((sums * weights).sum())
    return total % 2**64
