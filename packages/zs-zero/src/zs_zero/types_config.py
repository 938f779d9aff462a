"""The keys of a DeepSpeed configuration that choose dtypes, and how bf16 weights are updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from zs_comm.keys import DeepSpeedSection, Note

from .precision import Bf16Update

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ALIASES = {
    "fp32": ("float32", "torch.float32", "float"),
    "bf16": ("bfloat16", "torch.bfloat16"),
    "fp16": ("float16", "torch.float16", "half"),
}


def canonical(value: Any) -> Any:
    """The short name of a dtype that was given by another one, in any case; what is no such name as it is."""
    if not isinstance(value, str):
        return value
    return next((name for name, others in _ALIASES.items() if value.lower() in (name, *others)), value)


class _Section(DeepSpeedSection):
    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {
            key: canonical(value) if key.endswith(("_dtype", "_data_type")) else value for key, value in data.items()
        }


DtypeName: TypeAlias = Literal["fp32", "bf16", "fp16"]
_mode = Note("equivalent", "the parameters' dtype follows fp16.enabled and bf16.enabled, with which it has to agree")


class DataTypesConfig(_Section):
    """`data_types`: dtypes that differ from the parameters'."""

    grad_accum_dtype: DtypeName | None = Field(
        default=None, description="in which the gradients of several micro-steps are added; null: the parameters'"
    )
    param_dtype: Annotated[DtypeName | None, _mode] = None
    buffer_dtype: DtypeName | None = Field(
        default=None, description="of floating-point buffers (running statistics, tables); null: they keep theirs"
    )


class TypesConfig(_Section):
    """To be inherited by the section of the top level."""

    communication_data_type: DtypeName | None = Field(
        default=None, description="of gradients on the wire, summed in fp32; null: the parameters'"
    )
    data_types: DataTypesConfig = DataTypesConfig()
    zs_bf16_update: Bf16Update = Field(
        default="plain",
        description="how bf16 masters take an update: rounded to nearest, by chance, or with what is cut off kept",
    )
    zs_bf16_update_seed: int = Field(default=0, ge=0, description="of stochastic rounding")

    def types_options(self) -> dict[str, Any]:
        """The keyword arguments of `zs_zero.shard` that these keys decide."""
        names = {
            "reduce_dtype": self.communication_data_type,
            "grad_accum_dtype": self.data_types.grad_accum_dtype,
            "buffer_dtype": self.data_types.buffer_dtype,
        }
        options: dict[str, Any] = {key: _DTYPES[name] for key, name in names.items() if name is not None}
        if self.zs_bf16_update != "plain":
            options |= {"bf16_update": self.zs_bf16_update, "seed": self.zs_bf16_update_seed}
        return options
