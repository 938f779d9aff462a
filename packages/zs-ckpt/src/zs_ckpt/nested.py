"""A dictionary in a state that has modules, optimizers and the like: `{"actor": {"model": ..., "optimizer": ...}}`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from zs_comm import ConfigError

from .plan import AnyPiece
from .shardable import PROTOCOL, Shardable, TensorSpec
from .trees import Tree


def holds_state(value: Any) -> bool:
    """Whether a dictionary has anything in it, at any depth, that gives its own state."""
    if isinstance(value, Mapping):
        return any(holds_state(item) for item in value.values())
    return any(callable(getattr(value, name, None)) for name in ("__zs_shardable__", "state_dict", "pieces"))


class Nested:
    """The items of `value`, each a Shardable that `make` makes, under its key and a slash."""

    PROTOCOL = PROTOCOL

    def __init__(self, value: Mapping[str, Any], make: Callable[[str, Any], Shardable]) -> None:
        self._value = value
        self._parts = {key: make(key, item) for key, item in value.items()}

    def pieces(self) -> Iterator[AnyPiece]:
        for key, part in self._parts.items():
            for piece in part.pieces():
                yield _under(key, piece)

    def objects(self) -> Mapping[str, Any]:
        return {key: dict(part.objects()) for key, part in self._parts.items()}

    def rank_objects(self) -> Mapping[str, Any]:
        made = {key: getattr(part, "rank_objects", None) for key, part in self._parts.items()}
        return {key: dict(give()) for key, give in made.items() if give is not None}

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[AnyPiece]:
        missing = [key for key in self._parts if key not in objects]
        if missing:
            raise ConfigError(f"the checkpoint has no {missing} there; it has {sorted(objects)}")
        for key, part in self._parts.items():
            for piece in part.places(_Part(saved, key), objects[key]):
                yield _under(key, piece)

    def begin(self) -> None:
        """The places are about to be filled."""
        for part in self._parts.values():
            begin = getattr(part, "begin", None)
            if begin is not None:
                begin()

    def take_rank_objects(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """What each rank saved of its own, before `finish`."""
        for key, part in self._parts.items():
            take = getattr(part, "take_rank_objects", None)
            if take is not None:
                take([own.get(key, {}) for own in ranks])

    def finish(self, objects: Mapping[str, Any]) -> None:
        for key, part in self._parts.items():
            part.finish(objects[key])
            if isinstance(part, Tree) and isinstance(self._value, MutableMapping):
                for keys, leaf in objects[key]["leaves"]:
                    if not keys:  # a bare value, which only its dictionary can take
                        self._value[key] = leaf


class _Part(dict[str, TensorSpec]):
    """What was saved under a key, with what each rank saved of its own."""

    def __init__(self, saved: Mapping[str, TensorSpec], key: str) -> None:
        super().__init__(_specs(saved, key))
        self.ranks = tuple(_specs(own, key) for own in getattr(saved, "ranks", ()))
        self.world = len(self.ranks)


def _specs(saved: Mapping[str, TensorSpec], key: str) -> dict[str, TensorSpec]:
    found = {}
    for name, spec in saved.items():
        head, _, rest = name.partition("/")
        if head == key:
            found[rest] = replace(spec, name=rest)
    return found


def _under(key: str, piece: AnyPiece) -> AnyPiece:
    name = piece.spec.name
    return replace(piece, spec=replace(piece.spec, name=f"{key}/{name}" if name else key))
