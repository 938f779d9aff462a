"""Where a training loop stands, in a checkpoint: counters, and what is paced by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zs_comm import ConfigError

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class Counters:
    """An engine's counters and pacing as a Shardable; `micro_steps` is counted anew for other sizes and worlds."""

    PROTOCOL = 1

    def __init__(self, loop: Any, *, window: bool = True) -> None:
        self._loop, self._window = loop, window  # window: gradients of an open one are loaded too

    def pieces(self) -> Iterator[Any]:
        return iter(())

    def objects(self) -> Mapping[str, Any]:
        loop = self._loop
        counters = {name: getattr(loop, name) for name in (*_COUNTERS, "micro_steps")}
        sizes = {"batch": dict(loop.get_batch_info()._asdict()), "world": loop.dp_world_size}
        window = {"windows": loop.counts_windows, "window_steps": loop.window_steps, "backwards": loop._backwards}
        return counters | sizes | window | {"pacing": loop.pacing.state_dict()}

    def places(self, saved: Any, objects: Mapping[str, Any]) -> Iterator[Any]:
        self._steps(objects)
        return iter(())

    def finish(self, objects: Mapping[str, Any]) -> None:
        for name in _COUNTERS:
            setattr(self._loop, name, objects[name])
        self._loop.micro_steps, inside = self._steps(objects)
        self._loop._window_began = self._loop.micro_steps - inside
        self._loop._backwards = objects.get("backwards", 0) if self._window else 0
        self._loop.pacing.load_state_dict(objects.get("pacing", {}))

    def _steps(self, saved: Mapping[str, Any]) -> tuple[int, int]:
        """How many of this engine's micro-steps the saved ones were, and how many of those lie in the open window."""
        there, here, world = saved["batch"], self._loop.get_batch_info(), self._loop.dp_world_size
        inside = saved.get("window_steps", saved["micro_steps"] % there["steps"])
        closed = saved["micro_steps"] - inside
        if not (saved.get("windows", True) and self._loop.counts_windows):  # the caller says where they end
            return saved["micro_steps"], inside if self._window else 0
        samples, each = inside * there["micro"] * saved["world"], here.micro * world
        if inside and self._window and (samples % each or there["train"] != here.train):
            raise ConfigError(
                f"the checkpoint was taken inside a window, after {samples} of {there['train']} samples, and this "
                f"engine takes {here.train}, {each} at a time: load it with one train_batch_size and micro-batches "
                f"that divide, or without optimizer states"
            )
        inside = samples // each if self._window else 0
        return closed * here.steps // there["steps"] + inside, inside
