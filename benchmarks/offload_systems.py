"""The ways to take a step that `offload` compares: in memory, with the optimizer on the host, with it in files.

A builder takes a `Task` and returns a step and what the system itself reports of the last one. On a CPU machine host
memory is the device, so "cpu" moves nothing: it should cost nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from systems import Step
from torch import Tensor
from workload import ADAMW, DTYPES, Workload

Report = Callable[[], dict[str, Any]]
SYSTEM = re.compile(r"(torch|torch-masters|zs[0-3]|ds[0-3])(?:-(cpu|nvme|nvme-early|nvme-all))?$")
DESCRIPTIONS = {
    "torch": "torch, in memory, fused AdamW (bf16: autocast)",
    "torch-masters": "torch, in memory, fused AdamW on fp32 masters of a bf16 model",
}
PLACES = {None: "in memory", "cpu": "optimizer on the host", "nvme": "optimizer in files"}
PLACES["nvme-early"] = "optimizer in files, updates begin in backward"
PLACES["nvme-all"] = "optimizer and parameters in files"
SUB_GROUP = 20_000_000  # elements; DeepSpeed's buffers follow from it


@dataclass(frozen=True)
class Task(Workload):
    """A `Workload` and where its files go."""

    folder: str = "."


def describe(system: str) -> str:
    if system in DESCRIPTIONS:
        return DESCRIPTIONS[system]
    family, place = parse(system)
    name = "zs" if family.startswith("zs") else "DeepSpeed"
    return f"{name} stage {family[2:]}, {PLACES[place]}"


def parse(system: str) -> tuple[str, str | None]:
    """`zs3-nvme` -> ("zs3", "nvme")."""
    found = SYSTEM.match(system)
    if found is None:
        raise SystemExit(f"unknown system {system!r}: torch, torch-masters, zs0 ... zs3 or ds0 ... ds3, -cpu, -nvme")
    return found[1], found[2]


def build(task: Task) -> tuple[Step, Report]:
    family, place = parse(task.system)
    if family == "torch":
        return _torch(task)
    if family == "torch-masters":
        return _torch_masters(task)
    return (_zs if family.startswith("zs") else _deepspeed)(task, int(family[2:]), place)


def _nothing() -> dict[str, Any]:
    return {}


def _torch(task: Task) -> tuple[Step, Report]:
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=task.dtype == "bf16"):
            loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, _nothing


def _torch_masters(task: Task) -> tuple[Step, Report]:
    """What ZeRO computes in bf16, by hand: gradients are widened one by one, so that no second set of them stands."""
    model = task.model()
    masters = [param.detach().clone().requires_grad_() for param in model.parameters()]
    model.to(DTYPES[task.dtype])
    optimizer = torch.optim.AdamW(masters, fused=True, **ADAMW)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss = model(ids, targets)
        loss.backward()
        for param, master in zip(model.parameters(), masters, strict=True):
            if param.grad is not None:
                master.grad, param.grad = param.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for param, master in zip(model.parameters(), masters, strict=True):
                param.copy_(master)
        return loss.detach()

    return step, _nothing


def _zs(task: Task, stage: int, place: str | None) -> tuple[Step, Report]:
    import zs_comm
    import zs_zero

    zs_comm.init_distributed()
    model = task.model()
    adamw = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    options: dict[str, Any] = {}
    if place == "cpu":
        options["offload_optimizer"] = {"device": "cpu"}
    elif place is not None:
        files = {"device": "nvme", "nvme_path": task.folder}
        # Everything leaves: with memory to spare the default would keep some of it, and the disk be measured less.
        options |= {"offload_optimizer": {**files, "zs_max_in_cpu": 0}, "aio": {"zs_store": "aio"}}
        if place == "nvme-all":
            options["offload_param"] = {**files, "max_in_cpu": 0}
        if place == "nvme-early":
            options["offload_optimizer"]["zs_early_update"] = True
    half = torch.bfloat16 if task.dtype == "bf16" else None
    optimizer = zs_zero.shard(model, adamw, stage=stage, dtype=half, **options)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        detached: Tensor = loss.detach()
        return detached

    def report() -> dict[str, Any]:
        if place is None:
            return {}
        found = optimizer.offload_report()
        names = ("read", "written", "expected_read", "expected_written", "planned", "stall_s", "step_s", "overlap")
        return {name: getattr(found, name) for name in (*names, "store", "resident", "peak_nbytes")}

    return step, report


def _deepspeed(task: Task, stage: int, place: str | None) -> tuple[Step, Report]:
    """Its own settings as far as it runs with them; buffers that hold one sub-group of this model."""
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")  # ninja, for its ops
    import deepspeed

    deepspeed.init_distributed("gloo")
    zero: dict[str, Any] = {
        "stage": stage,
        "sub_group_size": SUB_GROUP,
        "reduce_bucket_size": SUB_GROUP,
        "stage3_prefetch_bucket_size": SUB_GROUP,
        "stage3_max_live_parameters": SUB_GROUP,
        "stage3_param_persistence_threshold": 10_000,
    }
    files = {"device": "nvme", "nvme_path": task.folder, "pin_memory": False}
    if place == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    elif place is not None:
        zero["offload_optimizer"] = {**files, "buffer_count": 4}
        if place == "nvme-all":  # its default of 5 buffers fails an assertion with this model
            zero["offload_param"] = {**files, "buffer_count": 60, "buffer_size": 30_000_000, "max_in_cpu": 0}
    config = task.engine_config(stage) | {"zero_optimization": zero}
    config["aio"] = {"block_size": 1 << 20, "queue_depth": 32, "intra_op_parallelism": 1, "single_submit": False}
    config["aio"]["overlap_events"] = True
    model = task.model()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = engine(ids, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, _nothing
