"""The sections of a DeepSpeed configuration that scale the loss: `fp16` and `torch_autocast`."""

from __future__ import annotations

import importlib
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import nn
from zs_comm.config import Problem, config_error
from zs_comm.keys import DeepSpeedSection, Later

from .loss_scale import DynamicLossScale, LossScale, StaticLossScale

_FP16, _BF16 = ("fp16", "float16", "half", "torch.float16"), ("bf16", "bfloat16", "torch.bfloat16")
_FP16_MASTERS = "masters are fp32: in fp16 most updates are lost in rounding; drop the key"


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("it should be a finite number")
    return value


class Fp16Config(DeepSpeedSection):
    """`fp16`: parameters and gradients in float16, masters and optimizer states in fp32, a scaled loss."""

    enabled: bool = Field(default=False, description="train in float16 with a loss scale")
    auto_cast: bool = Field(default=False, description="cast floating-point inputs of forward to fp16")
    loss_scale: Annotated[float, Field(ge=0), AfterValidator(_finite)] = Field(
        default=0.0, description="0: dynamic; else the static scale"
    )
    initial_scale_power: int = Field(default=16, ge=0, le=127, description="a dynamic scale begins at 2 ** this")
    loss_scale_window: int = Field(default=1000, ge=1, description="steps without overflow until the scale doubles")
    hysteresis: int = Field(default=2, ge=1, description="overflows until the scale is halved")
    consecutive_hysteresis: bool = Field(default=False, description="a good step begins that count anew")
    min_loss_scale: Annotated[float, Field(ge=0), AfterValidator(_finite)] = Field(
        default=1.0, description="a dynamic scale is not halved below it"
    )
    fp16_master_weights_and_grads: Annotated[bool, Later(_FP16_MASTERS, False)] = False

    @property
    def dynamic(self) -> bool:
        """Whether the scale changes."""
        return self.enabled and self.loss_scale == 0

    @property
    def scale(self) -> float:
        """The scale to begin with; 1 where fp16 is off."""
        return (self.loss_scale or 2.0**self.initial_scale_power) if self.enabled else 1.0

    def scaler(self, *, raise_at_minimum: bool = False) -> LossScale:
        """A new loss scale. Raises ConfigError where its values do not go together."""
        if not self.dynamic:
            return StaticLossScale(self.scale)
        return DynamicLossScale(
            initial=self.scale,
            window=self.loss_scale_window,
            hysteresis=self.hysteresis,
            consecutive_hysteresis=self.consecutive_hysteresis,
            minimum=self.min_loss_scale,
            raise_at_minimum=raise_at_minimum,
        )


class TorchAutocastConfig(DeepSpeedSection):
    """`torch_autocast`: `torch.autocast` around every forward; parameters keep their dtype."""

    enabled: bool = Field(default=False, description="run forward under torch.autocast")
    dtype: Literal["fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16"] | None = Field(
        default=None, description="of autocast; null: torch's default for the device. fp16 scales the loss"
    )
    lower_precision_safe_modules: list[str] | None = Field(
        default=None,
        description="classes, as torch.nn.Linear, whose parameters' gradients travel in that dtype; null: none",
    )

    def autocast_dtype(self, device_type: str) -> torch.dtype | None:
        """The dtype of autocast there; None where it is off."""
        if not self.enabled:
            return None
        named = dict.fromkeys(_FP16, torch.float16) | dict.fromkeys(_BF16, torch.bfloat16)
        return named[self.dtype] if self.dtype else torch.get_autocast_dtype(device_type)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of autocast on this machine; None where it is off."""
        return self.autocast_dtype("cuda" if torch.cuda.is_available() else "cpu")

    def safe_modules(self) -> list[type[nn.Module]]:
        """The classes of `lower_precision_safe_modules`, imported. Raises ConfigError for one that is not there."""
        found = []
        for position, name in enumerate(self.lower_precision_safe_modules or []):
            package, _, short = name.rpartition(".")
            try:
                known = getattr(importlib.import_module(package), short)
            except (ImportError, AttributeError, ValueError) as error:
                path = ("torch_autocast", "lower_precision_safe_modules", position)
                text = f"no module class can be imported by that name (got {name!r})"
                raise config_error([Problem(path, text)]) from error
            found.append(known)
        return found


class PrecisionConfig(DeepSpeedSection):
    """To be inherited by the section of the top level."""

    fp16: Fp16Config = Fp16Config()
    torch_autocast: TorchAutocastConfig = TorchAutocastConfig()
    zs_raise_at_min_loss_scale: bool = Field(
        default=False, description="raise where gradients overflow at the smallest loss scale, as DeepSpeed's ZeRO does"
    )

    def scaling_options(self, device_type: str) -> dict[str, Any]:
        """The keyword arguments of `zs_zero.shard` that these keys decide."""
        strict, autocast = self.zs_raise_at_min_loss_scale, self.torch_autocast.autocast_dtype(device_type)
        options: dict[str, Any] = {}
        if autocast is not None:
            wires = dict.fromkeys(self.torch_autocast.safe_modules(), autocast)
            options = {"autocast": autocast, "reduce_dtype_of": wires}
        if self.fp16.enabled:
            options |= {"dtype": torch.float16, "loss_scale": self.fp16.scaler(raise_at_minimum=strict)}
            options |= {"cast_inputs": torch.float16} if self.fp16.auto_cast else {}
        elif autocast == torch.float16:
            # gradients pass through fp16 and underflow there as well; the numbers are those of torch.amp.GradScaler
            scale = DynamicLossScale(window=2000, hysteresis=1, minimum=2.0**-16, raise_at_minimum=strict)
            options |= {"loss_scale": scale}
        return options
