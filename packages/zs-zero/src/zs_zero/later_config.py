"""Sections of `zero_optimization` whose features are not there: they are read whole, so that no typo hides in them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field
from zs_comm.keys import DeepSpeedSection, Note

Size: TypeAlias = Annotated[int, Field(ge=0)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
_zenflow = Note("harmless", "for ZenFlow")
_loco = Note("harmless", "for zero_quantized_gradients")
_leaf = Note("harmless", "for leaf modules")


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
