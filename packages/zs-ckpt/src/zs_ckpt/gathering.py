"""From a state to what this rank writes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zs_comm import ConfigError, Group

from .jsonvalues import NotJson, encode
from .names import check_name
from .plan import AnyPiece, parts_of
from .shardable import TensorSpec, is_lazy
from .shardfile import NOT_HERE, Part
from .state import full_name, shardables


@dataclass
class Content:
    """What this rank gives to a checkpoint, before anything is written."""

    parts: list[Part] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    own_objects: dict[str, Any] = field(default_factory=dict)
    client_state: Any = None
    step: int | None = None


def gather(state: Mapping[str, Any], group: Group, *, client_state: Any = None, step: int | None = None) -> Content:
    """What this rank saves of `state`: the parts that it writes, and the objects."""
    made = shardables(state, group)
    content = Content(step=step)
    if step is not None and (type(step) is not int or step < 0):
        raise ConfigError(f"step is {step!r}; it must be an integer that is not negative")
    pieces: list[tuple[str, AnyPiece]] = []
    for key, shardable in made.items():
        for piece in shardable.pieces():
            check_piece(piece)
            pieces.append((check_name(full_name(key, piece.spec.name)), piece))
        content.objects[key] = _encoded(dict(shardable.objects()), f"state[{key!r}]")
        own = getattr(shardable, "rank_objects", None)
        if own is not None:
            content.own_objects[key] = _encoded(dict(own()), f"state[{key!r}]")
    content.client_state = _encoded(client_state, "client_state")
    for name, piece, box, (start, stop) in parts_of(pieces, group.size):
        spec = TensorSpec(name, tuple(piece.spec.shape), piece.spec.dtype)
        rank = group.rank if piece.scope == "rank" else None
        if is_lazy(piece):
            content.parts.append(Part(spec, box, NOT_HERE, rank, piece.source, start))
            continue
        data = piece.data.detach().reshape(-1)
        if (start, stop) != (0, data.numel()):
            data = data[start:stop]
        content.parts.append(Part(spec, box, data, rank))
    return content


def check_piece(piece: AnyPiece) -> None:
    """Raise ConfigError where a Shardable gives what its contract excludes."""
    name = piece.spec.name
    if piece.scope not in ("", "rank"):
        raise ConfigError(f"tensor {name!r}: scope is {piece.scope!r}; it must be '' or 'rank'")
    if not 0 <= piece.replica < piece.replicas:
        raise ConfigError(f"tensor {name!r}: replica {piece.replica} of {piece.replicas}")
    if is_lazy(piece):
        if not callable(getattr(piece.source, "load", None)):
            raise ConfigError(f"tensor {name!r}: its source, a {type(piece.source).__name__}, has no load()")
    elif not piece.data.is_contiguous():
        raise ConfigError(f"tensor {name!r}: its data is not contiguous")


def _encoded(value: Any, what: str) -> Any:
    try:
        return encode(value, what)
    except NotJson as error:
        raise ConfigError(f"cannot be saved: {error}") from error
