"""In which dtypes the numbers of a training are kept: masters, optimizer states and gradients.

    parameters   optimizer works on      states            gradients add up in     update
    fp32         the parameters          fp32 (or bf16)    fp32                    plain
    bf16, fp16   fp32 masters            fp32 (or bf16)    the parameters' dtype   plain
    bf16         the parameters          bf16 (or fp32)    bf16 (or fp32)          plain, stochastic_rounding, kahan

The last row is training without fp32 masters. There bf16 has eight bits for a weight, so an update below 1/512 of it is
lost in rounding, and the loss stops falling early ("plain" does what torch does). Two ways out, both with the optimizer
computing in fp32: to round up or down by chance, in proportion to what is cut off, so that the mean is right; or to
keep what rounding cuts off in 16 more bits and to add it before the next update (Zamirai et al., "Revisiting BFloat16
Training", 2020, sections 4 and 5). Here these bits hold all of it, so that the numbers are those of fp32 masters, with
4 bytes for a weight instead of 6.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from zs_comm import ConfigError

Bf16Update: TypeAlias = Literal["plain", "stochastic_rounding", "kahan"]
_SHORT = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_SHORT)


@dataclass(frozen=True)
class Kept:
    """The dtypes of one flat buffer's numbers."""

    param: torch.dtype
    master: torch.dtype  # of the tensors that the optimizer owns between steps
    state: torch.dtype  # of its element-wise states between steps
    accum: torch.dtype  # in which the gradients of several backwards are added
    update: Bf16Update

    @property
    def value(self) -> torch.dtype:
        """Of a parameter's exact value: a compensated one has more digits than its two parts."""
        return torch.float32 if self.update == "kahan" else self.master

    @property
    def grad(self) -> torch.dtype:
        """Of reduced gradients: fp32 for fp32 masters, whatever they were added in."""
        return self.master if self.master not in _SHORT else self.accum

    @property
    def widened(self) -> bool:
        """Whether the optimizer works on fp32 copies that exist during the step only."""
        return self.update != "plain" or self.state != self.master

    @property
    def accumulates(self) -> bool:
        """Whether gradients are added outside of `param.grad`, which has the parameter's dtype."""
        return self.accum != self.param


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What `zs_zero.shard` was told about dtypes; None is the default of the table above."""

    master: torch.dtype | None = None
    state: torch.dtype | None = None
    accum: torch.dtype | None = None
    update: Bf16Update = "plain"
    seed: int = 0  # of stochastic rounding

    def __post_init__(self) -> None:
        named = {"master_dtype": self.master, "state_dtype": self.state, "grad_accum_dtype": self.accum}
        for name, value in named.items():
            if value is not None and value not in _FLOATS:
                raise ConfigError(f"{name} is torch.float32, torch.bfloat16 or torch.float16 (got {value})")
        if self.state == torch.float16:
            raise ConfigError("state_dtype is torch.float32 or torch.bfloat16: fp16 cannot hold a squared gradient")
        if self.update not in get_args(Bf16Update):
            raise ConfigError(f"bf16_update is one of {', '.join(get_args(Bf16Update))} (got {self.update!r})")
        if self.update != "plain" and self.master not in (None, torch.bfloat16):
            raise ConfigError(
                f"bf16_update={self.update!r} trains without masters, and master_dtype={self.master} asks for some"
            )

    def check(self, dtypes: Iterable[torch.dtype]) -> None:
        """Raises ConfigError unless parameters of these dtypes can be trained so."""
        updates = [self.of(dtype).update for dtype in dtypes]
        if self.update != "plain" and self.update not in updates:
            raise ConfigError(f"bf16_update={self.update!r}: the model has no bf16 parameters to train (dtype=...)")

    def of(self, dtype: torch.dtype) -> Kept:
        """The dtypes for parameters of `dtype`. Raises ConfigError where masters of the asked dtype make no sense."""
        if dtype not in _FLOATS:  # fp64 and complex parameters: everything in their own
            return Kept(dtype, dtype, dtype, dtype, "plain")
        update: Bf16Update = self.update if dtype == torch.bfloat16 else "plain"
        default = torch.bfloat16 if update != "plain" else torch.float32
        master = dtype if dtype == torch.float32 else self.master or default
        if master == torch.float16:
            raise ConfigError(
                f"master_dtype={master}: fp16 loses unscaled gradients and small updates; fp32 keeps them"
            )
        if master not in (dtype, torch.float32):
            own = f" or {dtype}" if dtype == torch.bfloat16 else ""
            raise ConfigError(f"master_dtype={master}: the masters of {dtype} parameters are fp32{own}")
        return Kept(dtype, master, self.state or master, self.accum or dtype, update)
