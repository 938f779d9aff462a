"""What the golden checkpoints hold, by formula: for `make.py` and for the test. Add to it only for a new version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from zs_ckpt.boxes import boxes_of_range, numel
from zs_ckpt.shardable import PROTOCOL, Piece, TensorSpec

WORLD, STEP, TAGS = 2, 42, ("one", "two")  # by one rank and by two


def counted(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> Tensor:
    """start, start + 1, ... in that shape and dtype."""
    size = 1
    for extent in shape:
        size *= extent
    return (torch.arange(size) + start).reshape(shape).to(dtype)


DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn",
    "float8_e5m2", "complex64", "complex128",
)  # fmt: skip


def loose() -> dict[str, Any]:
    """Held alike by all ranks: every dtype, odd shapes, odd names, every kind of value."""
    tensors = {dtype: counted(3, 5, dtype=getattr(torch, dtype), start=1) for dtype in DTYPES}
    shapes = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "one": torch.ones(1, 1, 1),
        "large": counted(60, 50),
    }
    return {"dtypes": tensors, "shapes": shapes, "name with ü and @0:1,2:3": counted(4), "values": values()}


def values() -> dict[str, Any]:
    return {
        "none": None, "true": True, "int": -3, "big": 2**80, "float": 0.1, "inf": float("inf"), "text": 'ü"\\\n',
        "bytes": b"\x00\xff", "tuple": (1, (2, [3])), "set": {1, 2}, "keys": {1: "a", (2, "b"): None},
        "complex": 1 - 2j, "__zs__": "a user's own", "size": torch.Size([2, 3]), "dtype": torch.bfloat16,
        "device": torch.device("cpu"), "empty": [{}, [], ()],
    }  # fmt: skip


def cut() -> dict[str, Tensor]:
    """Held in ranges of the flattened tensors, as a sharded optimizer does."""
    return {"a.weight": counted(7, 6, 5), "a.bias": counted(11, dtype=torch.bfloat16), "b": counted(1, 13, start=100)}


class Cut:
    """Rank `rank`'s range of each tensor of `cut`, and one tensor of its own."""

    PROTOCOL = PROTOCOL

    def __init__(self, rank: int, world: int, tensors: Mapping[str, Tensor], own: Tensor) -> None:
        self.rank, self.world, self.tensors, self.own = rank, world, tensors, own

    def pieces(self) -> Iterator[Piece]:
        for name, tensor in self.tensors.items():
            size = tensor.numel()
            start, stop = size * self.rank // self.world, size * (self.rank + 1) // self.world
            for box in boxes_of_range(tensor.shape, start, stop):
                count = numel(box)
                data = tensor.view(-1)[start : start + count]
                yield Piece(TensorSpec(name, tuple(tensor.shape), tensor.dtype), box, data)
                start += count
        yield Piece(TensorSpec("own", (3,), torch.int64), ((0, 3),), self.own, scope="rank")

    def objects(self) -> Mapping[str, Any]:
        return {"kind": "cut"}

    def rank_objects(self) -> Mapping[str, Any]:
        return {"mine": self.rank}

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        yield from self.pieces()

    def take_rank_objects(self, ranks: list[Mapping[str, Any]]) -> None:
        self.ranks = ranks

    def finish(self, objects: Mapping[str, Any]) -> None:
        self.kind = objects["kind"]


def own(rank: int) -> Tensor:
    return counted(3, dtype=torch.int64, start=10 * rank)
