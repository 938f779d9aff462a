"""The configuration: a typed field for each key that does something, a data file for the rest of DeepSpeed's language.

Nothing is silently ignored: :func:`examine` finds every problem at once, :func:`load` raises them as one ConfigError.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from zs_ckpt.config import CheckpointConfig
from zs_comm import ConfigError, keys
from zs_comm.config import Problem, config_error, dotted
from zs_comm.jsonfile import KeyPath, Source, read_config
from zs_comm.keys import Note
from zs_comm.language import extended
from zs_zero.batch import BatchSizes
from zs_zero.config import Bf16Config, OptimizerConfig, ZeroConfig
from zs_zero.loop_config import LoopConfig
from zs_zero.offload_config import TiersConfig
from zs_zero.precision_config import PrecisionConfig
from zs_zero.requirements import requirements
from zs_zero.rules import contradictions
from zs_zero.schedule_config import SchedulerConfig
from zs_zero.schedules import first_step
from zs_zero.types_config import TypesConfig

_log = logging.getLogger("zs_engine")
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["fp32", "bf16", "fp16"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OWN = Note("harmless", "an offloaded optimizer is the one that was given: its own formula, on blocks")
_OLD_BOOL = Note("equivalent", "true is the old way to say stage 1, and false to say stage 0")
_NO_SP = Note("harmless", "there is no sequence parallelism in this configuration")


class EngineConfig(LoopConfig, PrecisionConfig, TiersConfig, TypesConfig):
    """The keys of a DeepSpeed configuration that do something."""

    train_batch_size: Count | None = Field(default=None, description="samples in an optimizer step, over all ranks")
    train_micro_batch_size_per_gpu: Count | None = Field(default=None, description="samples in one forward of one rank")
    gradient_accumulation_steps: Count | None = Field(default=None, description="forwards in an optimizer step")
    managed_gradient_accumulation: bool = Field(default=True, description="false: every step() updates")
    gradient_clipping: NonNegative = Field(default=0.0, description="largest global 2-norm; 0: no clipping")
    sparse_gradients: bool = Field(default=False, description="of embeddings' gradients, reduce touched rows only")
    prescale_gradients: bool = Field(default=False, description="divide before the sum over ranks instead of after it")
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = Field(default=1.0, description="part of it done before")
    seq_parallel_communication_data_type: Annotated[Dtype, _NO_SP] = "fp32"
    zero_allow_untested_optimizer: bool = Field(default=False, description="shard what may not be element-wise")
    zero_force_ds_cpu_optimizer: Annotated[bool, _OWN] = True
    dataloader_drop_last: bool = Field(default=False, description="drop the last batch where it is smaller")
    log_level: LogLevel | None = Field(default=None, description="of the logger `zs_engine`")
    disable_allgather: Annotated[bool, Note("harmless", "DeepSpeed reads and does not use it")] = False
    allgather_size: Annotated[int, Note("harmless", "whole units are gathered")] = 500_000_000
    vocabulary_size: Annotated[int | None, Note("harmless", "DeepSpeed only warns about it")] = None
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    zero_optimization: Annotated[ZeroConfig, _OLD_BOOL] = ZeroConfig()
    bfloat16: Bf16Config = Field(default=Bf16Config(), alias="bf16")
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="before")
    @classmethod
    def _old_forms(cls, data: Any) -> Any:
        old = data.get("zero_optimization") if isinstance(data, Mapping) else None
        return {**data, "zero_optimization": {"stage": int(old)}} if isinstance(old, bool) else data


@functools.cache
def language() -> type[EngineConfig]:
    """Those, and the rest of DeepSpeed's keys, whose features are not there."""
    return extended(EngineConfig, "zs_engine", "deepspeed_keys.json")


def examine(
    data: Mapping[str, Any], source: Source | None = None, *, world: int | None = None
) -> tuple[EngineConfig, BatchSizes | None, list[Problem]]:
    """Check parsed data. `world`: the data-parallel ranks; None leaves the batch sizes alone."""
    config, problems = keys.examine(language(), data, source)

    def report(path: KeyPath, text: str, *, kind: Any = "invalid") -> None:
        problems.append(Problem(path, text, source.where(path, key=kind == "unknown") if source else "", kind))

    if not isinstance(data, Mapping):
        return config, None, problems
    for path, text in contradictions(data):
        report(path, text)
    lists = [len(value) for value in config.scheduler.given.values() if isinstance(value, list)]
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(max([1, *lists]))]  # a value for each
    zero, untested = config.zero_optimization, config.zero_allow_untested_optimizer
    files = zero.optimizer_offload.device == "nvme"
    rule = functools.partial(requirements, stage=zero.stage, allow_untested=untested, files=files)
    for problem in config.optimizer.problems(lambda: [dict(groups[0])], rule):
        report(("optimizer", *problem.path), problem.text, kind=problem.kind)
    for problem in config.scheduler.problems(lambda: torch.optim.AdamW(list(map(dict, groups))), first_step):
        report(("scheduler", *problem.path), problem.text, kind=problem.kind)
    if world is None or any(problem.path and problem.path[0] in BATCH_KEYS for problem in problems):
        return config, None, problems
    train, micro, steps = (getattr(config, key) for key in BATCH_KEYS)
    if train is None and micro is None and "auto" in [data.get(key) for key in BATCH_KEYS]:
        micro = 1
    try:
        return config, BatchSizes.solve(train, micro, steps, world), problems
    except ConfigError as error:
        report(BATCH_KEYS[:1], str(error))
        return config, None, problems


def load(
    config: Mapping[str, Any] | str | os.PathLike[str], *, world: int = 1, unknown_keys: str = "error"
) -> tuple[EngineConfig, BatchSizes, dict[str, Any]]:
    """The checked configuration, its batch sizes for `world` data-parallel ranks, and the data as given.

    Raises ConfigError with every problem: path, and for a file its line and column.
    """
    if unknown_keys not in ("error", "warn"):
        raise ConfigError(f"unknown_keys should be 'error' or 'warn' (got {unknown_keys!r})")
    data, source = read_config(config)
    parsed, sizes, problems = keys.tolerant(functools.partial(examine, world=world), data, source, unknown_keys)
    fatal = keys.fatal(problems, unknown_keys)
    if sizes is None or fatal:
        raise config_error(fatal, source)
    if parsed.log_level:
        _log.setLevel(parsed.log_level.upper())
    for problem in problems:
        _log.warning("ignored: %s", problem)
    rows = keys.verdicts(language(), data, problems, source)
    for row in rows:
        if row.loud:
            _log.warning("%s: %s", dotted(row.path), row.text)
    if noted := [f"{dotted(row.path)} ({row.verdict})" for row in rows if row.verdict in ("equivalent", "harmless")]:
        _log.info("accepted without effect of its own (`zs lint` says why): %s", ", ".join(noted))
    if data.get("gradient_clipping") is None:
        _log.info("no gradient_clipping is given, so nothing is clipped; DeepSpeed 0.19 would clip at 1.0")
    if parsed.optimizer.adam_is_adamw:
        _log.info("optimizer 'Adam' is AdamW, as in DeepSpeed; adam_w_mode: false gives Adam with L2 decay")
    return parsed, sizes, dict(data)
