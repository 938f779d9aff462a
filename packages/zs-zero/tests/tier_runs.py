"""Training with states, gradients and parameters in every tier, and in memory: what has to be the same, bit for bit.

One model has most of what can go wrong with blocks: sizes that divide by nothing, parameters of one element, of no dim
and of none at all, one of many blocks, tied and frozen ones, one that is used in some steps and on one rank only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import zs_zero
from torch import Tensor, nn
from torch.nn import functional as F
from zs_comm import Group, Mesh
from zs_zero import optimizers

F16, B16, F32 = torch.float16, torch.bfloat16, torch.float32
BLOCK = 128  # elements: the smaller blocks are, the more there is to go wrong
WIDTH = 12

Options = dict[str, Any]
Params = list[dict[str, Any]]


# -- policies ----------------------------------------------------------------------------------------------------------
def policy(name: str, folder: Path) -> Options:
    """The keywords of `zs_zero.shard` for the tiers called `name`; "memory" has none."""
    files: Options = {"device": "nvme", "nvme_path": str(folder), "zs_block_numel": BLOCK, "buffer_count": 3}
    host: Options = {"device": "cpu", "zs_block_numel": BLOCK}
    params: Options = {"device": "nvme", "nvme_path": str(folder), "max_in_cpu": 0, "buffer_count": 2}
    chosen: dict[str, tuple[Options | None, Options | None]] = {
        "memory": (None, None),
        "cpu": (host, None),
        "states": (files, None),
        "half of the states": (files | {"ratio": 0.5}, None),
        "some bytes of the states": (files | {"zs_max_in_cpu": 9000}, None),
        "one buffer": (files | {"buffer_count": 1}, params | {"buffer_count": 1}),
        "gradients": (files | {"zs_gradients": "nvme"}, None),
        "parameters": (files, params),
        "some parameters": (files | {"ratio": 0.5}, params | {"max_in_cpu": 600}),
        "parameters, states in memory": (host, params),
        "parameters alone": (None, params),
        "parameters in memory": (files, {"device": "cpu"}),
        "everything": (files | {"zs_gradients": "nvme"}, params),
    }
    given = zip(("offload_optimizer", "offload_param"), chosen[name], strict=True)
    options = {key: section for key, section in given if section is not None}
    return options | ({"aio": {"zs_store": "file"}} if options else {})


STATES = ("cpu", "states", "half of the states", "some bytes of the states", "gradients")
PARAMETERS = (
    "one buffer", "parameters", "some parameters", "parameters, states in memory", "parameters alone",
    "parameters in memory", "everything",
)  # fmt: skip


def policies(stage: int) -> tuple[str, ...]:
    """Those that make sense at a stage."""
    return STATES + (PARAMETERS if stage == 3 else ())


# -- the model ---------------------------------------------------------------------------------------------------------
class Layer(nn.Module):
    """The unit."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 35), nn.Linear(35, WIDTH, bias=False)
        self.gain, self.lone = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([0.25]))
        self.none, self.sometimes = nn.Parameter(torch.empty(0, 3)), nn.Linear(WIDTH, WIDTH)
        if frozen:
            self.up.requires_grad_(False)

    def forward(self, x: Tensor, sometimes: bool = False) -> Tensor:
        x = self.sometimes(x) if sometimes else x
        return x + self.down(torch.tanh(self.up(x))) * self.gain + self.lone + self.none.sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, WIDTH)  # several blocks
        self.first, self.second, self.frozen = Layer(), Layer(), Layer(frozen=True)
        self.still = nn.Linear(WIDTH, WIDTH)  # frozen, a unit of its own
        self.still.requires_grad_(False)
        self.never = nn.Linear(3, 3)
        self.own = nn.Linear(WIDTH, WIDTH)  # ignored: whole and local
        self.head = nn.Linear(WIDTH, 101, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, ids: Tensor, sometimes: bool) -> Tensor:
        x = self.first(self.embed(ids), sometimes)
        x = self.frozen(self.still(self.second(self.first(x))))  # one unit twice
        if self.training:
            self.seen += 1
        return self.head(self.own(x.to(self.own.weight.dtype)).to(x.dtype))


UNITS = ("first", "second", "frozen", "still", "never", "embed")


# -- how it is trained -------------------------------------------------------------------------------------------------
def adamw(params: Params, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1, **options)


OPTIMIZERS: Mapping[str, Callable[[Params], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "fused adamw": lambda params: adamw(params, fused=True),
    "foreach adamw": lambda params: adamw(params, foreach=True),
    "fused adam, amsgrad": lambda params: torch.optim.Adam(params, amsgrad=True, fused=True),
    "adam, amsgrad, maximize": lambda params: torch.optim.Adam(params, lr=1e-4, amsgrad=True, maximize=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.02, initial_accumulator_value=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5, centered=True),
    "adadelta": lambda params: torch.optim.Adadelta(params),
    "adamax": lambda params: torch.optim.Adamax(params),
    "nadam": lambda params: torch.optim.NAdam(params),
    "radam": lambda params: torch.optim.RAdam(params),
    "rprop": lambda params: torch.optim.Rprop(params),
    "asgd": lambda params: torch.optim.ASGD(params),
    "lion": lambda params: optimizers.Lion(params, lr=1e-3),
}


@dataclass(frozen=True, kw_only=True)
class How:
    """`kept`: further keywords of `zs_zero.shard`. `clip`: "", "in step", "by hand", or "early" (between backwards)."""

    dtype: torch.dtype = F32
    optimizer: str = "fused adamw"
    micros: int = 1
    steps: int = 3
    clip: str = ""
    local: str = ""  # "no_sync" (all micro-steps but the last), "all" of them, or "coalesced"
    scale: Callable[[], Any] | None = None
    overflow: int | None = None  # a step with gradients that are infinite
    kept: tuple[tuple[str, Any], ...] = ()
    groups: bool = False
    schedule: bool = False


STATE_NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "momentum_buffer", "sum", "square_avg")
MAX_NORM = 0.05  # below any norm here: every step is clipped


class Training:
    """A sharded model that may be stopped and gone on with at any micro-step."""

    def __init__(self, group: Group | Mesh | None, how: How, **options: Any) -> None:
        self.how = how
        self.rank = group.group("dp").rank if isinstance(group, Mesh) else group.rank if group else 0
        torch.manual_seed(0)
        self.model = Net()
        named = dict(self.model.named_parameters())
        small = [param for param in named.values() if param.dim() < 2]
        large = [param for param in named.values() if param.dim() >= 2]
        params: Any = [{"params": large}, {"params": small, "lr": 1e-2, "weight_decay": 0.0}]
        client = OPTIMIZERS[how.optimizer](params if how.groups else list(named.values()))
        cast = {} if how.dtype == F32 else {"dtype": how.dtype}
        if how.scale is not None:
            cast["loss_scale"] = how.scale()
        given = {"stage": 3, "units": UNITS, "ignore": ["own"]} | cast | dict(how.kept) | options
        self.optimizer = zs_zero.shard(self.model, client, mesh=group, **given)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.7) if how.schedule else None
        self.losses: list[float] = []

    def micro(self, step: int, micro: int) -> None:
        how, last = self.how, micro == self.how.micros - 1
        source = torch.Generator().manual_seed((step * 16 + micro) * 16 + self.rank)
        ids = torch.randint(101, (2, 6), generator=source)
        loss = F.cross_entropy(self.model(ids[:, :-1], self.uses(step)).float().flatten(0, 1), ids[:, 1:].flatten())
        self.losses.append(loss.item())
        if how.overflow == step:
            loss = loss * torch.inf
        scaled = self.optimizer.scale(loss / how.micros) if how.scale is not None else loss / how.micros
        if how.local == "all" or (how.local == "no_sync" and not last):
            with self.optimizer.no_sync():
                scaled.backward()
        elif how.local == "coalesced":
            with self.optimizer.coalesce_grad_reduction():
                scaled.backward()
        else:
            scaled.backward()
        if how.clip == "early" and not last:
            self.losses.append(float(self.optimizer.clip_grad_norm_(MAX_NORM)))

    def uses(self, step: int) -> bool:
        """Whether this rank uses what is used in some steps only."""
        return step % 3 == 1 or (step % 3 == 2 and self.rank == 0)

    def update(self) -> None:
        optimizer = self.optimizer
        if self.how.clip == "by hand":
            self.losses.append(float(optimizer.clip_grad_norm_(MAX_NORM)))
        optimizer.step(max_norm=MAX_NORM if self.how.clip == "in step" else None)
        if optimizer.norm is not None:
            self.losses.append(float(optimizer.norm))
        optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()

    def steps(self, start: int, stop: int) -> Training:
        for step in range(start, stop):
            for micro in range(self.how.micros):
                self.micro(step, micro)
            self.update()
        return self

    # -- what came of it -----------------------------------------------------------------------------------------------
    def result(self) -> dict[str, Any]:
        """Losses and norms, this rank's exact parameters, states and counters, the model's whole ones, the settings."""
        found: dict[str, Any] = {"losses": self.losses} | dict(self.values())
        found["scale"] = self.optimizer.loss_scale
        found["lr"] = [group["lr"] for group in self.optimizer.param_groups]
        return found

    def values(self) -> Iterator[tuple[str, Tensor]]:
        model, optimizer = self.model, self.optimizer
        ignored = {id(param) for param in model.own.parameters()}
        keys = sorted({key for state in optimizer.state.values() for key in state} | set(STATE_NAMES))
        for name, param in model.named_parameters():
            if id(param) in ignored:
                yield f"ignored {name}", param.detach().clone()
                continue
            yield f"exact {name}", optimizer.local_param(param)
            for key in keys if param.requires_grad and param.numel() else ():
                state = optimizer.local_state(param, key)
                if state is not None:
                    yield f"{key} {name}", state
        for name, value in zs_zero.full_state_dict(model).items():
            yield f"model's {name}", value
        for name, value in zs_zero.full_state_dict(model, masters=True).items():
            yield f"master {name}", value


def train(group: Group | Mesh | None, how: How, **options: Any) -> dict[str, Any]:
    training = Training(group, how, **options)
    found = training.steps(0, how.steps).result()
    training.optimizer.close(states=False)
    return found


def differences(label: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What is not equal bit for bit, one line each."""
    lines = [f"{label}: {name} on one side only" for name in sorted(found.keys() ^ wanted.keys())]
    for name in found.keys() & wanted.keys():
        here, there = found[name], wanted[name]
        if not isinstance(here, Tensor):
            if repr(here) != repr(there):  # a number that is not one equals itself here
                lines.append(f"{label}: {name}: {here} != {there}")
        elif here.dtype != there.dtype or here.shape != there.shape:
            lines.append(f"{label}: {name}: {here.dtype} {tuple(here.shape)} != {there.dtype} {tuple(there.shape)}")
        elif not torch.equal(here, there):
            error = (here.double() - there.double()).abs().max().item()
            lines.append(f"{label}: {name}: {int((here != there).sum())} of {here.numel()} differ, up to {error:.1e}")
    return lines


def compared(
    group: Group | Mesh | None, how: How, folder: Path, stages: tuple[int, ...] = (1, 2, 3),
    chosen: tuple[str, ...] | None = None, **more: Any,
) -> list[str]:  # fmt: skip
    """What differs between training in memory and in each of the tiers `chosen` (all that make sense).

    more: further keys of `offload_optimizer`.
    """
    lines: list[str] = []
    for stage in stages:
        wanted = train(group, how, stage=stage)
        for name in policies(stage) if chosen is None else [one for one in chosen if one in policies(stage)]:
            options = policy(name, folder)
            if "offload_optimizer" in options:
                options["offload_optimizer"] |= more
            found = train(group, how, stage=stage, **options)
            lines += differences(f"stage {stage}, {name}", found, wanted)
    return lines


def varied(how: How, **options: Any) -> How:
    return replace(how, **options)
