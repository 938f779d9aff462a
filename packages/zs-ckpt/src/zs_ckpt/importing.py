"""A DeepSpeed checkpoint as a checkpoint of ours: the same names and objects that a save of the training would give.

model/<name>                 fp32 masters, frozen parameters, buffers
optimizer/<state>/<name>     the optimizer's states; hyper-parameters by group among the objects
lr_scheduler, engine         the scheduler's state and the counters, as objects
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from .deepspeed import DeepSpeedCheckpoint, open_deepspeed
from .partitions import Whole
from .saving import Saved, save
from .shardable import PROTOCOL, Piece, TensorSpec
from .staging import Progress


def import_deepspeed(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    source_tag: str | None = None,
    tag: str | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Read DeepSpeed's checkpoint under `source` and save it in the folder `path`. One process does it.

    The parts are written from the mapped files: memory does not grow with the checkpoint.

    Args:
        source_tag: None takes what DeepSpeed's `latest` names.
        tag: None takes DeepSpeed's.
        progress: called with the bytes read so far and the bytes in all.

    Raises:
        CheckpointIncomplete, CheckpointCorrupt, PickleRefused, ConfigError: as `open_deepspeed`.
        CheckpointBusy, OSError: as `save`.
    """
    found = open_deepspeed(source, tag=source_tag)
    return save(
        path,
        state_of(found),
        tag=found.folder.name if tag is None else tag,
        client_state=found.client_state,
        step=found.counters.get("global_steps"),
        progress=progress,
    )


def loss_scale_of(scaler: Any) -> dict[str, float]:
    """The state of DeepSpeed's `DynamicLossScaler` as ours; of any other scaler that there is nothing to go on with."""
    try:
        return {
            "value": float(scaler["cur_scale"]),
            "good_steps": int(scaler["cur_iter"]) - int(scaler["last_overflow_iter"]) - 1,
            "tolerated": int(scaler["cur_hysteresis"]),
            "stuck": 0,
        }
    except (KeyError, TypeError, ValueError):
        return {}


def state_of(found: DeepSpeedCheckpoint) -> dict[str, Any]:
    """`found` as what `save` takes."""
    optimizer = {f"{key}/{name}": value for key, named in found.states.items() for name, value in named.items()}
    kind = str(found.config.get("optimizer", {}).get("type", "")) or "of DeepSpeed"
    objects = {"world": 1, "class": kind, "numbers": {}, "param_groups": found.param_groups}
    objects["loss_scale"] = loss_scale_of(found.loss_scaler)
    state: dict[str, Any] = {
        "model": Wholes(found.model, {"world": 1, "tied": found.tied, "extra": {}}),
        "optimizer": Wholes(optimizer, objects),
    }
    if found.lr_scheduler is not None:
        kind = str(found.config.get("scheduler", {}).get("type", ""))
        state["lr_scheduler"] = Wholes({}, {"class": kind, "state": found.lr_scheduler})
    steps, batch = found.counters.get("global_steps", 0), _batch(found)
    drawn = steps * batch["steps"]  # DeepSpeed saves between windows and keeps no position in the data
    state["rng"] = Wholes({}, {"world": 0, "seed": 0, "step": steps})  # nor random streams: a load derives new ones
    state["data"] = Wholes({}, {"world": found.world, "drawn": drawn})
    counters = {name: found.counters.get(name, 0) for name in ("global_steps", "global_samples", "skipped_steps")}
    own = {"batch": batch, "world": found.world, "micro_steps": drawn}
    state["engine"] = Wholes({}, {**counters, **own, "deepspeed": {"version": found.version, "stage": found.stage}})
    return state


def _batch(found: DeepSpeedCheckpoint) -> dict[str, int]:
    """Samples of a step, of a micro-step, and micro-steps of a step, of which the configuration has two or all."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = [found.config.get(name) for name in names]
    train, micro, steps = (value if isinstance(value, int) and value > 0 else 0 for value in values)
    world = found.world
    micro = micro or max(1, train // (max(1, steps) * world))
    steps = steps or max(1, train // (micro * world))
    return {"train": train or micro * steps * world, "micro": micro, "steps": steps}


class Wholes:
    """Tensors in parts, and objects, to be saved: a Shardable that is not loaded into."""

    PROTOCOL = PROTOCOL

    def __init__(self, tensors: Mapping[str, Whole], objects: Mapping[str, Any]) -> None:
        self._tensors, self._objects = tensors, objects

    def pieces(self) -> Iterator[Piece]:
        for name, value in self._tensors.items():
            spec = TensorSpec(name, value.shape, value.dtype)
            for box, data in value.pieces():
                yield Piece(spec, box, data)

    def objects(self) -> Mapping[str, Any]:
        return self._objects

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        raise TypeError("what was read from another program's checkpoint is saved and not loaded into")

    def finish(self, objects: Mapping[str, Any]) -> None:
        raise TypeError("what was read from another program's checkpoint is saved and not loaded into")
