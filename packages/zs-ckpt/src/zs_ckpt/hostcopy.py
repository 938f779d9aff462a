"""Copies of tensors in host memory that is used again for the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .shardfile import Part

_ALIGNMENT = 64


class HostBuffer:
    """One piece of host memory, as large as the largest state that was copied into it; pinned where there is CUDA."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """The same parts with their data in this buffer; valid until the next call.

        When it returns the tensors may change: copies from a device are waited for.
        """
        offsets, size = [], 0
        for part in parts:
            offsets.append(size)
            size += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._memory.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = []
        for part, offset in zip(parts, offsets, strict=True):
            source = part.data.reshape(-1)
            target = self._memory[offset : offset + part.nbytes].view(part.spec.dtype)
            target.copy_(source, non_blocking=True)
            copies.append(Part(part.spec, part.box, target, part.rank))
        wait_for_devices(part.data for part in parts)
        return copies


def wait_for_devices(tensors: Iterable[Tensor]) -> None:
    """Return when the devices of these tensors have done what they were told so far, on whatever stream."""
    for device in {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}:
        torch.accelerator.synchronize(device)
