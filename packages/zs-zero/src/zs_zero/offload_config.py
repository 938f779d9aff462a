"""Sections of `zero_optimization` whose features are not there: they are read whole, so that no typo hides in them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field
from zs_comm.keys import DeepSpeedSection, Later, Note

Size: TypeAlias = Annotated[int, Field(ge=0)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
OFFLOAD = "offload is not there yet; drop the key, or set device to 'none'"
_device = Note("harmless", "for `device`, which decides")
_zenflow = Note("harmless", "for ZenFlow")
_loco = Note("harmless", "for zero_quantized_gradients")
_leaf = Note("harmless", "for leaf modules")


class OffloadParamConfig(DeepSpeedSection):
    """`zero_optimization.offload_param`: only `device: "none"`; the other keys tune what is off."""

    device: Annotated[Literal["none", "cpu", "nvme"], Later(OFFLOAD, "none")] = "none"
    nvme_path: Annotated[str | None, _device] = None
    buffer_count: Annotated[Size, _device] = 5
    buffer_size: Annotated[Size, _device] = Field(default=100_000_000, description="elements")
    max_in_cpu: Annotated[Size, _device] = Field(default=1_000_000_000, description="elements")
    pin_memory: Annotated[bool, _device] = True


class OffloadOptimizerConfig(DeepSpeedSection):
    """`zero_optimization.offload_optimizer`: only `device: "none"`; the other keys tune what is off."""

    device: Annotated[Literal["none", "cpu", "nvme"], Later(OFFLOAD, "none")] = "none"
    nvme_path: Annotated[str | None, _device] = None
    buffer_count: Annotated[Size, _device] = 4
    pin_memory: Annotated[bool, _device] = True
    pipeline: Annotated[bool, _device] = False
    pipeline_read: Annotated[bool, _device] = False
    pipeline_write: Annotated[bool, _device] = False
    fast_init: Annotated[bool, _device] = False
    ratio: Annotated[Share, _device] = 1.0
    super_offload: Annotated[bool, _device] = False
    cpuadam_cores_perc: Annotated[Share, _device] = 0.8


class ZenFlowConfig(DeepSpeedSection):
    """`zero_optimization.zenflow`."""

    topk_ratio: Annotated[float, Field(gt=0, lt=1), _zenflow] = 0.1
    select_strategy: Annotated[Literal["auto", "step", "epoch"], _zenflow] = "auto"
    select_interval: Annotated[Size | None, _zenflow] = None
    update_interval: Annotated[Size | None, _zenflow] = None
    overlap_step: Annotated[bool, _zenflow] = False
    offload: Annotated[bool, _zenflow] = False
    auto_ratio: Annotated[Share, _zenflow] = 0.99
    full_warm_up_rounds: Annotated[Size, _zenflow] = 0
    pt_reserved_cores_perc: Annotated[Share, _zenflow] = 0.5
    steps_per_epoch: Annotated[Size | None, _zenflow] = None


class LocoConfig(DeepSpeedSection):
    """`zero_optimization.zeropp_loco_param`."""

    err_beta: Annotated[float, _loco] = 0.8
    reset_T: Annotated[Size, _loco] = 1024  # noqa: N815


class LeafModuleConfig(DeepSpeedSection):
    """`zero_optimization.leaf_module`."""

    classes: Annotated[list[str] | None, _leaf] = None
    names: Annotated[list[str], _leaf] = []
    name_suffixes: Annotated[list[str], _leaf] = []
