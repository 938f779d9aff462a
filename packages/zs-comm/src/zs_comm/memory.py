"""How much memory tensors take: now (`memory_summary`), and at the worst moment of a block (`StorageMeter`).

Bytes are counted by storage, each once, whatever number of tensors view it.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .resident import resident


@dataclass(frozen=True)
class MemorySummary:
    """Bytes, at one moment, of this process. A figure that the platform does not give is None."""

    rss_nbytes: int | None  # resident now
    peak_rss_nbytes: int | None  # most that was resident since the process started
    live: Mapping[torch.dtype, int]  # bytes of tensors on the host, by the dtype they were first met with
    device: str | None = None  # the CUDA device's name
    device_live: Mapping[torch.dtype, int] = field(default_factory=dict)
    device_allocated_nbytes: int | None = None
    device_peak_nbytes: int | None = None
    device_reserved_nbytes: int | None = None

    @property
    def live_nbytes(self) -> int:
        return sum(self.live.values())

    def __str__(self) -> str:
        rows = [("host resident", self.rss_nbytes), ("host peak", self.peak_rss_nbytes)]
        rows += _rows("host tensors", self.live)
        if self.device is not None:
            rows += [
                ("device allocated", self.device_allocated_nbytes),
                ("device peak", self.device_peak_nbytes),
                ("device reserved", self.device_reserved_nbytes),
                *_rows("device tensors", self.device_live),
            ]
        shown = [(name, "?" if nbytes is None else f"{nbytes / 2**20:,.1f}") for name, nbytes in rows]
        return "\n".join(f"{name:<28}{mib:>12} MiB" for name, mib in shown)


def memory_summary() -> MemorySummary:
    """Host and device memory of this process, and the bytes of the tensors that Python can reach."""
    rss, peak = _resident()
    host: Counter[torch.dtype] = Counter()
    device: Counter[torch.dtype] = Counter()
    for storage, dtype in _live_storages():
        (host if storage.device.type == "cpu" else device)[dtype] += storage.nbytes()
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return MemorySummary(rss, peak, dict(host), device_live=dict(device))
    return MemorySummary(
        rss,
        peak,
        dict(host),
        device=torch.cuda.get_device_name(),
        device_live=dict(device),
        device_allocated_nbytes=torch.cuda.memory_allocated(),
        device_peak_nbytes=torch.cuda.max_memory_allocated(),
        device_reserved_nbytes=torch.cuda.memory_reserved(),
    )


def live_tensor_nbytes(device_type: str = "cpu") -> int:
    """Bytes of the distinct storages behind every tensor that the garbage collector reaches, gradients included.

    What only an autograd graph holds (saved activations) is not reached: measure between steps.
    """
    return sum(storage.nbytes() for storage, _ in _live_storages() if storage.device.type == device_type)


class StorageMeter(TorchDispatchMode):
    """Counts every tensor storage that is allocated, resized or freed in a block, and keeps the peak.

        with StorageMeter() as meter:
            step()
        meter.peak_nbytes          # most bytes alive at once, those from before the block included

    Exact by events, not by sampling: a storage counts from the operator that returned it (autograd's own
    allocations pass here too) until its finaliser ran, which for the last reference is at once; a `resize_`
    counts when it is called. Not seen is scratch memory inside a single kernel, which no tensor outlives.
    (The CPU allocator's own profiling events would show that, but miss the release of whatever was
    allocated before the block.) Tensors that exist already are found through the garbage collector.

    Slow: several microseconds for each operator. One at a time, on the thread that runs the block.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.start_nbytes = 0  # alive when the block began
        self.now_nbytes = 0
        self.peak_nbytes = 0
        self.allocated_nbytes = 0  # in all, in the block; growth by resize_ included
        self.freed_nbytes = 0
        self._sizes: dict[int, int] = {}  # storage address -> bytes
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._undo: Callable[[], None] | None = None

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now, and new totals."""
        self.start_nbytes = self.peak_nbytes = self.now_nbytes
        self.allocated_nbytes = self.freed_nbytes = 0

    def __enter__(self) -> StorageMeter:
        for storage, _ in _live_storages():
            self._see(storage)
        self.reset_peak()
        self._undo = _watch_resizes(self._see)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._watches.clear()  # dropping a weak reference drops its callback: the counters stay as they are

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):  # arguments too: resize_, set_, memory made by no operator
            if isinstance(leaf, Tensor):
                storage = _storage(leaf)
                if storage is not None:
                    self._see(storage)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != self.device_type:
            return
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            self._watches[key] = weakref.ref(storage, lambda _: self._forget(key))
        if known != nbytes:
            self._sizes[key] = nbytes
            self._change(nbytes - (known or 0))

    def _forget(self, key: int) -> None:
        self._watches.pop(key, None)
        self._change(-self._sizes.pop(key, 0))

    def _change(self, nbytes: int) -> None:
        self.now_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.now_nbytes)
        if nbytes > 0:
            self.allocated_nbytes += nbytes
        else:
            self.freed_nbytes -= nbytes


def _watch_resizes(see: Callable[[torch.UntypedStorage], None]) -> Callable[[], None]:
    """Report every `UntypedStorage.resize_`, which is no operator; returns what ends it."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, nbytes: int) -> Any:
        result = original(storage, nbytes)
        see(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]

    def undo() -> None:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    return undo


def _live_storages() -> Iterator[tuple[torch.UntypedStorage, torch.dtype]]:
    """Each storage once, with the dtype of a tensor that views it. A gradient may have no Python object yet."""
    seen: set[int] = set()
    # By type(), because isinstance() asks proxies for __class__; each type once, because there are millions of objects.
    objects = gc.get_objects()
    tensor_types = {cls for cls in {type(found) for found in objects} if issubclass(cls, Tensor)}
    for found in objects:
        if type(found) not in tensor_types:
            continue
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [found]
            if found.is_leaf and found.grad is not None:
                tensors.append(found.grad)
            for tensor in tensors:
                storage = _storage(tensor)
                if storage is not None and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    yield storage, tensor.dtype


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        with torch._C.DisableTorchFunctionSubclass():  # a subclass may refuse to show its storage
            return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrapper subclasses have none
        return None


def _rows(name: str, live: Mapping[torch.dtype, int]) -> list[tuple[str, int | None]]:
    rows: list[tuple[str, int | None]] = [(name, sum(live.values()))]
    return rows + [(f"  {str(dtype).removeprefix('torch.')}", live[dtype]) for dtype in sorted(live, key=str)]


def _resident() -> tuple[int | None, int | None]:
    """(now, peak) bytes."""
    found = resident()
    if found is not None:
        return found.nbytes, found.peak_nbytes
    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None, peak if sys.platform == "darwin" else peak * 1024
    return None, None
