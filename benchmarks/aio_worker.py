"""One side of the `aio` benchmark in a process of its own, so that buffers and set-up are not timed.

    python aio_worker.py zs | deepspeed NBYTES

Answers each line on stdin, a JSON object {"op", "path", "memory", ...}, by {"seconds", "cpu"} on stdout. `cpu`: seconds
of this process, the kernel's work for it and its io-wq threads included. Runs in DeepSpeed's environment too: nothing
but what the side needs is imported.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from time import perf_counter
from typing import Any


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def fill(view: memoryview) -> None:
    """With bytes that do not compress."""
    piece = 64 << 20
    for start in range(0, view.nbytes, piece):
        part = view[start : start + piece]
        part[:] = os.urandom(part.nbytes)


class Zs:
    """Engines by their setting; (None, None) is the default."""

    def __init__(self, nbytes: int) -> None:
        import zs_offload_aio as zs

        self._zs = zs
        self._engines: dict[tuple[Any, ...], zs.Engine] = {}
        self._files: dict[tuple[Any, ...], zs.File] = {}
        self._pool = zs.Pool()
        self._memory: dict[str, Any] = {"pinned": self._pool.buffer(nbytes)}
        fill(self._memory["pinned"])

    def run(self, op: str, path: str, memory: str, chunk: int | None, depth: int | None, **options: Any) -> Any:
        key = (chunk, depth, options.get("backend"))
        if key not in self._engines:
            self._engines[key] = self._zs.Engine(chunk_nbytes=chunk, depth=depth, backend=key[2])
        engine, buffer = self._engines[key], self._buffer(memory)
        if op == "calibration":
            return engine.stats()["calibration"]
        if op == "stats":
            return {"backend": engine.backend, **engine.stats()}
        half, small = len(self._memory["pinned"]) // 2, 64 << 10
        tickets: list[Any] = []
        with engine.open(path, "r+") as file:
            before, began = cpu_seconds(), perf_counter()
            if op == "read":
                file.read(buffer).wait()
            elif op in ("write", "first"):
                file.write(buffer).wait()
                if op == "first":
                    file.flush("data")
            elif op == "mixed":
                tickets = [file.read(buffer[:half], 0), file.write(buffer[half:], half)]
                for ticket in tickets:
                    ticket.wait()
            else:  # batches of 1000 requests, each waited for as a whole
                for first in range(0, len(buffer) // small - 999, 1000):
                    places = [small * (first + i) for i in range(1000)]
                    if op == "small read":
                        tickets = [file.read(buffer[at : at + small], at) for at in places]
                    else:
                        tickets = [file.write(buffer[at : at + small], at) for at in places]
                    for ticket in reversed(tickets):  # the last one first: this thread is woken once, not 1000 times
                        ticket.wait()
            seconds, cpu = perf_counter() - began, cpu_seconds() - before
        return {"seconds": seconds, "cpu": cpu}

    def _buffer(self, memory: str) -> Any:
        if memory not in self._memory:
            import torch

            tensor = torch.empty(len(self._memory["pinned"]), dtype=torch.uint8)
            tensor.copy_(torch.frombuffer(self._memory["pinned"], dtype=torch.uint8))
            self._memory[memory] = tensor
        return self._memory[memory]


class DeepSpeed:
    """Handles by their setting: block size, queue depth, single_submit, overlap_events, intra_op_parallelism."""

    def __init__(self, nbytes: int) -> None:
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder

        self._make = AsyncIOBuilder().load().aio_handle
        self._handles: dict[tuple[Any, ...], Any] = {}
        self._torch, self._nbytes = torch, nbytes
        self._memory: dict[str, Any] = {}

    def run(self, op: str, path: str, memory: str, setting: list[Any]) -> Any:
        key = tuple(setting)
        if key not in self._handles:
            self._handles[key] = self._make(*key)
        handle, tensor = self._handles[key], self._tensor(memory, self._handles[key])
        before, began = cpu_seconds(), perf_counter()
        moved = (handle.sync_pread if op == "read" else handle.sync_pwrite)(tensor, path, 0)
        seconds, cpu = perf_counter() - began, cpu_seconds() - before
        if moved != 1:
            raise RuntimeError(f"{op} of {path} returned {moved}")
        return {"seconds": seconds, "cpu": cpu}

    def _tensor(self, memory: str, handle: Any) -> Any:
        if memory not in self._memory:
            empty = self._torch.empty(0, dtype=self._torch.uint8)
            if memory == "pinned":
                tensor = handle.new_cpu_locked_tensor(self._nbytes, empty)
            else:
                tensor = self._torch.empty(self._nbytes, dtype=self._torch.uint8)
            tensor.random_(0, 256)
            self._memory[memory] = tensor
        return self._memory[memory]


def main() -> None:
    side, nbytes = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    try:
        worker: Any = {"zs": Zs, "deepspeed": DeepSpeed}[side](nbytes)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}), file=answers, flush=True)
        return
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = worker.run(**json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
