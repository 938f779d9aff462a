"""The sides of the `ckpt` benchmark: raw files, zs, and the other ways to save the same tensors.

Every save goes into a folder that is empty, and ends when its bytes are on the disk: who does not sync is synced here.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

State = dict[str, dict[str, Tensor]]
CHUNK = 8 << 20
WORKER = Path(__file__).resolve().parent / "ckpt_worker.py"


class Unavailable(Exception):
    """This side cannot be measured here; the text is the reason."""


def make_state(nbytes: int, layers: int = 24) -> State:
    """Parameters and two moments in fp32, in tensors of a transformer's shapes; bytes that do not compress."""
    width = int((nbytes / 12 / layers / 12) ** 0.5) // 16 * 16
    shapes = {
        "attention.weight": (4 * width, width),
        "up.weight": (4 * width, width),
        "down.weight": (width, 4 * width),
    }
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for part in ("model", "exp_avg", "exp_avg_sq"):
        state[part] = {
            f"layers.{layer}.{name}": torch.randn(shape, generator=generator)
            for layer in range(layers)
            for name, shape in shapes.items()
        }
    return state


def tensors_of(state: State) -> Iterator[Tensor]:
    for part in state.values():
        yield from part.values()


def nbytes_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(state))


def sync(folder: Path) -> None:
    """Every file and folder in it, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sync(folder)
    os.sync()


class Raw:
    """Direct reads and writes by a few threads, in chunks, of a file whose space was taken before."""

    def __init__(self, state: State, threads: int = 4) -> None:
        self.nbytes, self.threads = nbytes_of(state), threads
        self._memory = mmap.mmap(-1, -(-self.nbytes // CHUNK) * CHUNK)
        with suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._view, at = memoryview(self._memory), 0
        for tensor in tensors_of(state):  # the same bytes
            place = torch.frombuffer(self._memory, dtype=torch.uint8, count=tensor.nbytes, offset=at)
            place.copy_(tensor.reshape(-1).view(torch.uint8))
            at += tensor.nbytes

    def save(self, folder: Path) -> float:
        empty(folder)
        began = perf_counter()
        fd = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(fd, 0, len(self._memory))
            self._each(lambda at: os.pwrite(fd, self._view[at : at + CHUNK], at))
            os.ftruncate(fd, self.nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        return perf_counter() - began

    def load(self, folder: Path) -> float:
        began = perf_counter()
        fd = os.open(folder / "raw", os.O_RDONLY | os.O_DIRECT)
        try:
            self._each(lambda at: os.preadv(fd, [self._view[at : at + CHUNK]], at))
        finally:
            os.close(fd)
        return perf_counter() - began

    def _each(self, work: Any) -> None:
        with ThreadPoolExecutor(self.threads) as pool:
            for moved in pool.map(work, range(0, len(self._memory), CHUNK)):
                if not moved:
                    raise OSError("a raw operation moved nothing")


class Zs:
    def __init__(self, state: State, io: str) -> None:
        import zs_ckpt

        self._zs, self.state, self.io = zs_ckpt, state, io

    def save(self, folder: Path) -> float:
        empty(folder)
        began = perf_counter()
        self._zs.save(folder, self.state, io=self.io)
        return perf_counter() - began

    def load(self, folder: Path) -> float:
        began = perf_counter()
        self._zs.load(folder, self.state, io=self.io)
        return perf_counter() - began


class TorchSave:
    def __init__(self, state: State) -> None:
        self.state = state

    def save(self, folder: Path) -> float:
        empty(folder)
        began = perf_counter()
        torch.save(self.state, folder / "checkpoint.pt")
        sync(folder)
        return perf_counter() - began


class Safetensors:
    def __init__(self, state: State) -> None:
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise Unavailable(str(error)) from error
        self._save_file = save_file
        self._flat = {f"{part}.{name}": tensor for part, found in state.items() for name, tensor in found.items()}

    def save(self, folder: Path) -> float:
        empty(folder)
        began = perf_counter()
        self._save_file(self._flat, str(folder / "checkpoint.safetensors"))
        sync(folder)
        return perf_counter() - began


class Dcp:
    """`torch.distributed.checkpoint.save`, which syncs by itself."""

    def __init__(self, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        self._dcp, self.state = dcp, state

    def save(self, folder: Path) -> float:
        empty(folder)
        began = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._dcp.save(self.state, checkpoint_id=str(folder / "dcp"), no_dist=True)
        sync(folder)
        return perf_counter() - began


class DeepSpeed:
    """`engine.save_checkpoint` of a model with the same parameters and Adam's moments, in a process of its own."""

    def __init__(self, state: State, python: str) -> None:
        if not python:
            raise Unavailable("no --deepspeed-python")
        shapes = {name: list(tensor.shape) for name, tensor in state["model"].items()}
        environment = {**os.environ, "PATH": f"{os.path.dirname(python)}:{os.environ.get('PATH', '')}"}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [python, str(WORKER)],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._ask(shapes)

    def save(self, folder: Path) -> float:
        empty(folder)
        return float(self._ask({"folder": str(folder)})["seconds"])

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, question: Any) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise Unavailable("the worker has no pipes")
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise Unavailable(f"DeepSpeed: {said[-1][:300] if said else 'no output'}")
        return json.loads(line)
