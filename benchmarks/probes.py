"""What is measured from outside the code under test: time, memory, bytes that the kernel carried."""

from __future__ import annotations

import gc
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

PROC_STATUS = Path("/proc/self/status")
PROC_NET = Path("/proc/net/dev")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read next has the work in it."""
    if device == "cuda":
        torch.cuda.synchronize()


def resident_nbytes(key: str = "VmRSS") -> int:
    """Resident memory of this process; key "VmHWM" is its peak."""
    for line in PROC_STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def reset_resident_peak() -> None:
    with suppress(OSError):  # some containers forbid it; the peak then includes the imports
        Path("/proc/self/clear_refs").write_text("5")


def loopback_nbytes() -> int:
    """Bytes that the loopback interface has received since boot, headers included."""
    for line in PROC_NET.read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def storage_nbytes() -> tuple[int, int]:
    """Bytes that this process has read from disks and written to them; what the page cache served does not count."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def held_nbytes(device: str = "cpu") -> int:
    """Bytes of the distinct storages that Python tensors and their gradients reach."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    storages: dict[int, int] = {}
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    with torch._C.DisableTorchFunctionSubclass():  # a released parameter does not show its storage otherwise
        tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
        for tensor in tensors:
            local = getattr(tensor, "_local_tensor", tensor)  # FSDP2's DTensor holds its shard there
            if local.device.type == "cpu":
                storage = local.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass
class AllocationTrace:
    """Live bytes on the CPU over time, from every allocation and free between entering and leaving `trace`."""

    moments: list[tuple[float, int]] = field(default_factory=list)  # (microseconds, live bytes after the event)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (begin, end)

    def peak(self, span: str) -> int:
        """The most bytes alive at once within a `torch.profiler.record_function` span."""
        begin, end = self.spans[span]
        before = [live for at, live in self.moments if at < begin]
        within = [live for at, live in self.moments if begin <= at <= end]
        return max([*before[-1:], *within], default=0)


@contextmanager
def trace_allocations() -> Iterator[AllocationTrace]:
    """Fill an `AllocationTrace`. Begin before the first tensor: what was allocated earlier is not known to it."""
    result = AllocationTrace()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    live = 0
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    for event in sorted(memory, key=lambda e: float(e["ts"])):
        live += int(event["args"]["Bytes"])
        result.moments.append((float(event["ts"]), live))
    for event in events:
        if event.get("cat") == "user_annotation":
            result.spans[event["name"]] = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))


def hardware(device: str = "cpu") -> str:
    """One line that names the machine and the versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{model}, {cores} cores"]
    if device == "cuda":
        parts.insert(0, f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    load = f"load average at the start {os.getloadavg()[0]:.1f}"
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}", load])
