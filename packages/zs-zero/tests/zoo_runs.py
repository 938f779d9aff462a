"""Trains a `Case` of the zoo by plain torch, by DDP and by zs_zero, in one loop, and compares what came out."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import zs_zero
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from zoo import Block, Case, Micro, Named, TwoHeads
from zs_comm import Group

STEPS = 20


@dataclass
class Run:
    """One training: what must be the same however it was done."""

    losses: list[float] = field(default_factory=list)  # of every backward
    norms: list[float] = field(default_factory=list)  # of every step, when clipping
    grads: dict[str, Tensor | None] = field(default_factory=dict)  # before the first step, fp32, when asked for
    params: dict[str, Tensor] = field(default_factory=dict)  # at the end, fp32 (masters)
    state: dict[str, Tensor] = field(default_factory=dict)  # the model's state_dict at the end


@dataclass(frozen=True, kw_only=True)
class How:
    """What may vary for any case."""

    dtype: torch.dtype = torch.float32
    accumulate: int = 1
    clip: float | None = None
    grads: bool = False
    steps: int = STEPS


def _loop(
    case: Case,
    model: nn.Module,
    how: How,
    run: Run,
    *,
    rank: int,
    world: int,
    update: Callable[[int], None],
    local: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    for step in range(how.steps):
        for micro in range(how.accumulate):
            last = micro == how.accumulate - 1
            with contextlib.nullcontext() if last else local():
                losses = case.losses(model, Micro(step, micro, rank, world, how.dtype))
                for number, loss in enumerate(losses, start=1):
                    keep = case.make is TwoHeads and number < case.backwards
                    (loss / how.accumulate).backward(retain_graph=keep)
                    run.losses.append(loss.item())
        update(step)


def _new_model(case: Case, dtype: torch.dtype) -> nn.Module:
    """Buffers in the training dtype: torch's batch norm takes 16-bit weights with 16-bit running statistics only."""
    torch.manual_seed(0)
    model = case.make()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return model


class Averaging:
    """What DDP does, written out, for what DDP cannot run: means of local sums, over the ranks that are there."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.group = group

    def __call__(self) -> None:
        for param in self.params:
            used = torch.tensor([param.grad is not None], dtype=torch.int32)
            torch.distributed.all_reduce(used, group=self.group.process_group)
            if used.item():
                grad = torch.zeros_like(param) if param.grad is None else param.grad
                torch.distributed.all_reduce(grad, group=self.group.process_group)
                param.grad = grad / self.group.size


def train_plain(case: Case, how: How, group: Group | None = None) -> Run:
    """Plain torch: the loop everybody writes; on several ranks with DDP; in bf16 with fp32 masters on one rank."""
    run, model = Run(), _new_model(case, how.dtype)
    rank, world = (group.rank, group.size) if group else (0, 1)
    named: Named = dict(model.named_parameters())
    masters = {name: nn.Parameter(param.detach().clone(), param.requires_grad) for name, param in named.items()}
    low = how.dtype != torch.float32
    if low:
        for param in model.parameters():
            param.data = param.data.to(how.dtype)
    optimizer = case.optimizer(masters if low else named)
    wrapped, average = model, None
    if world > 1:
        if case.ddp is None:
            average = Averaging(model, group)
        else:
            wrapped = DistributedDataParallel(model, process_group=group.process_group, **case.ddp)

    def update(step: int) -> None:
        if average:
            average()
        if low:
            for name, param in named.items():
                masters[name].grad = None if param.grad is None else param.grad.float()
        trained = masters if low else named
        if how.grads and step == 0:
            run.grads = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
        if how.clip is not None:
            run.norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), how.clip).item())
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        if low:
            with torch.no_grad():
                for name, param in named.items():
                    param.copy_(masters[name])

    local = wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext
    _loop(case, wrapped, how, run, rank=rank, world=world, update=update, local=local)
    final = {name: masters[name] if low and param.requires_grad else param for name, param in named.items()}
    run.params = {name: param.detach().float().clone() for name, param in final.items()}
    run.state = {name: value.clone() for name, value in model.state_dict().items()}
    return run


def train_sharded(
    case: Case, how: How, group: Group | None = None, *, stage: int, mesh: Any = None, **options: Any
) -> Run:
    """zs_zero at one stage; the loop is the same but for the optimizer."""
    run, model = Run(), _new_model(case, how.dtype)
    options.setdefault("units", (Block,) if any(isinstance(m, Block) for m in model.modules()) else None)
    if how.dtype != torch.float32:
        options["dtype"] = how.dtype
    client = case.optimizer(dict(model.named_parameters()))
    optimizer = zs_zero.shard(model, client, stage=stage, mesh=group if mesh is None else mesh, **options)

    def update(step: int) -> None:
        if how.grads and step == 0:
            run.grads = {name: optimizer.full_grad(param) for name, param in model.named_parameters()}
        if how.clip is not None:
            run.norms.append(float(optimizer.clip_grad_norm_(how.clip)))
        optimizer.step()
        optimizer.zero_grad()

    rank, world = (group.rank, group.size) if group else (0, 1)
    _loop(case, model, how, run, rank=rank, world=world, update=update)
    run.params = {name: optimizer.full_param(param) for name, param in model.named_parameters()}
    run.state = {name: value.clone() for name, value in zs_zero.full_state_dict(model).items()}
    optimizer.close()
    return run


# -- comparing -------------------------------------------------------------------------------------------------------


def same(label: str, got: Run, wanted: Run) -> list[str]:
    """What is not bitwise equal, one line each, empty when nothing is."""
    lines = []
    if got.losses != wanted.losses:
        index = next(i for i, (a, b) in enumerate(zip(got.losses, wanted.losses, strict=True)) if a != b)
        first = f"{got.losses[index]!r} != {wanted.losses[index]!r}"
        lines.append(f"{label}: backward {index} of {len(got.losses)}: loss {first}")
    if got.norms != wanted.norms:
        index = next(i for i, (a, b) in enumerate(zip(got.norms, wanted.norms, strict=True)) if a != b)
        lines.append(f"{label}: step {index}: norm {got.norms[index]!r} != {wanted.norms[index]!r}")
    for what, here, there in (("parameter", got.params, wanted.params), ("state_dict", got.state, wanted.state)):
        if here.keys() != there.keys():
            lines.append(f"{label}: {what}: names {sorted(here.keys() ^ there.keys())} on one side only")
        for name in here.keys() & there.keys():
            a, b = here[name], there[name]
            if a.dtype != b.dtype or a.shape != b.shape:
                lines.append(f"{label}: {what} {name}: {a.dtype} {tuple(a.shape)} != {b.dtype} {tuple(b.shape)}")
            elif not torch.equal(a, b):
                error = (a.double() - b.double()).abs()
                differ = f"{int((a != b).sum())} of {a.numel()} differ, up to {error.max():.2e}"
                lines.append(f"{label}: {what} {name}: {differ}")
    return lines


def close(label: str, got: Run, wanted: Run, *, losses: float, params: float) -> list[str]:
    """What is further apart: losses relative to the wanted ones, parameters in absolute terms."""
    lines = []
    for index, (a, b) in enumerate(zip(got.losses, wanted.losses, strict=True)):
        if not abs(a - b) <= losses * abs(b):
            lines.append(f"{label}: backward {index}: loss {a!r}, {b!r}: {abs(a - b) / abs(b):.1e} apart")
            break
    for name, value in wanted.params.items():
        error = (got.params[name].double() - value.double()).abs().max().item()
        if not error <= params:
            lines.append(f"{label}: parameter {name}: {error:.1e} apart")
    return lines


def close_grads(label: str, got: Run, wanted: Run, *, bound: float) -> list[str]:
    """Gradients of the first step that are further apart than `bound` times the tensor's largest value."""
    lines = []
    for name, value in wanted.grads.items():
        found = got.grads[name]
        if (found is None) != (value is None):
            lines.append(f"{label}: gradient of {name}: {found} against {value}")
        elif found is not None and value is not None:
            error = ((found - value).abs().max() / value.abs().max().clamp_min(1e-30)).item()
            if not error <= bound:
                lines.append(f"{label}: gradient of {name}: {error:.1e} of its largest value apart")
    return lines
