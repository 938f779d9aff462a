"""What a checkpoint needs of an object whose state is spread over ranks: the `Shardable` Protocol.

    save:  for piece in state.pieces(): write it          objects(): what is not a tensor
    load:  for piece in state.places(saved, objects): fill it, then finish(objects)

Pieces are read and filled in place, never gathered. Values that are not in memory, as they are too many for it, are
moved a range at a time: a `LazyPiece` has a `Source` in the place of `data`. A plain module or optimizer needs none of
this: `zs_ckpt` knows how to save those. An object says that it is shardable by a method `__zs_shardable__()` that
returns one of these.

Three more members are used where they are there: `rank_objects()`, JSON values of this rank alone (a random state);
`take_rank_objects(all)`, before `finish`, with those of every rank that saved, in order; and `begin()`, when all is
planned and the first value is about to be filled in: from there to `finish` the state is of two minds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .boxes import Box

if TYPE_CHECKING:
    from typing_extensions import TypeIs

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


class Source(Protocol):
    """The values of a piece that are not in memory: elements of its box, counted in row-major order from 0.

    Called in the thread that saves or loads, in ascending ranges that leave nothing out, for one piece after the other:
    places in the order in which they were given, pieces in the order of the file (those with the largest items first,
    otherwise as they were given). An error is raised by the save or the load, on every rank.
    """

    def load(self, start: int, into: Tensor) -> None:
        """Fill `into`, (n,), in host memory and of the spec's dtype, with the elements from `start` on.

        Used by saves. The values are the same from the first `load` of a save to its end. `into` is the caller's again
        when this returns.
        """

    def store(self, start: int, values: Tensor) -> None:
        """Take `values`, (n,), in host memory and of the spec's dtype, as the elements from `start` on.

        Used by loads. `values` is the caller's again when this returns.
        """


@dataclass(frozen=True)
class LazyPiece:
    """A piece whose values `source` moves; the other members are as in `Piece`.

    What has a member `source` is taken for one, and its `data`, if any, is not looked at. Only as much of it is in
    memory as is being moved: an asynchronous save writes it before it returns.
    """

    spec: TensorSpec
    box: Box
    source: Source
    replica: int = 0
    replicas: int = 1
    scope: str = ""


def is_lazy(piece: Piece | LazyPiece) -> TypeIs[LazyPiece]:
    return getattr(piece, "source", None) is not None


@runtime_checkable
class Shardable(Protocol):
    """Sharded state, given and taken piece by piece."""

    PROTOCOL: int  # version of this contract; checked before use

    def pieces(self) -> Iterator[Piece | LazyPiece]:
        """Everything this rank holds, in the same order of names on every rank. No collective."""

    def objects(self) -> Mapping[str, Any]:
        """State that is no tensor: JSON values (and tuples, bytes, 64-bit integers, inf and nan, which are kept)."""

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece | LazyPiece]:
        """Where the values of the checkpoint go on this rank: `data` is filled in place, a `source` gets them.

        Makes state that does not exist yet. `saved`: every tensor of the checkpoint under this object's prefix, by name
        without the prefix; `objects`: what `objects` gave. Raises `ConfigError` listing what is missing, unexpected or
        of another shape, before anything is changed. dtypes may differ: values are cast.
        """

    def finish(self, objects: Mapping[str, Any]) -> None:
        """All places are filled: spread the values (masters to model, counters). May be collective."""
