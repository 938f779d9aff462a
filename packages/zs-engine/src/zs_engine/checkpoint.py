"""What of an engine is in a checkpoint: sharded model and optimizer, schedule, random streams, data, counters.

Everything here is a Shardable of another package, by key; the engine's own are its counters.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import zs_ckpt
import zs_zero
from zs_ckpt.exporting import write_sharded
from zs_ckpt.position import DataPosition
from zs_ckpt.rng import RandomState
from zs_comm import agreed
from zs_zero.checkpoint import model_state
from zs_zero.loop_state import Counters
from zs_zero.on_first import weights_on_first

if TYPE_CHECKING:
    from zs_engine.engine import Engine

_log = logging.getLogger("zs_engine")


def state_of(engine: Engine, *, optimizer: bool = True, scheduler: bool = True) -> dict[str, Any]:
    """What a checkpoint of `engine` has, by key."""
    group = engine.zero.group
    state: dict[str, Any] = {"model": model_state(engine.module)}
    if engine.optimizer is not None and optimizer:
        state["optimizer"] = engine.optimizer
    if hasattr(engine.lr_scheduler, "state_dict") and scheduler:
        state["lr_scheduler"] = engine.lr_scheduler
    state["rng"] = RandomState(step=engine.global_steps, group=group)
    state["data"] = DataPosition(engine.training_dataloader, drawn=engine.micro_steps, group=group)
    state["engine"] = Counters(engine, window=optimizer)
    return state


def save(
    engine: Engine, folder: Any, tag: str | None, client_state: Mapping[str, Any] | None, *, latest: bool,
    exclude_frozen: bool, asynchronous: bool,
) -> None:  # fmt: skip
    """See `Engine.save_checkpoint`."""
    path = Path(os.path.abspath(folder))
    if path not in engine.checkpointers:
        engine.checkpointers[path] = zs_ckpt.Checkpointer(path, group=engine.zero.group)
    state, step = state_of(engine), engine.global_steps
    state["model"].exclude_frozen = exclude_frozen
    engine.checkpointers[path].save(
        state, tag=tag or f"global_step{step}", step=step, client_state=dict(client_state or {}),
        asynchronous=asynchronous, latest=latest,
    )  # fmt: skip


def load(
    engine: Engine, folder: Any, tag: str | None, *, strict: bool, optimizer: bool, scheduler: bool, module_only: bool
) -> tuple[str | None, Any]:
    """See `Engine.load_checkpoint`."""
    group, state = engine.zero.group, state_of(engine, optimizer=optimizer, scheduler=scheduler)
    state["model"].strict = strict
    if module_only:
        state = {"model": state["model"]}
    if (saving := engine.checkpointers.get(Path(os.path.abspath(folder)))) is not None:
        with agreed(group, "the save in the background"):
            saving.wait()
    try:
        found = zs_ckpt.load(folder, state, tag=tag, group=group)
    except zs_ckpt.CheckpointIncomplete:
        if tag is None and not zs_ckpt.tags(folder):
            _log.warning("no checkpoint is in %s: nothing is loaded", folder)
            return None, None
        raise
    if not module_only and "optimizer" not in state:
        engine.zero.zero_grad()  # of a window that began before
    return str(found.path), {} if found.client_state is None else found.client_state


def save_16bit(engine: Engine, folder: Any, name: str, exclude_frozen: bool) -> None:
    """See `Engine.save_16bit_model`."""
    path, group = Path(folder, name), engine.zero.group
    unfinished = path.with_name(path.name + ".tmp")
    if path.suffix != ".safetensors":
        whole = module_state_dict(engine, exclude_frozen, rank0_only=True)
        with agreed(group, "save_16bit_model"):
            if group.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(whole, unfinished)
                os.replace(unfinished, path)
        return
    with agreed(group, "save_16bit_model"), weights_on_first(engine.module, exclude_frozen=exclude_frozen) as weights:
        if weights is not None:
            specs: dict[str, Any] = {**weights.specs}
            (written,) = write_sharded(unfinished, specs, weights.get, max_shard_size=sys.maxsize)
            os.replace(written, path)
            unfinished.rmdir()


def module_state_dict(engine: Engine, exclude_frozen: bool, *, rank0_only: bool = False) -> dict[str, Any]:
    """See `Engine.module_state_dict`."""
    weights = zs_zero.full_state_dict(engine.module, rank0_only=rank0_only)
    frozen = engine.zero.plan.frozen if exclude_frozen else ()
    return {name: value for name, value in weights.items() if name not in frozen}
