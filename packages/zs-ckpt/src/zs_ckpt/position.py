"""Where in its data a training stands, as part of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zs_comm import Group, as_group

from .shardable import PROTOCOL, Piece, TensorSpec

_log = logging.getLogger("zs_ckpt")


class DataPosition:
    """A Shardable of each rank's place in its data: `{"model": ..., "data": DataPosition(loader, drawn=batches)}`.

    A loader, or else its sampler, that has `state_dict` and `load_state_dict` is put back where it was, on as many
    ranks as saved; on another number of ranks too if its attribute `any_world` is true (it is given rank 0's state).
    Otherwise the log says how many batches the caller must skip.

    Args:
        loader: whatever batches come from; None where nothing is known of it.
        drawn: batches that each rank has drawn since the training began.
        group: the ranks that save; default: all.
    """

    PROTOCOL = PROTOCOL

    def __init__(self, loader: Any = None, *, drawn: int = 0, group: Group | None = None) -> None:
        self._source = next((one for one in (loader, getattr(loader, "sampler", None)) if _keeps_state(one)), None)
        self._drawn = drawn
        self._group = as_group(None, "world") if group is None else group
        self._ranks: Sequence[Mapping[str, Any]] = ()

    def pieces(self) -> Iterator[Piece]:
        return iter(())

    def objects(self) -> Mapping[str, Any]:
        return {"world": self._group.size, "drawn": self._drawn}

    def rank_objects(self) -> Mapping[str, Any]:
        return {} if self._source is None else {"state": self._source.state_dict()}

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        self._ranks = ()
        return iter(())

    def take_rank_objects(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """What each rank saved of its own, before `finish`."""
        self._ranks = ranks

    def finish(self, objects: Mapping[str, Any]) -> None:
        same = objects.get("world") == self._group.size
        own = self._group.rank if same else 0
        state = self._ranks[own].get("state") if own < len(self._ranks) else None
        if state is not None and self._source is not None and (same or getattr(self._source, "any_world", False)):
            self._source.load_state_dict(state)
        elif objects.get("drawn") and self._group.rank == 0:
            _log.warning(
                "the position of this data loader is not in the checkpoint: skip the %d batches that each of %s ranks "
                "had drawn",
                objects["drawn"], objects.get("world"),
            )  # fmt: skip


def _keeps_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
