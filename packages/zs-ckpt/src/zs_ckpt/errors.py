"""What can be wrong with a checkpoint. Each error names the file and, where there is one, the tensor."""

from __future__ import annotations

from typing import Any

from zs_comm import ZsError


class _AboutFile(ZsError):
    """A message with the file and the tensor that it is about."""

    def __init__(self, message: str, file: object = None, tensor: str | None = None) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        super().__init__(message)

    def __str__(self) -> str:
        where = [] if self.file is None else [self.file]
        if self.tensor is not None:
            where.append(f"tensor {self.tensor!r}")
        return f"{', '.join(where)}: {self.message}" if where else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.file, self.tensor)


class CheckpointCorrupt(_AboutFile, ValueError):
    """The bytes are not those that were written, or not those of a checkpoint: file, tensor, expected and found."""


class UnknownVersion(CheckpointCorrupt):
    """The format's version is one that this package does not read."""


class CheckpointIncomplete(_AboutFile, FileNotFoundError):
    """There is no committed checkpoint where one was asked for, or a file of one is missing."""


class CheckpointBusy(_AboutFile, RuntimeError):
    """Another process is saving to the same tag."""
