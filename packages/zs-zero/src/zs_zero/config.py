"""The sections of a DeepSpeed configuration that zs-zero owns: `zero_optimization`, `bf16` and `optimizer`.

Every key of the language is here and falls in one class: honoured; equivalent (mapped, its note says how); harmless
(accepted, its note says why nothing follows); or known and not there yet, which passes while its value asks for nothing
and is refused by name otherwise. `"auto"` means the default.

    zs_zero.shard(model, optimizer.factory()(model.parameters()), **zero.options(), **bf16.options())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from zs_comm import ConfigError
from zs_comm.config import Problem, config_error, shown
from zs_comm.factory import TypeAndParams, classes_of
from zs_comm.keys import DeepSpeedSection, Later, Note

from .later_config import LeafModuleConfig, LocoConfig, Size, ZenFlowConfig
from .offload_config import OffloadOptimizerConfig, OffloadParamConfig
from .offload_rules import with_old_spellings
from .optimizers.muon import mark_for_muon
from .optimizers.named import NAMED, NOT_THERE, REFUSED

_ZEROPP = "ZeRO++ is not there yet"


_units = Note("harmless", "whole units are communicated; their sizes follow the model (printed by optimizer.plan)")
_live = Note(
    "harmless", "at most two units are whole at a time, and a unit is released when its forward or backward ends"
)
_overlap = Note("equivalent", "communication always runs beside the computation")
_ranks = Note("harmless", "every rank sends its share; there is no other path to choose")
_gather = Note("equivalent", "save_16bit_model and zs_zero.full_state_dict gather whole weights whatever this says")
_files = Note("harmless", "concerns the layout of checkpoint files, which do not depend on it")


def _old(new: str) -> Note:
    return Note("equivalent", f"the old way to say {new}")


class ZeroConfig(DeepSpeedSection):
    """`zero_optimization`."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=0, description="0: replicate; 1: shard optimizer states; 2: and gradients; 3: and parameters"
    )
    contiguous_gradients: Annotated[bool, Note("harmless", "gradients always lie in one buffer per unit")] = True
    reduce_scatter: Annotated[
        bool, Note("equivalent", "the sum has the same bits; sharded stages always reduce-scatter")
    ] = True
    reduce_bucket_size: Annotated[Size, _units] = 500_000_000
    use_multi_rank_bucket_allreduce: Annotated[bool, _ranks] = True
    allgather_partitions: Annotated[bool, _ranks] = True
    allgather_bucket_size: Annotated[Size, _units] = 500_000_000
    overlap_comm: Annotated[bool | None, _overlap] = None
    load_from_fp32_weights: Annotated[bool, Note("equivalent", "fp32 masters are the weights before the cast")] = True
    elastic_checkpoint: Annotated[bool, _files] = False
    offload_param: OffloadParamConfig | None = None
    offload_optimizer: OffloadOptimizerConfig | None = None
    cpu_offload: Annotated[bool | None, _old("offload_optimizer.device: 'cpu'")] = None
    cpu_offload_param: Annotated[bool | None, _old("offload_param.device: 'cpu'")] = None
    cpu_offload_params: Annotated[bool | None, _old("offload_param.device: 'cpu'")] = None
    cpu_offload_use_pin_memory: Annotated[bool | None, _old("pin_memory of what is offloaded to 'cpu'")] = None
    zenflow: Annotated[ZenFlowConfig | None, Later("ZenFlow is not there yet")] = None
    sub_group_size: Size = Field(
        default=1_000_000_000, description="elements of an offloaded optimizer's blocks at most, but not below 64"
    )
    prefetch_bucket_size: Annotated[Size, Note("equivalent", "one unit is fetched ahead; 0 turns prefetch off")] = (
        Field(default=50_000_000, alias="stage3_prefetch_bucket_size", description="elements; 0: no prefetch")
    )
    param_persistence_threshold: Annotated[Size, _units] = Field(
        default=100_000, alias="stage3_param_persistence_threshold"
    )
    model_persistence_threshold: Annotated[Size, _units] = Field(
        default=2**63 - 1, alias="stage3_model_persistence_threshold"
    )
    max_live_parameters: Annotated[Size, _live] = Field(default=1_000_000_000, alias="stage3_max_live_parameters")
    max_reuse_distance: Annotated[Size, _live] = Field(default=1_000_000_000, alias="stage3_max_reuse_distance")
    gather_16bit_weights_on_model_save: Annotated[bool, _gather] = Field(
        default=False, alias="stage3_gather_16bit_weights_on_model_save"
    )
    stage3_gather_fp16_weights_on_model_save: Annotated[bool, _gather] = False
    module_granularity_threshold: Annotated[Size, _units] = Field(
        default=0, alias="stage3_module_granularity_threshold"
    )
    use_all_reduce_for_fetch_params: Annotated[bool, _ranks] = Field(
        default=False, alias="stage3_use_all_reduce_for_fetch_params"
    )
    allgather_sequential: Annotated[bool, _ranks] = Field(default=False, alias="stage3_allgather_sequential")
    find_unused_parameters: Annotated[
        bool, Note("equivalent", "an old name; a parameter without a gradient is an ordinary case")
    ] = True
    ignore_unused_parameters: Annotated[
        bool, Later("a parameter without a gradient is an ordinary case here; there is no mode that raises", True)
    ] = True
    legacy_stage1: Annotated[bool, Later("there is one implementation of stage 1", False)] = False
    round_robin_gradients: Annotated[bool, Note("harmless", "every rank owns an equal slice of every unit")] = False
    zero_hpz_partition_size: Annotated[int, Field(ge=1), Later(_ZEROPP, 1)] = 1
    zero_quantized_weights: Annotated[bool, Later(_ZEROPP, False)] = False
    zero_quantized_nontrainable_weights: Annotated[bool, Later(_ZEROPP, False)] = False
    zero_quantized_gradients: Annotated[bool, Later(_ZEROPP, False)] = False
    zeropp_loco_param: Annotated[LocoConfig | None, Later(_ZEROPP)] = None
    mics_shard_size: Annotated[
        int, Field(ge=-1), Later("pass a mesh with a replicate and a shard axis instead", -1)
    ] = -1
    mics_hierarchical_params_gather: Annotated[bool, Later("hierarchical gathers are not there yet", False)] = False
    memory_efficient_linear: Annotated[bool, Note("harmless", "torch's own linear is used, which keeps no copy")] = True
    pipeline_loading_checkpoint: Annotated[bool, _files] = False
    override_module_apply: Annotated[bool, Note("harmless", "zs_zero.Init patches nothing that lasts")] = True
    log_trace_cache_warnings: Annotated[bool, Note("harmless", "there is no trace cache")] = False
    enable_sanity_checks: Annotated[bool, Note("equivalent", "the checks always run")] = False
    save_muon_momentum_buffer_in_memory: Annotated[
        bool, Note("harmless", "Muon's momentum always stays in memory, with the rank that updates its matrix")
    ] = False
    leaf_module: Annotated[LeafModuleConfig | None, Later("name the units by zs_zero.shard(units=...) instead")] = None

    @model_validator(mode="before")
    @classmethod
    def _old_offload(cls, data: Any) -> Any:
        return with_old_spellings(data) if isinstance(data, Mapping) else data

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `zs_zero.shard` that this section decides."""
        options: dict[str, Any] = {"stage": self.stage, "prefetch": self.prefetch_bucket_size > 0}
        if self.optimizer_offload.leaves:
            options["offload_optimizer"] = self.optimizer_offload.capped(self.sub_group_size)
        if self.offload_param is not None and self.offload_param.device != "none":
            options["offload_param"] = self.offload_param
        return options

    @property
    def optimizer_offload(self) -> OffloadOptimizerConfig:
        """`offload_optimizer`, or what holds where that is not given."""
        return self.offload_optimizer or OffloadOptimizerConfig()

    @property
    def shards_states(self) -> bool:
        """Stage 1 or more."""
        return self.stage >= 1

    @property
    def shards_gradients(self) -> bool:
        """Stage 2 or more."""
        return self.stage >= 2

    @property
    def shards_parameters(self) -> bool:
        """Stage 3."""
        return self.stage >= 3


class Bf16Config(DeepSpeedSection):
    """`bf16` (or `bfloat16`): parameters and gradients in bfloat16; masters and optimizer states in fp32, or too."""

    enabled: bool = Field(default=False, description="train in bfloat16")
    immediate_grad_update: Annotated[bool, Note("harmless", "gradients are reduced as the stage wants it")] = False
    check_grad_overflow: bool = Field(default=True, description="skip steps whose gradients are not finite")
    bf16_master_weights_and_grads: bool = Field(
        default=False, description="no fp32 masters: the bf16 weights are updated, from bf16 gradients"
    )
    bf16_optimizer_states: bool = Field(
        default=False, description="optimizer states in bf16 too; false: fp32, and an update is computed in fp32"
    )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `zs_zero.shard` that this section decides."""
        if not self.enabled:
            return {}
        options: dict[str, Any] = {"dtype": torch.bfloat16}
        if self.check_grad_overflow:
            options |= {"loss_scale": 1.0}
        if self.bf16_master_weights_and_grads:
            states = torch.bfloat16 if self.bf16_optimizer_states else torch.float32
            options |= {"master_dtype": torch.bfloat16, "state_dtype": states}
        return options


class OptimizerConfig(TypeAndParams):
    """`optimizer`: adam, adamw, adagrad, lamb, lion, muon in any spelling, or the exact name of a torch.optim class."""

    legacy_fusion: Annotated[bool, Note("harmless", "there is one implementation, with the same result")] = False

    @property
    def adam_is_adamw(self) -> bool:
        """Whether "Adam" is the type and stands for AdamW."""
        return (self.type or "").lower() == "adam" and self.given.get("adam_w_mode", True) is not False

    def prepare(self, model: nn.Module) -> None:
        """Before `factory()` is called on the model's parameters: marks those that Muon takes, by their names."""
        if (self.type or "").lower() == "muon":
            mark_for_muon(model)

    def factory(self) -> Callable[[Any], torch.optim.Optimizer] | None:
        """`callable(parameters)`; None where no type is given.

        "Adam" is AdamW unless `adam_w_mode` is false, and there is no weight decay unless `params` names one; "Lamb"
        corrects the step size, not the moments; all as in DeepSpeed. With `torch_adam` the defaults are torch's.

        Raises:
            ConfigError: an unknown type or parameter, or one whose feature is not there.
        """
        if self.type is None:
            return None
        name, params, found = self.type, self.given, list[Problem]()
        if name.lower() in REFUSED:
            raise config_error([Problem(("type",), f"{name}: {REFUSED[name.lower()]}", kind="refused")])
        if "max_grad_norm" in params:
            text = "the optimizer does not clip; use the key gradient_clipping"
            found.append(Problem(("params", "max_grad_norm"), text))
            del params["max_grad_norm"]
        for key, (value, why) in NOT_THERE.items() if name.lower() in NAMED else ():
            if params.get(key) is value:
                found.append(Problem(("params", key), why, kind="refused"))
                del params[key]
        classes: dict[str, Callable[..., Any]] = dict(classes_of(torch.optim, torch.optim.Optimizer))
        if params.get("torch_adam") is True and name.lower() in ("adam", "adamw"):
            name = "AdamW" if self.adam_is_adamw or name.lower() == "adamw" else "Adam"
            for key in {"torch_adam", "adam_w_mode", "fp32_optimizer_states"} & params.keys():
                value = params.pop(key)  # DeepSpeed's own, for an optimizer of torch
                if not isinstance(value, bool):
                    found.append(Problem(("params", key), f"Input should be true or false (got {shown(value)})"))
            params |= {} if {"foreach", "fused"} & params.keys() else {"fused": True}
        elif name.lower() in NAMED:
            classes[name] = NAMED[name.lower()]
            if name.lower() == "adamw" and params.get("adam_w_mode") is False:
                del params["adam_w_mode"]
        else:
            classes |= {known.capitalize(): NAMED[known] for known in ("lamb", "lion")}
            classes |= {known: object for known in REFUSED if not known.startswith("mu")}  # near "Adam" too
            name = {known.lower(): known for known in classes}.get(name.lower(), name)
        try:
            make = self.maker("optimizer", classes, name, params)
        except ConfigError as error:
            raise config_error([*found, *(one for one in error.problems if isinstance(one, Problem))]) from None
        if found:
            raise config_error(found)
        return make
