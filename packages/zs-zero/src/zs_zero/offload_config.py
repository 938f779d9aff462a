"""Offload as a configuration says it: `offload_optimizer`, `offload_param`, `aio`, a memory limit; and their policy.

    offload_of({"device": "nvme", "nvme_path": "/fast"}, None, {"queue_depth": 32}, stage=3)  ->  tiers.policy.Offload

The sections are those of a DeepSpeed configuration; `zs_zero.shard` takes them as keywords. Keys that begin with `zs_`
are not DeepSpeed's. Rules between the keys are in `offload_rules`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field
from zs_comm.config import ByteSize, Problem, check, config_error
from zs_comm.keys import DeepSpeedSection, Later, Note

from .later_config import Share, Size
from .offload_rules import aio_rules, limit_rules, offload_rules
from .tiers.policy import ALIGN_NUMEL, BLOCK_NUMEL, Files, Offload, OptimizerPolicy, ParameterPolicy, Tier

S = TypeVar("S", bound=DeepSpeedSection)
Count: TypeAlias = Annotated[int, Field(ge=1)]
Device: TypeAlias = Literal["none", "cpu", "nvme"]
Bytes: TypeAlias = Annotated[int, ByteSize(), Field(ge=1)]
Room: TypeAlias = Annotated[int, ByteSize(), Field(ge=0)]
_TIERS: Mapping[str, Tier] = {"none": "device", "device": "device", "cpu": "host", "nvme": "files"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # as tiers.folder takes it
_PAGE = 4096  # bytes: requests are whole pages
_MOST_IN_FLIGHT = 256
_pipelined = Note("equivalent", "blocks are always read ahead and written behind, with the same numbers")


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _folder_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("Input should be a name of letters, digits, '_', '-' and '.', 128 at most")
    return value


Folder: TypeAlias = Annotated[str, BeforeValidator(_path)]
FolderName: TypeAlias = Annotated[str, AfterValidator(_folder_name)]


class OffloadOptimizerConfig(DeepSpeedSection):
    """`zero_optimization.offload_optimizer`: masters and optimizer states, and the gradients that wait for them."""

    device: Device = Field(
        default="none", description="where they live: beside the model, in host memory, or in files under nvme_path"
    )
    nvme_path: Folder | None = Field(default=None, description="the folder of the files; device 'nvme' needs it")
    buffer_count: Count = Field(default=4, description="blocks in memory at a time: being read, updated and written")
    pin_memory: bool = Field(default=True, description="page-lock the memory that a CUDA device copies from and to")
    pipeline: Annotated[bool, _pipelined] = False
    pipeline_read: Annotated[bool, _pipelined] = False
    pipeline_write: Annotated[bool, _pipelined] = False
    fast_init: Annotated[
        bool, Note("harmless", "states are first written when they first exist, as fast as can be")
    ] = False
    ratio: Share = Field(default=1.0, description="share of the elements that leaves; the rest stays where it would be")
    super_offload: Annotated[
        bool, Note("equivalent", "true is zs_early_update: true: updates on trial, discarded where they were too early")
    ] = False
    cpuadam_cores_perc: Annotated[
        Share, Note("harmless", "the update runs in this process, with torch.get_num_threads() threads")
    ] = 0.8
    zs_gradients: Literal["auto", "device", "cpu", "nvme"] = Field(
        default="auto",
        description="where gradients wait for the update; auto: with the model, unless a limit leaves no room there",
    )
    zs_max_in_cpu: Room | None = Field(
        default=None,
        description="bytes of masters and states that stay in host memory with device 'nvme'; null: none, "
        "or under zs_host_memory_limit as many as fit",
    )
    zs_early_update: bool = Field(
        default=False, description="begin updates during backward, on trial: discarded if a clip or gradients follow"
    )
    zs_state: Literal["fp32", "8bit"] = Field(
        default="fp32", description="optimizer moments as they are, or in 8 bits with a scale for each 256"
    )
    zs_block_numel: Annotated[int, Field(ge=ALIGN_NUMEL)] | None = Field(
        default=None, description=f"elements of a block at most, in multiples of {ALIGN_NUMEL}; null: {BLOCK_NUMEL}"
    )

    @property
    def leaves(self) -> bool:
        """Whether anything is offloaded."""
        return self.device != "none"

    @property
    def in_cpu(self) -> bool:
        """Whether it is offloaded to host memory."""
        return self.device == "cpu"

    @property
    def early(self) -> bool:
        """Whether updates begin during backward."""
        return self.zs_early_update or self.super_offload

    def capped(self, sub_group_size: int) -> OffloadOptimizerConfig:
        """The section with blocks of `sub_group_size` elements at most."""
        if sub_group_size >= (self.zs_block_numel or BLOCK_NUMEL):
            return self
        return self.model_copy(update={"zs_block_numel": max(ALIGN_NUMEL, sub_group_size)})

    def policy(self) -> OptimizerPolicy:
        """The same in the words of `tiers.policy`."""
        gradients = "auto" if self.zs_gradients == "auto" else _TIERS[self.zs_gradients]
        return OptimizerPolicy(
            tier=_TIERS[self.device],
            ratio=self.ratio,
            max_resident=self.zs_max_in_cpu,
            gradients=gradients if self.leaves else "device",
            buffer_count=self.buffer_count,
            block_numel=(self.zs_block_numel or BLOCK_NUMEL) // ALIGN_NUMEL * ALIGN_NUMEL,
            early=self.early,
            eight_bit=self.zs_state == "8bit",
            pin_memory=self.pin_memory,
        )


class OffloadParamConfig(DeepSpeedSection):
    """`zero_optimization.offload_param`: each rank's shards of the parameters, at stage 3."""

    device: Device = Field(
        default="none", description="where they live: on the device, in host memory, or in files under nvme_path"
    )
    nvme_path: Folder | None = Field(default=None, description="the folder of the files; device 'nvme' needs it")
    buffer_count: Count = Field(default=5, description="units that are read ahead at most")
    buffer_size: Annotated[Size, Note("equivalent", "buffers are as large as the plan's units need them")] = Field(
        default=100_000_000, description="elements"
    )
    max_in_cpu: Size = Field(
        default=1_000_000_000,
        description="elements that stay in host memory with device 'nvme'; under zs_host_memory_limit as many as fit, "
        "unless a number is given",
    )
    pin_memory: bool = Field(default=True, description="page-lock the memory that a CUDA device copies from and to")

    def policy(self, *, limited: bool = False) -> ParameterPolicy:
        """The same in the words of `tiers.policy`. limited: whether there is a memory limit."""
        fits = limited and "max_in_cpu" not in self.model_fields_set
        return ParameterPolicy(
            tier=_TIERS[self.device],
            max_resident=None if fits else self.max_in_cpu,
            buffer_count=self.buffer_count,
            pin_memory=self.pin_memory,
        )


class AioConfig(DeepSpeedSection):
    """`aio`: how files are read and written, for device 'nvme'."""

    block_size: Bytes | None = Field(
        default=None, description="bytes of a request, rounded up to 4096, up to 1GiB; null: the store's choice"
    )
    queue_depth: Count | None = Field(
        default=None, description=f"requests in flight, up to {_MOST_IN_FLIGHT}; null: the store's choice"
    )
    intra_op_parallelism: Count | None = Field(
        default=None, description=f"threads of a store, up to {_MOST_IN_FLIGHT}; null: the store's choice"
    )
    thread_count: Annotated[Count | None, Note("equivalent", "the old name of intra_op_parallelism")] = None
    single_submit: Annotated[bool, Note("harmless", "requests are handed over in batches, as many as there are")] = (
        False
    )
    overlap_events: Annotated[bool, Note("equivalent", "handing over and waiting always overlap")] = True
    use_gds: Annotated[bool, Later("GPUDirect Storage is not there yet; files are read to host memory", False)] = False
    zs_store: Literal["auto", "aio", "file"] = Field(
        default="auto", description="zs-offload-aio's store, or plain files; auto: the first where it is installed"
    )
    zs_job: FolderName | None = Field(
        default=None, description="name of this training's folder under nvme_path; null: one of its own"
    )

    def files(self, folder: str) -> Files:
        """The same for the files in `folder`."""
        threads = self.intra_op_parallelism or self.thread_count
        options: dict[str, int] = {}
        if self.block_size is not None:
            options["block_size"] = min(-(-self.block_size // _PAGE) * _PAGE, 2**30)
        if self.queue_depth is not None:
            options["queue_depth"] = min(self.queue_depth, _MOST_IN_FLIGHT)
        if threads is not None:
            options["threads"] = min(threads, _MOST_IN_FLIGHT)
        return Files(folder=folder, job=self.zs_job, store=self.zs_store, options=options)


class TiersConfig(DeepSpeedSection):
    """To be inherited by the section of the top level."""

    aio: AioConfig = AioConfig()
    zs_host_memory_limit: Bytes | None = Field(
        default=None,
        description="bytes that a process may take above its size when the model is sharded: what cannot fit is "
        "refused at start, and offload keeps to it; without offload it is only checked; null: no limit",
    )
    zs_activation_memory: Room | None = Field(
        default=None, description="bytes of that limit which are left to activations; null: an eighth"
    )

    def tiers_options(self) -> dict[str, Any]:
        """The keyword arguments of `zs_zero.shard` that these keys decide."""
        given = {"host_memory_limit": self.zs_host_memory_limit, "activation_memory": self.zs_activation_memory}
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return {"aio": self.aio} | options if self.aio.model_fields_set else options


class _Limits(DeepSpeedSection):
    host_memory_limit: Bytes | None = None
    activation_memory: Room | None = None


def offload_of(
    offload_optimizer: Mapping[str, Any] | OffloadOptimizerConfig | None = None,
    offload_param: Mapping[str, Any] | OffloadParamConfig | None = None,
    aio: Mapping[str, Any] | AioConfig | None = None,
    *,
    stage: int,
    host_memory_limit: int | str | None = None,
    activation_memory: int | str | None = None,
) -> Offload:
    """The policy that three sections and a limit ask for.

    Args:
        offload_optimizer, offload_param, aio: sections of a configuration, as mappings or as what they were read to.
        stage: of ZeRO.
        host_memory_limit: bytes, or a string such as "4GiB".
        activation_memory: bytes of the limit that are left to activations, in the same way.

    Raises:
        ConfigError: with every problem, each under the path of its key (`offload_optimizer.nvme_path`).
    """
    problems: list[Problem] = []
    optimizer = _read(OffloadOptimizerConfig, offload_optimizer, "offload_optimizer", problems)
    parameters = _read(OffloadParamConfig, offload_param, "offload_param", problems)
    files = _read(AioConfig, aio, "aio", problems)
    given = {"host_memory_limit": host_memory_limit, "activation_memory": activation_memory}
    limits = _read(_Limits, given, "", problems)
    if problems:
        raise config_error(problems)
    sections = {"offload_optimizer": optimizer, "offload_param": parameters}
    zero = {"stage": stage} | {key: one.model_dump(exclude_unset=True) for key, one in sections.items()}
    found = [*offload_rules(zero), *limit_rules(limits.model_dump())]
    found += aio_rules(files.model_dump(exclude_unset=True), ("aio",))
    if found:
        raise config_error([Problem(path, text) for path, text in found])
    policy = optimizer.policy()
    in_files = "files" in (policy.tier, policy.gradients)
    return Offload(
        optimizer=policy,
        parameters=parameters.policy(limited=limits.host_memory_limit is not None),
        optimizer_files=files.files(optimizer.nvme_path or "") if in_files else None,
        parameter_files=files.files(parameters.nvme_path or "") if parameters.device == "nvme" else None,
        host_memory_limit=limits.host_memory_limit,
        activation_nbytes=limits.activation_memory,
    )


def _read(section: type[S], given: Any, path: str, problems: list[Problem]) -> S:
    """A section from whatever was given for it; what is wrong with that goes to `problems`."""
    if isinstance(given, section):
        return given
    found, wrong = check(section, {} if given is None else given, path=path)
    problems += wrong
    return found or section()
