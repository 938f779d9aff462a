"""The sections of a DeepSpeed configuration that zs-zero owns: `zero_optimization`, `bf16` and `optimizer`.

Every key of the language is here and falls in one class: honoured; equivalent (mapped, its note says how); harmless
(accepted, its note says why nothing follows); or known and not there yet, which passes while its value asks for nothing
and is refused by name otherwise. `"auto"` means the default.

    zs_zero.shard(model, optimizer.factory()(model.parameters()), **zero.options(), **bf16.options())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from zs_comm import ConfigError
from zs_comm.config import Problem, config_error
from zs_comm.factory import TypeAndParams, classes_of
from zs_comm.keys import DeepSpeedSection, Later, Note

Size: TypeAlias = Annotated[int, Field(ge=0)]
_OFFLOAD = "offload is not there yet; drop the key, or set device to 'none'"
_ZEROPP = "ZeRO++ is not there yet"


class OffloadParamConfig(DeepSpeedSection):
    """`zero_optimization.offload_param`: only `device: "none"` for now; the other keys tune what is off."""

    device: Annotated[Any, Later(_OFFLOAD, "none")] = "none"
    nvme_path: str | None = None
    buffer_count: Size = 5
    buffer_size: Size = Field(default=100_000_000, description="elements")
    max_in_cpu: Size = Field(default=1_000_000_000, description="elements")
    pin_memory: bool = True


class OffloadOptimizerConfig(DeepSpeedSection):
    """`zero_optimization.offload_optimizer`: only `device: "none"` for now; the other keys tune what is off."""

    device: Annotated[Any, Later(_OFFLOAD, "none")] = "none"
    nvme_path: str | None = None
    buffer_count: Size = 4
    pin_memory: bool = True
    pipeline: bool = False
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    super_offload: bool = False
    cpuadam_cores_perc: Annotated[float, Field(ge=0, le=1)] = 0.8


_units = Note("harmless", "whole units are communicated; their sizes follow the model (printed by optimizer.plan)")
_live = Note(
    "harmless", "at most two units are whole at a time, and a unit is released when its forward or backward ends"
)
_overlap = Note("equivalent", "communication always runs beside the computation")
_ranks = Note("harmless", "every rank sends its share; there is no other path to choose")
_gather = Note("equivalent", "save_16bit_model and zs_zero.full_state_dict gather whole weights whatever this says")
_files = Note("harmless", "concerns the layout of checkpoint files, which do not depend on it")


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
    cpu_offload: Annotated[Any, Later(_OFFLOAD)] = None
    cpu_offload_param: Annotated[Any, Later(_OFFLOAD)] = None
    cpu_offload_use_pin_memory: Annotated[bool, Note("harmless", "nothing is offloaded")] = False
    zenflow: Annotated[Any, Later("ZenFlow is not there yet")] = None
    sub_group_size: Annotated[Size, Note("harmless", "the step runs unit by unit; the size concerns offload")] = (
        1_000_000_000
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
    ignore_unused_parameters: Annotated[
        Any, Later("a parameter without a gradient is an ordinary case here; there is no mode that raises", True)
    ] = True
    legacy_stage1: Annotated[Any, Later("there is one implementation of stage 1", False)] = False
    round_robin_gradients: Annotated[bool, Note("harmless", "every rank owns an equal slice of every unit")] = False
    zero_hpz_partition_size: Annotated[Any, Later(_ZEROPP, 1)] = 1
    zero_quantized_weights: Annotated[Any, Later(_ZEROPP, False)] = False
    zero_quantized_nontrainable_weights: Annotated[Any, Later(_ZEROPP, False)] = False
    zero_quantized_gradients: Annotated[Any, Later(_ZEROPP, False)] = False
    zeropp_loco_param: Annotated[Any, Later(_ZEROPP)] = None
    mics_shard_size: Annotated[Any, Later("pass a mesh with a replicate and a shard axis instead", -1)] = -1
    mics_hierarchical_params_gather: Annotated[Any, Later("hierarchical gathers are not there yet", False)] = False
    memory_efficient_linear: Annotated[bool, Note("harmless", "torch's own linear is used, which keeps no copy")] = True
    pipeline_loading_checkpoint: Annotated[bool, _files] = False
    override_module_apply: Annotated[bool, Note("harmless", "zs_zero.Init patches nothing that lasts")] = True
    log_trace_cache_warnings: Annotated[bool, Note("harmless", "there is no trace cache")] = False
    enable_sanity_checks: Annotated[bool, Note("equivalent", "the checks always run")] = False
    save_muon_momentum_buffer_in_memory: Annotated[Any, Later("Muon is not there yet", False)] = False
    leaf_module: Annotated[Any, Later("name the units by zs_zero.shard(units=...) instead")] = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `zs_zero.shard` that this section decides."""
        return {"stage": self.stage, "prefetch": self.prefetch_bucket_size > 0}

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
    """`bf16` (or `bfloat16`): parameters and gradients in bfloat16, masters and optimizer states in fp32."""

    enabled: bool = False
    immediate_grad_update: Annotated[bool, Note("harmless", "gradients are reduced as the stage wants it")] = False
    check_grad_overflow: Annotated[
        bool, Note("harmless", "a step with a non-finite gradient is taken, as torch takes it")
    ] = True
    bf16_master_weights_and_grads: Annotated[Any, Later("masters are fp32", False)] = False
    bf16_optimizer_states: Annotated[Any, Later("optimizer states are fp32", False)] = False

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `zs_zero.shard` that this section decides."""
        return {"dtype": torch.bfloat16} if self.enabled else {}


_DEEPSPEED_ONLY = ("lamb", "onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd", "lion", "muon")


class OptimizerConfig(TypeAndParams):
    """`optimizer`: adam, adamw and adagrad in any spelling, or the exact name of another class of `torch.optim`."""

    legacy_fusion: Annotated[Any, Later("the 1-bit optimizers are not there yet", False)] = False

    @property
    def adam_is_adamw(self) -> bool:
        """Whether "Adam" is the type and stands for AdamW."""
        return (self.type or "").lower() == "adam" and self.given.get("adam_w_mode", True) is not False

    def factory(self) -> Callable[[Any], torch.optim.Optimizer] | None:
        """`callable(parameters)`; None where no type is given.

        "Adam" is AdamW unless `adam_w_mode` is false, and there is no weight decay unless `params` names one; both as
        in DeepSpeed. With `torch_adam` the defaults are torch's.

        Raises:
            ConfigError: an unknown type or parameter, or one whose feature is not there.
        """
        if self.type is None:
            return None
        name, params = self.type, self.given
        if "max_grad_norm" in params:
            raise _problem("the optimizer does not clip; use the key gradient_clipping", "params", "max_grad_norm")
        if name.lower() in _DEEPSPEED_ONLY:
            raise _problem(f"{name} is not there yet", "type")
        if name.lower() == "adagrad":
            name = "Adagrad"
        if name.lower() in ("adam", "adamw"):
            params = _adam(params)
            name = "AdamW" if name.lower() == "adamw" or self.adam_is_adamw else "Adam"
        return self.maker("optimizer", classes_of(torch.optim, torch.optim.Optimizer), name, params)


def _adam(params: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's parameters of Adam and AdamW as torch's."""
    switches = {"torch_adam": False, "adam_w_mode": True, "bias_correction": True, "fp32_optimizer_states": True}
    chosen = {key: params.pop(key, default) for key, default in switches.items()}
    for key, value in chosen.items():
        if not isinstance(value, bool):
            raise _problem(f"Input should be true or false (got {value!r})", "params", key)
    for key in ("bias_correction", "fp32_optimizer_states"):
        if not chosen[key]:
            raise _problem("false is not there yet", "params", key)
    defaults = {} if chosen["torch_adam"] else {"weight_decay": 0.0}
    kernel = {} if "foreach" in params else {"fused": True}
    return {**defaults, **kernel, **params}


def _problem(text: str, *path: str) -> ConfigError:
    return config_error([Problem(path, text)])
