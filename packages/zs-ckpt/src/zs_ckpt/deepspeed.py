"""Reads what DeepSpeed wrote: ZeRO stages 1 to 3 and universal checkpoints, on any number of data-parallel ranks.

DeepSpeed keeps the masters and the optimizer's states flat, a part of each on every rank:

    stages 1, 2   the group's parameters one after the other, cut into equal partitions wherever that happens to be
    stage 3       each parameter cut into equal parts, the last one padded; a rank has a part of each, in their order
    universal     a folder for each parameter, whole

Here each parameter is whole again, as views of the memory-mapped files: nothing is copied before it is used. Files are
read by `read_pickled`, which runs nothing of them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zs_comm import ConfigError, ZsError

from .errors import CheckpointCorrupt, CheckpointIncomplete
from .names import name_problem
from .partitions import Shapes, Whole, member, sharded, universal, whole
from .unpickler import Record, read_pickled

_RANK = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
_MOST_VALUES = 2_000_000
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size")
_OWN = frozenset(  # what DeepSpeed itself puts beside the caller's `client_state`
    "module buffer_names optimizer param_shapes frozen_param_shapes frozen_param_fragments shared_params lr_scheduler "
    "data_sampler random_ltd sparse_tensor_module_names ds_config ds_version checkpoint_parallel_dimensions "
    "universal_checkpoint_info num_experts ds_autoep_layers autoep_layers".split()
).union(_COUNTERS)


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """A DeepSpeed checkpoint, by parameters' names.

    Attributes:
        folder: the tag's folder.
        stage, world, version: ZeRO stage, data-parallel ranks, and the DeepSpeed that wrote it.
        model: fp32 masters of the trained parameters; frozen parameters and buffers in the dtype they were stored in.
        tied: other names of parameters, and the name each is stored under.
        states: the optimizer's states by key (`exp_avg`) and parameter; `step` is a scalar.
        param_groups: hyper-parameters of each group, `params` being names.
        counters: `global_steps`, `global_samples`, `skipped_steps`, `dp_world_size`, `mp_world_size`.
        lr_scheduler, loss_scaler, client_state, config: as they were stored, as plain values.
    """

    folder: Path
    stage: int
    world: int
    version: str
    model: dict[str, Whole]
    tied: dict[str, str]
    states: dict[str, dict[str, Whole]]
    param_groups: list[dict[str, Any]]
    counters: dict[str, int]
    lr_scheduler: Any
    loss_scaler: Any
    client_state: dict[str, Any]
    config: dict[str, Any]

    def model_state(self) -> dict[str, Tensor]:
        """For `module.load_state_dict`: every name, the tied ones too."""
        found = {name: value.tensor() for name, value in self.model.items()}
        return found | {alias: found[name] for alias, name in self.tied.items() if name in found}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """By parameter's name, then by state: what `torch.optim` keeps by the parameter's number.

        Scalars are copies, because optimizers count in place, and DeepSpeed has one `step` for many parameters.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, values in self.states.items():
            for name, value in values.items():
                found.setdefault(name, {})[key] = value.tensor() if value.shape else value.tensor().clone()
        return found


def open_deepspeed(path: str | os.PathLike[str], *, tag: str | None = None) -> DeepSpeedCheckpoint:
    """The checkpoint under `path`: the folder given to DeepSpeed's `save_checkpoint`, or a tag's folder itself.

    `tag`: by default what `latest` or `latest_universal` names.

    Raises:
        CheckpointIncomplete: it is not there, or not all of it.
        CheckpointCorrupt: a file is damaged, or files do not belong together.
        PickleRefused: a file asks for more than data.
        ConfigError: stage 0, tensor or pipeline parallelism, experts, or elastic mode of old versions.
    """
    folder = _folder(Path(path), tag)
    try:
        return _open(folder)
    except (ZsError, OSError):
        raise
    except Exception as error:  # values of other types than DeepSpeed writes, in one of a hundred places
        raise CheckpointCorrupt(f"not what DeepSpeed writes: {type(error).__name__}: {error}", folder) from error


def _open(folder: Path) -> DeepSpeedCheckpoint:
    files = _files(folder)
    models = {rank: _dict(file) for rank, file in files["model"].items()}
    first, where = models[0], files["model"][0]
    if first.get("mp_world_size", 1) != 1:
        raise ConfigError(f"{where}: {first['mp_world_size']} model-parallel ranks; only data parallelism is read")
    if not isinstance(first.get("param_shapes"), list):
        raise ConfigError(f"{where}: written without ZeRO (stage 0); load its `module` from read_pickled(...)")
    shapes = [{str(name): tuple(shape) for name, shape in group.items()} for group in first["param_shapes"]]
    if (folder / "zero").is_dir():
        ranks = [_dict(folder / "zero" / "optimizer_state.pt")]
        values, groups = universal(folder, shapes, ranks[0]), ranks[0].get("param_groups")
    else:
        if not files["optim"]:
            raise CheckpointIncomplete("there is no file *_optim_states.pt here", folder)
        ranks = [member(_dict(file), "optimizer_state_dict", file) for file in files["optim"].values()]
        values, groups = sharded(folder, shapes, ranks, list(files["optim"].values()))
    stage = _plain(ranks[0].get("zero_stage", 1))  # DeepSpeed's bf16 optimizer of stage 1 does not say
    if not isinstance(stage, int) or not isinstance(groups, list):
        raise CheckpointCorrupt("no `zero_stage`, or no `param_groups`", folder)
    tied = {alias: name for state in models.values() for alias, name in (state.get("shared_params") or {}).items()}
    states = {key: found for key, found in values.items() if key != "fp32"}
    _add_steps(states, groups, shapes)
    return DeepSpeedCheckpoint(
        folder=folder,
        stage=stage,
        world=int(first.get("dp_world_size", len(files["optim"]) or 1)),
        version=str(first.get("ds_version")),
        model={**values["fp32"], **_not_trained(models, files["model"], set(values["fp32"]), tied)},
        tied=tied,
        states=states,
        param_groups=[_named(group, shapes) for group in groups],
        counters={name: int(first[name]) for name in _COUNTERS if isinstance(first.get(name), int)},
        lr_scheduler=_plain(first.get("lr_scheduler")),
        loss_scaler=_plain(ranks[0].get("loss_scaler")),
        client_state={key: _plain(value) for key, value in first.items() if key not in _OWN},
        config=_plain(first.get("ds_config")) or {},
    )


def _folder(path: Path, tag: str | None) -> Path:
    if tag is None:
        for name in ("latest", "latest_universal"):
            if (path / name).is_file():
                tag = (path / name).read_text().strip()
                break
        else:
            if any(_RANK.fullmatch(file.name) for file in path.glob("*.pt")):
                return path
            raise CheckpointIncomplete("neither a file `latest` nor a checkpoint of DeepSpeed is here", path)
    if name_problem(tag) or Path(tag).name != tag:
        raise CheckpointCorrupt(f"the tag {tag!r} is no folder's name", path)
    if not (path / tag).is_dir():
        raise CheckpointIncomplete("there is no such folder", path / tag)
    return path / tag


def _files(folder: Path) -> dict[str, dict[int, Path]]:
    """The ranks' files in order of rank: those of the model and those of the optimizer."""
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for file in sorted(folder.glob("*.pt")):
        match = _RANK.fullmatch(file.name)
        if match is None:
            if re.match(r"layer_|expp_rank_|.*expert", file.name):
                raise ConfigError(f"{file}: pipeline stages and experts are not read; only data parallelism is")
            continue
        rank, parallel, kind = int(match[1] or 0), int(match[2]), match[3]
        if parallel:
            raise ConfigError(f"{file}: {parallel + 1} or more model-parallel ranks; only data parallelism is read")
        if rank in found[kind]:
            raise CheckpointCorrupt(f"{file.name} and {found[kind][rank].name} are both of rank {rank}", folder)
        found[kind][rank] = file
    for kind, files in found.items():
        if sorted(files) != list(range(len(files))):
            raise CheckpointIncomplete(f"files of ranks {sorted(files)} only", folder / f"*_{kind}_states.pt")
    if not found["model"]:
        raise CheckpointIncomplete("there is no file *_model_states.pt here", folder)
    return {kind: dict(sorted(files.items())) for kind, files in found.items()}


def _dict(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointIncomplete("this file is missing", file)
    found = read_pickled(file)
    if not isinstance(found, dict):
        raise CheckpointCorrupt(f"a {type(found).__name__} and no dictionary", file)
    return found


def _add_steps(states: dict[str, dict[str, Whole]], groups: list[dict[str, Any]], shapes: list[Shapes]) -> None:
    """DeepSpeed's fused optimizers count steps in the group; torch's and its host Adam in the state."""
    for group in groups:
        step = group.pop("step", None)
        for name in _named(group, shapes)["params"] if isinstance(step, Tensor | int | float) else ():
            value = Whole((), (torch.as_tensor(step, dtype=torch.float32).reshape(()),))
            if any(name in named for key, named in states.items() if key != "step"):
                states.setdefault("step", {}).setdefault(name, value)


def _named(group: Mapping[str, Any], shapes: list[Shapes]) -> dict[str, Any]:
    """The group's hyper-parameters with the parameters' names: `params` has the numbers of flat groups."""
    flats = [index for index in group.get("params", ()) if isinstance(index, int) and 0 <= index < len(shapes)]
    return {**_plain(group), "params": [name for index in flats for name in shapes[index]]}


def _not_trained(
    models: Mapping[int, dict[str, Any]], files: Mapping[int, Path], trained: set[str], tied: Mapping[str, str]
) -> dict[str, Whole]:
    """Frozen parameters and buffers: from rank 0's module, at stage 3 the frozen ones from every rank's fragment."""
    first = models[0]
    module, found = member(first, "module", files[0]), {}
    frozen = first.get("frozen_param_shapes") or {}
    for name, value in (module or {}).items():
        if name in trained or name in tied:
            continue
        if not isinstance(value, Tensor):
            raise ConfigError(f"{files[0]}: {name} in the module's state is a {type(value).__name__} and no tensor")
        shape = tuple(frozen.get(name, value.shape))
        if tuple(value.shape) == shape:
            found[name] = Whole(shape, (value.reshape(-1),))
            continue
        left, parts = math.prod(shape), []
        for rank, state in models.items():
            part = member(member(state, "frozen_param_fragments", files[rank]), name, files[rank]).reshape(-1)[:left]
            parts.append(part)
            left -= part.numel()
        found[name] = whole({name: shape}, name, parts, files[0])
    return found


class _Plain:
    """Records as dictionaries of their fields, enumerations as their values.

    Counts what it visits: a pickle may hold a value that is small in memory, and endless written out.
    """

    def __init__(self) -> None:
        self.left = _MOST_VALUES

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.left -= 1
        if depth > 64 or self.left < 0:
            raise CheckpointCorrupt(f"values nested deeper than 64, or more than {_MOST_VALUES:,} of them")
        if isinstance(value, Record):
            if not value.fields and len(value.arguments) == 1:
                return self(value.arguments[0], depth + 1)
            return self(value.fields, depth + 1)
        if isinstance(value, dict):
            return {key: self(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(self(item, depth + 1) for item in value)
        return value


def _plain(value: Any) -> Any:
    return _Plain()(value)
