"""What lives where: the policy of a sharded model's tiers, as plain data.

    tier     holds
    device   what computes: the default for everything
    host     this process's memory (on a CPU device that is the device: nothing moves)
    files    blocks in a `BlockStore`, one store per rank and kind

A kind (parameters, gradients, optimizer: masters and states) lives in one tier, or partly in files: what is not there
is resident in host memory, as a share (`ratio`) or as many bytes as there is room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Tier: TypeAlias = Literal["device", "host", "files"]
Store: TypeAlias = Literal["auto", "aio", "file", "memory"]
KINDS = ("parameters", "gradients", "optimizer")
BLOCK_NUMEL = 1 << 20  # elements of a block: 12 MiB of fp32 master and moments
ALIGN_NUMEL = 64  # elements: borders of blocks; whole vectors, and 64 bytes in every dtype of the states


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where blocks lie, and what moves them."""

    folder: str
    job: str | None = None  # name of this training's folder; None: one of its own
    store: Store = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)  # of the store: see `zs_zero.tiers.opening.open_store`


@dataclass(frozen=True, kw_only=True)
class OptimizerPolicy:
    """Masters and states; their gradients wait for them in `gradients`."""

    tier: Tier = "device"
    ratio: float = 1.0  # share of the elements that leaves; the rest is resident
    max_resident: int | None = None  # bytes of masters and states that may stay in host memory; None: by `ratio` alone
    gradients: Tier | Literal["auto"] = "device"  # auto: on the device, unless a memory limit leaves no room there
    buffer_count: int = 4  # blocks in memory at a time: being read, updated and written
    block_numel: int = BLOCK_NUMEL
    early: bool = False  # updates begin during backward, on trial: discarded if more gradients or a clip follow
    eight_bit: bool = False  # moments in 8 bits with a scale per 256 elements
    pin_memory: bool = True


@dataclass(frozen=True, kw_only=True)
class ParameterPolicy:
    """This rank's shards of the parameters, frozen ones too."""

    tier: Tier = "device"
    max_resident: int | None = 0  # elements that stay in host memory where the tier is files; None: all that fit
    buffer_count: int = 5  # units that are read ahead at most
    pin_memory: bool = True


@dataclass(frozen=True, kw_only=True)
class Offload:
    """All of it. The default leaves everything on the device."""

    optimizer: OptimizerPolicy = OptimizerPolicy()
    parameters: ParameterPolicy = ParameterPolicy()
    optimizer_files: Files | None = None  # masters, states and gradients
    parameter_files: Files | None = None
    host_memory_limit: int | None = None  # bytes above this process's size when the model is sharded
    activation_nbytes: int | None = None  # of the limit, what is left to activations; None: an eighth of it

    def __bool__(self) -> bool:
        return self.moves or self.host_memory_limit is not None

    @property
    def moves(self) -> bool:
        """Whether anything is to live elsewhere."""
        return self.optimizer.tier != "device" or self.parameters.tier != "device"

    def described(self) -> str:
        """What has to be the same on all ranks: not the folders, which may be each rank's own."""
        return f"{self.optimizer} {self.parameters} limit {self.host_memory_limit} {self.activation_nbytes}"
