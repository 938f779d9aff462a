"""Copies of tensors in host memory that is used again for the next ones."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .shardfile import Part
from .threads import in_threads

_ALIGNMENT = 64
_LARGE_NBYTES = 64 << 20


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
        copies: list[Part] = []

        def describe() -> None:
            for part, offset in zip(parts, offsets, strict=True):
                memory = self._memory[offset : offset + part.nbytes].view(part.spec.dtype)
                copies.append(Part(part.spec, part.box, memory, part.rank))

        if size >= _LARGE_NBYTES and all(part.data.device.type == "cpu" for part in parts):
            self._copy_from_host(parts, offsets, describe)
            return copies
        describe()
        for copied, part in zip(copies, parts, strict=True):
            copied.data.copy_(part.data.reshape(-1), non_blocking=True)
        wait_for_devices(part.data for part in parts)
        return copies

    def _copy_from_host(self, parts: Sequence[Part], offsets: Sequence[int], meanwhile: Callable[[], None]) -> None:
        """With two threads, as one processor alone does not fill the memory's bandwidth."""
        base, waiting, lock = self._memory.data_ptr(), iter(zip(parts, offsets, strict=True)), threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    part, offset = next(waiting, (None, 0))
                if part is None:
                    return
                # lets other threads run, and takes none of torch's
                ctypes.memmove(base + offset, part.data.data_ptr(), part.nbytes)

        in_threads(work, 2, "zs-ckpt copy", meanwhile=meanwhile)


def wait_for_devices(tensors: Iterable[Tensor]) -> None:
    """Return when the devices of these tensors have done what they were told so far, on whatever stream."""
    for device in {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}:
        torch.accelerator.synchronize(device)
