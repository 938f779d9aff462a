"""The section `checkpoint` of a DeepSpeed configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from zs_comm.config import ByteSize
from zs_comm.keys import DeepSpeedSection, Later, Note

_WRITER = Note("equivalent", "zs-offload-aio writes where it is installed, else threads do")
_BACKGROUND = Note("equivalent", "save_checkpoint(asynchronous=True) writes in the background")
_EVERY_RANK = Note("equivalent", "every rank writes its share, each in a file of its own")


class ParallelWriteConfig(DeepSpeedSection):
    """`checkpoint.parallel_write`."""

    pipeline_stage: Annotated[bool, _EVERY_RANK] = False


class WriterConfig(DeepSpeedSection):
    """`checkpoint.writer`."""

    type: Annotated[Literal["MOCK", "PYTHON", "FAST"], _WRITER] = "FAST"
    decoupled: Annotated[bool, Note("equivalent", "save_checkpoint(asynchronous=True) writes in the background")] = (
        False
    )
    io_buffer_size: Annotated[int, Field(ge=1), ByteSize(), _WRITER] = 64 * 2**20
    io_buffer_double: Annotated[bool, _WRITER] = True
    io_multiplier: Annotated[int, Field(ge=1), _WRITER] = 1
    show_statistics: Annotated[bool, _WRITER] = False
    data_parallel: Annotated[Literal["replica", "socket", "machine"] | None, _EVERY_RANK] = None

    @field_validator("type", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class CheckpointConfig(DeepSpeedSection):
    """`checkpoint`: nothing in it has to be chosen here."""

    tag_validation: Annotated[
        Literal["Ignore", "Warn", "Fail"], Note("equivalent", "tags that differ between ranks are an error")
    ] = "Warn"
    load_universal: Annotated[
        bool, Note("equivalent", "every checkpoint loads at any stage and world size, without a conversion")
    ] = False
    use_node_local_storage: Annotated[bool, Later("all ranks save into one folder, which all see", False)] = False
    parallel_write: ParallelWriteConfig | None = None
    checkpoint_serialization: Annotated[bool, Note("harmless", "there is no pickle to choose a form of")] = True
    writer: WriterConfig | None = None

    @field_validator("tag_validation", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.capitalize() if isinstance(value, str) else value
