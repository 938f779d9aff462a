"""From a model and a DeepSpeed configuration to an engine. What one rank finds wrong is an error on all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import zs_zero
from torch import nn
from zs_comm import ConfigError, Group, Mesh, agreed, as_group, discover, init_distributed, same_everywhere
from zs_zero.loop_report import state_text
from zs_zero.pacing import Pacing
from zs_zero.sharding import closed_on_error

from zs_engine.engine import Engine

_log = logging.getLogger("zs_engine")
Config = Mapping[str, Any] | str | os.PathLike[str]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    *,
    mesh: Any = None,
    mpu: None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Config | None = None,
    config_params: Config | None = None,
    unknown_keys: str = "error",
) -> tuple[Engine, Any, Any, Any]:
    """Shard `model` as the configuration says; returns (engine, optimizer, dataloader, lr_scheduler). Collective.

    Args:
        args: may carry the configuration as `args.deepspeed_config` or `args.zs_config` (an object or a mapping).
        model: on any device (it is moved), on the meta device, or built under `zs_zero.Init`.
        optimizer: over the model's parameters, or a callable that makes one of `model_parameters` (default: all);
            else the configuration's. With none of them the engine only evaluates.
        training_data: a dataset; the third result is then a loader of this rank's micro-batches.
        lr_scheduler: built on the optimizer, or a callable that makes one of it; else the configuration's, if any.
        mesh: the data-parallel ranks: a `zs_comm.Mesh` or `Group`, a `DeviceMesh` or `ProcessGroup`; default: all.
        mpu: refused; pass `mesh`.
        dist_init_required: False: the process group is the caller's affair.
        config: a mapping, the path of a JSON file (comments and trailing commas allowed), or the URL-safe base64 of
            its text; `config_params` as well.
        unknown_keys: "error"; or "warn": keys that nobody knows are named in the log and ignored.

    Raises:
        ConfigError: with every problem of the configuration, or a combination that does not work.
        RankDisagreement: ranks bring different configurations or models.
    """
    from zs_engine.config import load  # pydantic costs 0.2 s: not at import

    world = as_group(None, "world") if dist_init_required is False else init_distributed()
    mesh = world if mesh is None else mesh
    flat = getattr(mesh, "ndim", 1) == 1  # a DeviceMesh of two dimensions, replicate and shard, holds all ranks
    group: Group = mesh.group("dp") if isinstance(mesh, Mesh) else as_group(mesh) if flat else world
    _speak(group.rank)
    with agreed(group, "configuration"):
        if mpu is not None:
            raise ConfigError("mpu is not supported: pass the data-parallel ranks as initialize(mesh=...)")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model should be a torch.nn.Module (got {type(model).__name__})")
        settings, sizes, data = load(_only(config, config_params, args), world=group.size, unknown_keys=unknown_keys)
        settings.optimizer.prepare(model)
        client = _optimizer(settings.optimizer, optimizer, model, model_parameters)
        make_schedule = _schedule(settings.scheduler, lr_scheduler, client)
        Pacing(settings.pacers(), model)  # the engine's own comes when it is too late to say no
    same_everywhere(json.dumps(data, sort_keys=True, default=repr), group, what="the configuration")
    place, device = discover(), torch.device("cpu")
    if torch.cuda.is_available():
        index = torch.cuda.current_device() if place.source == "none" else place.local_rank % torch.cuda.device_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    zero = zs_zero.shard(
        model,
        client,
        mesh=mesh,
        device=device,
        prescale=settings.prescale_gradients,
        sparse_gradients=settings.sparse_gradients,
        predivide_factor=settings.gradient_predivide_factor,
        allow_untested_optimizer=settings.zero_allow_untested_optimizer,
        **settings.zero_optimization.options(),
        **settings.bfloat16.options() | settings.scaling_options(device.type),
        **settings.types_options() | settings.tiers_options(),
    )
    where: dict[str, Any] = {"world": world, "local_rank": place.local_rank, "device": device}
    with closed_on_error(zero), agreed(group, "schedule and data"):
        engine = Engine(model, zero, settings=settings, sizes=sizes, config=data, trains=client is not None, **where)
        engine.lr_scheduler = make_schedule(engine.optimizer)
        if training_data is not None:
            engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    if settings.dump_state:
        _log.info("%s", state_text(engine))
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _only(config: Any, config_params: Any, args: Any) -> Any:
    names = ("deepspeed_config", "zs_config")
    inside = args if isinstance(args, Mapping) else {name: getattr(args, name, None) for name in names}
    given = {"config": config, "config_params": config_params, **{f"args.{name}": inside.get(name) for name in names}}
    found = [name for name, value in given.items() if value is not None]
    if len(found) != 1:
        what = f"{' and '.join(found)} are both given" if found else f"none is given: {', '.join(given)}"
        raise ConfigError(f"give the configuration once; {what}")
    return given[found[0]]


def _optimizer(section: Any, optimizer: Any, model: nn.Module, parameters: Iterable[Any] | None) -> Any:
    if optimizer is not None and section.type:
        _log.info("the optimizer given to initialize() is used, not the configuration's")
    make = section.ready("optimizer") if optimizer is None else optimizer
    if make is None or isinstance(make, torch.optim.Optimizer):
        return make
    if not callable(make):
        raise ConfigError(f"optimizer should be a torch optimizer or make one (got {type(optimizer).__name__})")
    made = make(list(model.parameters() if parameters is None else parameters))
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"optimizer should make a torch optimizer of the parameters (it returned {made!r})")
    return made


def _schedule(section: Any, schedule: Any, client: Any) -> Callable[[Any], Any]:
    if schedule is None and section.type and client is None:
        _log.warning("scheduler.type: %s is left out, because there is no optimizer to schedule", section.type)
    elif schedule is None:
        return section.ready("scheduler") or (lambda _: None)
    elif not hasattr(schedule, "step") or isinstance(schedule, type):
        if client is None or not callable(schedule):
            what = f"got {type(schedule).__name__}" if client is not None else "there is no optimizer to make one of"
            raise ConfigError(f"lr_scheduler should be a learning-rate schedule or make one of the optimizer ({what})")
        return schedule  # type: ignore[no-any-return]
    return lambda _: schedule


def _speak(rank: int) -> None:
    """Rank 0's lines reach the terminal where nobody configured logging."""
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[zs] %(message)s"))
        _log.addHandler(handler)
