"""The ways to take a training step that are compared: torch's, DeepSpeed's, zs's, and the floors below them all.

A builder takes a `Workload` and returns a step: (ids, targets) -> detached loss, or None where nothing is learned.
Each builder starts the process group in its own system's way. Imports are inside, so that a system can run where the
others are not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from itertools import count

import probes
import torch
import torch.distributed as dist
from torch import Tensor, nn
from workload import ADAMW, Workload

Step = Callable[[Tensor, Tensor], Tensor | None]
Builder = Callable[[Workload], Step]


def _start_torch(workload: Workload) -> None:
    dist.init_process_group("nccl" if workload.device == "cuda" else "gloo")


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, workload: Workload, *, autocast: bool) -> Step:
    def step(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(workload.device, torch.bfloat16, enabled=autocast and workload.dtype == "bf16"):
            loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def plain(workload: Workload) -> Step:
    """One process of plain torch; bf16 by autocast."""
    model = workload.model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return _plain_step(model, optimizer, workload, autocast=True)


def ddp(workload: Workload) -> Step:
    _start_torch(workload)
    model = torch.nn.parallel.DistributedDataParallel(workload.model())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return _plain_step(model, optimizer, workload, autocast=True)


def fsdp2(workload: Workload) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _start_torch(workload)
    mesh = init_device_mesh(workload.device, (probes.world(),))
    half = torch.bfloat16 if workload.dtype == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
    model = workload.model()
    for part in [*model.parts(), model]:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return _plain_step(model, optimizer, workload, autocast=False)


def _engine(package: str, stage: int) -> Builder:
    def build(workload: Workload) -> Step:
        engines = importlib.import_module(package)
        engines.init_distributed("gloo" if workload.device == "cpu" else None)
        model = workload.model()
        config = workload.engine_config(stage)
        engine = engines.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

        def step(ids: Tensor, targets: Tensor) -> Tensor:
            loss: Tensor = engine(ids, targets)
            engine.backward(loss)
            engine.step()
            return loss.detach()

        return step

    return build


def _a_la_carte(stage: int) -> Builder:
    """`zs_zero.shard` in the user's own loop; no engine, no JSON."""

    def build(workload: Workload) -> Step:
        import zs_comm
        import zs_zero

        zs_comm.init_distributed()
        model = workload.model()
        adamw = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
        half = torch.bfloat16 if workload.dtype == "bf16" else None
        optimizer = zs_zero.shard(model, adamw, stage=stage, dtype=half)
        return _plain_step(model, optimizer, workload, autocast=False)

    return build


def compute(workload: Workload) -> Step:
    """Forward and backward alone: no synchronisation, no optimizer; in bf16 the whole model is bf16."""
    _start_torch(workload)
    model = workload.model().to(workload.torch_dtype)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(ids, targets)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return step


def compute_autocast(workload: Workload) -> Step:
    """As `compute`, with fp32 weights under autocast, as DDP has them in bf16."""
    _start_torch(workload)
    model = workload.model()

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(workload.device, torch.bfloat16, enabled=workload.dtype == "bf16"):
            loss: Tensor = model(ids, targets)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return step


def _collectives(*, gathers: int) -> Builder:
    """What a step puts on the wire, one unit after the other, nothing else: `gathers` all-gathers, a reduce-scatter."""

    def build(workload: Workload) -> Step:
        import zs_comm

        group = zs_comm.init_distributed()
        flats = []
        for part in workload.model().parts():
            numel = sum(p.numel() for p in part.parameters())
            padded = -(-numel // group.size) * group.size
            flats.append(torch.zeros(padded, dtype=workload.torch_dtype, device=workload.device))

        def step(ids: Tensor, targets: Tensor) -> None:
            for _ in range(gathers):
                for flat in flats:
                    zs_comm.all_gather(flat, group)
            for flat in flats:
                zs_comm.reduce_scatter(flat, group)

        return step

    return build


def sharded_optimizer(workload: Workload) -> Step:
    """Fused AdamW over this rank's share of the fp32 elements."""
    _start_torch(workload)
    numel = -(-sum(p.numel() for p in workload.model().parameters()) // probes.world())
    shard = torch.zeros(numel, device=workload.device, requires_grad=True)
    shard.grad = torch.full_like(shard, 1e-3)
    optimizer = torch.optim.AdamW([shard], fused=True, **ADAMW)

    def step(ids: Tensor, targets: Tensor) -> None:
        optimizer.step()

    return step


SYSTEMS: dict[str, Builder] = {
    "torch": plain,
    "ddp": ddp,
    "fsdp2": fsdp2,
    **{f"ds{stage}": _engine("deepspeed", stage) for stage in range(4)},
    **{f"zs{stage}": _engine("zs_engine", stage) for stage in range(4)},
    **{f"zsz{stage}": _a_la_carte(stage) for stage in range(4)},
    "compute": compute,
    "compute-autocast": compute_autocast,
    "collectives": _collectives(gathers=1),
    "collectives3": _collectives(gathers=2),
    "optimizer": sharded_optimizer,
}

DESCRIPTIONS = {
    "torch": "plain torch, one process (bf16: autocast)",
    "ddp": "torch DDP (bf16: autocast)",
    "fsdp2": "torch FSDP2, reshard after forward (bf16: parameters and reduction)",
    **{f"ds{stage}": f"DeepSpeed stage {stage}" for stage in range(4)},
    **{f"zs{stage}": f"zs stage {stage}" for stage in range(4)},
    **{f"zsz{stage}": f"zs stage {stage}, à la carte" for stage in range(4)},
    "compute": "floor: forward + backward",
    "compute-autocast": "floor: forward + backward under autocast",
    "collectives": "floor: reduce-scatter + all-gather",
    "collectives3": "floor: reduce-scatter + 2 all-gathers",
    "optimizer": "floor: sharded AdamW",
}


def package_of(system: str) -> str | None:
    """The package that a system needs beside torch."""
    prefixes = {"ds": "deepspeed", "zsz": "zs_zero", "zs": "zs_engine", "collectives": "zs_comm"}
    return next((package for prefix, package in prefixes.items() if system.startswith(prefix)), None)


def data(workload: Workload, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The workload's batches for this rank, step by step."""
    return (workload.batch(step, rank) for step in count())
