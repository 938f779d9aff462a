"""A model that exists on the meta device only until it is sharded, and its training in a process with a memory limit.

    python tier_models.py '{"folder": null, ...}'      trains and prints one line of JSON: see `Task` and `run`

Every module has `reset_parameters`, so that `zs_zero.shard` builds it unit by unit. Most units are of one size; the
embedding is larger, so that nothing can depend on the largest by accident.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zs_comm
import zs_zero
from torch import Tensor, nn
from torch.nn import functional as F
from zs_comm.testing.limits import Kind, limited
from zs_comm.views import bytes_of

TOKENS = 16
CLASSES = 32
STATE_NBYTES = 16  # of an fp32 element: itself, its gradient, Adam's two moments


@dataclass(frozen=True)
class Task:
    """One run; plain values, because it travels to a process of its own."""

    layers: int = 32
    width: int = 512
    vocab: int = 15_200
    folder: str | None = None  # None: everything in memory, no limit
    limit: int | None = None  # bytes above what the process has once everything is imported
    kind: Kind | None = None  # how it is enforced; None: as strictly as this machine can
    slack: int = 0  # bytes that are enforced less strictly: stacks of threads count where mapped memory does
    store: str = "auto"
    steps: int = 3
    max_norm: float = 0.1  # below any norm here: every step is clipped


class Block(nn.Module):
    """Norm and a feed-forward layer, with a residual: (1, TOKENS, width) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Model(nn.Module):
    """Ids (1, TOKENS) -> logits (1, TOKENS, CLASSES)."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.embed = nn.Embedding(task.vocab, task.width)
        self.blocks = nn.ModuleList(Block(task.width) for _ in range(task.layers))
        self.head = nn.Linear(task.width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def numel(task: Task) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in Model(task).parameters())


def tokens(task: Task, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(task.vocab, (1, TOKENS), generator=generator)
    return ids, ids % CLASSES


def weights_hash(model: nn.Module) -> str:
    """Of every parameter, whole, one unit in memory at a time."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        with zs_zero.gathered([param]), torch.no_grad():
            value = param.detach().contiguous()
            digest.update(name.encode())
            digest.update(bytes_of(value))
    return digest.hexdigest()


def storage_nbytes() -> tuple[int, int]:
    """What this process has read from and written to disks so far; the page cache does not count."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def options_of(task: Task) -> dict[str, Any]:
    """The keywords of `zs_zero.shard`."""
    if task.folder is None:
        return {}
    files = {"device": "nvme", "nvme_path": task.folder}
    return {
        "offload_optimizer": files,
        "offload_param": {**files, "max_in_cpu": 0},
        "aio": {"zs_store": task.store},
        **({"host_memory_limit": task.limit} if task.limit is not None else {}),
    }


def train(task: Task, *, after_step: Callable[[], None]) -> dict[str, Any]:
    """Builds the model, trains it, and gives the hash of its weights and what the report says."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(task)
    client = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = zs_zero.shard(
        model, client, stage=3, units=[nn.Embedding, Block, nn.Linear], device="cpu", **options_of(task)
    )
    losses = []
    for step in range(task.steps):
        ids, targets = tokens(task, step)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.clip_grad_norm_(task.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after_step()
    result: dict[str, Any] = {"losses": losses, "hash": weights_hash(model)}
    if task.folder is not None:
        report = optimizer.offload_report()
        names = ("planned", "limit", "peak_nbytes", "steps", "read", "written", "expected_read", "expected_written")
        result |= {name: getattr(report, name) for name in (*names, "store", "resident")}
        result["table"] = str(report)
    optimizer.close(parameters=False)
    return result


def run(task: Task) -> dict[str, Any]:
    """`train` within the limit, and what was measured from outside: peaks, storage traffic of the last step."""
    storage: list[tuple[int, int]] = []
    with torch.device("meta"):  # what torch imports at the first use of these is not the training's
        warm = nn.Linear(2, 2)
    torch.optim.AdamW(warm.parameters())
    nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    gc.collect()
    context: Any = contextlib.nullcontext()
    if task.limit is not None:
        context = limited(task.limit + task.slack, kind=task.kind)
    began = time.monotonic()
    with context as memory:
        result = train(task, after_step=lambda: storage.append(storage_nbytes()))
    result["seconds"] = time.monotonic() - began
    if len(storage) > 1:
        result["storage"] = [after - before for after, before in zip(storage[-1], storage[-2], strict=True)]
    if memory is not None:
        result |= {"kind": memory.kind, "peak": memory.peak_nbytes, "peak_resident": memory.peak_resident_nbytes}
    return result


def main(arguments: Iterator[str]) -> None:
    zs_comm.init_distributed()
    try:
        print(json.dumps(run(Task(**json.loads(next(arguments))))))
    finally:
        zs_comm.shutdown()


if __name__ == "__main__":
    main(iter(sys.argv[1:]))
