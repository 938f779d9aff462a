"""What a checkpoint needs of an object whose state is spread over ranks: the `Shardable` Protocol.

    save:  for piece in state.pieces(): write it          objects(): what is not a tensor
    load:  for piece in state.places(saved, objects): fill it, then finish(objects)

Pieces are read and filled in place, never gathered. A plain module or optimizer needs none of this: `zs_ckpt` knows
how to save those. An object says that it is shardable by a method `__zs_shardable__()` that returns one of these.

Three more members are used where they are there: `rank_objects()`, JSON values of this rank alone (a random state);
`take_rank_objects(all)`, before `finish`, with those of every rank that saved, in order; and `begin()`, when all is
planned and the first value is about to be filled in: from there to `finish` the state is of two minds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .boxes import Box

PROTOCOL = 1


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor as the checkpoint knows it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """A part of a named tensor that this rank holds.

    `data` has the box's elements in row-major order, contiguous (any shape of that many elements). `replica` of
    `replicas`: which of several ranks that hold the same box this is; one of them is chosen to write it, by a rule that
    every rank computes alike. `scope`: "" for what all ranks share, "rank" for what is this rank's own (a local buffer,
    an unreduced gradient): such a tensor is stored once for each rank, and read back by the same rank.
    """

    spec: TensorSpec
    box: Box
    data: Tensor
    replica: int = 0
    replicas: int = 1
    scope: str = ""


@runtime_checkable
class Shardable(Protocol):
    """Sharded state, given and taken piece by piece."""

    PROTOCOL: int  # version of this contract; checked before use

    def pieces(self) -> Iterator[Piece]:
        """Everything this rank holds, in the same order of names on every rank. No collective."""

    def objects(self) -> Mapping[str, Any]:
        """State that is no tensor: JSON values (and tuples, bytes, 64-bit integers, inf and nan, which are kept)."""

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        """Where the values of the checkpoint go on this rank: `data` is filled in place.

        Makes state that does not exist yet. `saved`: every tensor of the checkpoint under this object's prefix, by name
        without the prefix; `objects`: what `objects` gave. Raises `ConfigError` listing what is missing, unexpected or
        of another shape, before anything is changed. dtypes may differ: values are cast.
        """

    def finish(self, objects: Mapping[str, Any]) -> None:
        """All places are filled: spread the values (masters to model, counters). May be collective."""
