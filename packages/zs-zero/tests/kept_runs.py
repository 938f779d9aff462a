"""Training in bf16 with every choice of dtypes, by zs_zero and written out by hand in one process, on the same data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import zs_zero
from torch import Tensor, nn
from torch.nn import functional as F
from zs_comm import Group, Mesh
from zs_zero.rounding import stochastically

F32, B16 = torch.float32, torch.bfloat16
State = dict[str, Tensor]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1)


@dataclass(frozen=True, kw_only=True)
class How:
    """`master`, `state`, `accum`, `wire`, `update`: as `zs_zero.shard` has them; None is its default."""

    dtype: torch.dtype = B16
    master: torch.dtype | None = None
    state: torch.dtype | None = None
    accum: torch.dtype | None = None
    wire: torch.dtype | None = None
    update: str = "plain"
    seed: int = 3
    micros: int = 1
    steps: int = 8
    local: bool = False  # all micro-steps but the last under no_sync
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw

    @property
    def options(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "master_dtype": self.master,
            "state_dtype": self.state,
            "grad_accum_dtype": self.accum,
            "reduce_dtype": self.wire,
            "bf16_update": self.update,
            "seed": self.seed,
        }


@dataclass
class Run:
    params: State = field(default_factory=dict)  # exact values, fp32
    model: State = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


class Net(nn.Module):
    """A parameter of no dim, sizes that divide by nothing, one that is not used in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 33), nn.Linear(33, 5, bias=False)
        self.sometimes = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, sometimes: bool) -> Tensor:
        x = self.second(torch.tanh(self.first(x)) * self.scale)
        return self.sometimes(x) if sometimes else x


def make() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def loss_of(model: nn.Module, how: How, step: int, micro: int, rank: int) -> Tensor:
    source = torch.Generator().manual_seed((step * 16 + micro) * 16 + rank)
    x, y = torch.randn(4, 7, generator=source).to(how.dtype), torch.randn(4, 5, generator=source)
    return F.mse_loss(model(x, step % 3 != 1).float(), y) / how.micros


class Training:
    """A sharded model that may be stopped and gone on with at any micro-step."""

    def __init__(self, group: Group | Mesh | None, how: How, *, stage: int, **options: Any) -> None:
        self.how, self.rank = how, group.group("dp").rank if isinstance(group, Mesh) else group.rank if group else 0
        self.model = make()
        client = how.optimizer(self.model.parameters())
        options = {"units": (nn.Linear,)} | how.options | options
        self.optimizer = zs_zero.shard(self.model, client, stage=stage, mesh=group, **options)
        self.losses: list[float] = []

    def micro(self, step: int, micro: int) -> None:
        loss = loss_of(self.model, self.how, step, micro, self.rank)
        if self.how.local and micro < self.how.micros - 1:
            with self.optimizer.no_sync():
                loss.backward()
        else:
            loss.backward()
        self.losses.append(loss.item())

    def steps(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            for micro in range(self.how.micros):
                self.micro(step, micro)
            self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def result(self) -> Run:
        params = {name: self.optimizer.full_param(param) for name, param in self.model.named_parameters()}
        return Run(params, dict(zs_zero.full_state_dict(self.model)), self.losses)


def train(group: Group | Mesh | None, how: How, *, stage: int = 0, **options: Any) -> Run:
    training = Training(group, how, stage=stage, **options)
    training.steps(0, how.steps)
    return training.result()


# -- by hand -----------------------------------------------------------------------------------------------------------


def nearest(values: Tensor) -> Tensor:
    """fp32 to bf16 in integers: half a step is added to the digits that stay."""
    return _from_digits(values, lambda digits: digits + 0x7FFF + ((digits >> 16) & 1))


def nearest_away(values: Tensor) -> Tensor:
    """As `nearest`, but a value in the middle goes away from 0."""
    return _from_digits(values, lambda digits: digits + 0x8000)


def _from_digits(values: Tensor, change: Callable[[Any], Any]) -> Tensor:
    digits = change(values.reshape(-1).numpy().view(np.uint32).astype(np.uint64))
    return torch.from_numpy((digits >> 16).astype(np.uint16).view(np.int16)).view(B16).view(values.shape)


class Weight:
    """One parameter, its states, and how an update gets into them."""

    def __init__(self, name: str, value: Tensor, how: How) -> None:
        self.name, self.how = name, how
        masters = how.update == "plain" and (how.master or F32) == F32
        kept = how.update == "kahan" or masters  # digits beyond those of the model
        self.exact = value.detach().float() if kept else value.detach().to(how.dtype).float()
        self.rounds = not masters
        self.state_dtype = how.state or (F32 if masters else B16)
        self.wide = how.update != "plain" or self.state_dtype != (F32 if masters else B16)
        self.param = nn.Parameter(self.exact.clone() if self.wide or masters else self.exact.to(B16))
        self.optimizer = how.optimizer([self.param])
        self.updates = 0

    def step(self, grad: Tensor | None, updates: int) -> None:
        if grad is None:
            return
        narrow = self.state_dtype == B16 and self.param.dim()  # a state of no dim may be a counter, and stays as it is
        if self.wide:
            self.param.data = self.exact.clone()
            for key, value in self.optimizer.state[self.param].items():
                if key != "step":
                    self.optimizer.state[self.param][key] = value.float()
        self.param.grad = grad.to(self.param.dtype)
        self.optimizer.step()
        if not self.wide:
            self.exact = self.param.detach().float()
            return
        self._keep(f"{self.how.seed}\0{updates}\0{self.name}\0", self.param.detach())
        if narrow:
            for key, value in self.optimizer.state[self.param].items():
                if key != "step":
                    rounded = self._rounded(f"{self.how.seed}\0{updates}\0{self.name}\0{key}", value)
                    self.optimizer.state[self.param][key] = rounded

    def _keep(self, key: str, value: Tensor) -> None:
        if self.rounds and self.how.update != "kahan":
            self.exact = self._rounded(key, value).float()
        else:
            self.exact = value.clone()

    @property
    def model(self) -> Tensor:
        return nearest_away(self.exact) if self.how.update == "kahan" else self.exact.to(self.how.dtype)

    def _rounded(self, key: str, value: Tensor) -> Tensor:
        if self.how.update == "stochastic_rounding":
            return stochastically(value.reshape(-1), key=key).view(value.shape)
        return nearest(value)


def by_hand(how: How, *, world: int, stage: int) -> Run:
    model = make()
    weights = {name: Weight(name, param, how) for name, param in model.named_parameters()}
    accum, wire = how.accum or how.dtype, how.wire or how.dtype
    container = F32 if weights["scale"].exact.dtype == F32 and not weights["scale"].rounds else accum
    losses = []
    for step in range(how.steps):
        grads: list[list[dict[str, Tensor | None]]] = []
        for rank in range(world):
            grads.append([])
            for micro in range(how.micros):
                for name, param in model.named_parameters():
                    param.data = weights[name].model
                model.zero_grad()
                loss = loss_of(model, how, step, micro, rank)
                loss.backward()
                grads[-1].append({name: param.grad for name, param in model.named_parameters()})
                if rank == 0:
                    losses.append(loss.item())
        for name, weight in weights.items():
            mine = [[micro[name] for micro in rank] for rank in grads]
            if mine[0][0] is None:
                weight.step(None, step + 1)
                continue
            if world == 1 or stage < 2 or how.local:
                total = [_added(rank, accum, accum) for rank in mine]
                grad = total[0] if world == 1 else _mean(total, wire)
                grad = grad.to(container)
            else:
                means = [_mean([rank[micro] for rank in mine], wire) for micro in range(how.micros)]
                grad = _added(means, container, accum)
            weight.step(grad, step + 1)
    params = {name: weight.exact for name, weight in weights.items()}
    return Run(params, {name: weight.model for name, weight in weights.items()}, losses)


def _added(parts: list[Any], container: torch.dtype, accum: torch.dtype) -> Tensor:
    total: Tensor = parts[0].to(container)
    for part in parts[1:]:
        total = (total.float() + part.float()).to(accum).to(container)
    return total


def _mean(parts: list[Any], wire: torch.dtype) -> Tensor:
    total = parts[0].to(wire).float()
    for part in parts[1:]:
        total = total + part.to(wire).float()
    return (total * (1.0 / len(parts))).to(wire)


def differences(label: str, got: Run, wanted: Run) -> list[str]:
    """What is not equal bit for bit, one line each."""
    lines = [] if got.losses == wanted.losses else [f"{label}: losses {got.losses} != {wanted.losses}"]
    for what, here, there in (("parameter", got.params, wanted.params), ("model's", got.model, wanted.model)):
        for name, value in there.items():
            if here[name].dtype != value.dtype:
                lines.append(f"{label}: {what} {name}: {here[name].dtype} != {value.dtype}")
            elif not torch.equal(here[name], value):
                error = (here[name].double() - value.double()).abs().max().item()
                lines.append(f"{label}: {what} {name}: {int((here[name] != value).sum())} differ, up to {error:.1e}")
    return lines


def varied(how: How, **options: Any) -> How:
    return replace(how, **options)
