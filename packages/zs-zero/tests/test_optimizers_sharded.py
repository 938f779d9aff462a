"""Every optimizer equals its unsharded self over 20 steps at each stage, with parameter groups and a schedule.

One rank: plain torch's bits. Two and three: those of one process that takes the mean of the ranks' gradients, in rank
order. All of it is bitwise: what needs whole matrices gets them, and norms are sums in fp64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zs_zero
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from zs_comm import CollectiveLog, ConfigError, Group
from zs_comm.memory import live_tensor_nbytes
from zs_comm.testing import run_ranks
from zs_zero import optimizers

STEPS = 20
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Net(nn.Module):
    """Sizes that divide by nothing, a convolution, a parameter of no dim, one that is used in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.conv = nn.Conv1d(7, 6, 3, padding=1)
        self.hidden = nn.ModuleList([nn.Linear(6, 23), nn.Linear(23, 13, bias=False)])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.sometimes = nn.Linear(13, 13)
        self.head = nn.Linear(13, 3)

    def forward(self, ids: Tensor, sometimes: bool) -> Tensor:  # (batch, length)
        x = self.conv(self.embed(ids).mT).mT
        for layer in self.hidden:
            x = torch.tanh(layer(x)) * self.scale
        return self.head(self.sometimes(x) if sometimes else x)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    source = torch.Generator().manual_seed(step * 8 + rank)
    ids, wanted = torch.randint(11, (2, 5), generator=source), torch.randn(2, 5, 3, generator=source)
    return nn.functional.mse_loss(model(ids, step % 3 != 1).float(), wanted)


def groups_of(model: nn.Module, matrices: bool = False) -> list[dict[str, Any]]:
    params = [p for p in model.parameters() if not matrices or p.dim() == 2]
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.dim() <= 1], "lr": 4e-3},
    ][: 1 if matrices else 2]


def muon(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    return optimizers.Muon(groups, lr=0.02, adam_lr=3e-3, **options)


OPTIMIZERS: dict[str, Make] = {
    "adam": partial(torch.optim.Adam, lr=3e-3),
    "adamw fused": partial(torch.optim.AdamW, lr=3e-3, fused=True),
    "adamw amsgrad foreach": partial(torch.optim.AdamW, lr=3e-3, amsgrad=True, foreach=True),
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.02),
    "rmsprop": partial(torch.optim.RMSprop, lr=3e-3, momentum=0.5, centered=True),
    "nadam": partial(torch.optim.NAdam, lr=3e-3),
    "asgd": partial(torch.optim.ASGD, lr=3e-2),
    "lion": partial(optimizers.Lion, lr=1e-3, betas=(0.9, 0.99)),
    "adam without bias correction": partial(optimizers.Adam, lr=3e-3, bias_correction=False),
    "adam, decay in the gradient": partial(optimizers.Adam, lr=3e-3, decoupled=False),
    "lamb": partial(optimizers.Lamb, lr=1e-2),
    "lamb as deepspeed's": partial(optimizers.Lamb, lr=1e-2, correct_step_size=True, max_coeff=0.5, min_coeff=0.05),
    "muon": muon,
    "muon gram": partial(muon, ns_method="gram", nesterov=False, decoupled=False),
    "adafactor": partial(torch.optim.Adafactor, lr=3e-2),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9
    OPTIMIZERS["torch's muon"] = partial(torch.optim.Muon, lr=1e-2)


def new(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](groups_of(model, matrices=name == "torch's muon"))
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.01][: len(optimizer.param_groups)],
                                                                 total_steps=STEPS, cycle_momentum=False)  # fmt: skip


Values = dict[str, Tensor]


def plain(name: str, world: int, low: torch.dtype | None = None) -> Values:
    """One process: the mean over `world` ranks of their gradients, summed in their order; fp32 masters for `low`."""
    model, optimizer, schedule = new(name)
    masters = [param.detach().clone() for param in model.parameters()]
    for step in range(STEPS):
        sums: list[Tensor | None] = [None for _ in model.parameters()]
        for rank in range(world):
            if low is not None:
                for param, master in zip(model.parameters(), masters, strict=True):
                    param.data = master.to(low)
            loss_of(model, step, rank).backward()
            for index, param in enumerate(model.parameters()):
                if param.grad is not None:
                    grad, before = param.grad.float(), sums[index]
                    sums[index] = grad if before is None else before + grad
                    param.grad = None
        for param, master, total in zip(model.parameters(), masters, sums, strict=True):
            if low is not None:
                param.data = master
                total = None if total is None else (total * (1 / world)).to(low).float()
                param.grad = total
            else:
                param.grad = None if total is None else total * (1 / world)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return values(model, optimizer)


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    """Parameters by name, states as state/name."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{key}/{name}"] = torch.as_tensor(value).detach().clone()
    return found


def sharded(
    name: str, stage: int, group: Group | None = None, low: torch.dtype | None = None, mesh: Any = None, **options: Any
) -> Values:
    model, client, schedule = new(name)
    units = ["hidden.0", "sometimes"]  # and the rest
    optimizer = zs_zero.shard(model, client, stage=stage, units=units, mesh=mesh or group, dtype=low, **options)
    for step in range(STEPS):
        loss_of(model, step, group.rank if group else 0).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    masters = {} if low is None else {n: optimizer.full_param(p) for n, p in model.named_parameters()}
    optimizer.close()  # the model and the client's optimizer are whole and ordinary again
    return values(model, client) | masters


def differences(label: str, got: Values, wanted: Values) -> list[str]:
    lines = [f"{label}: {name} on one side only" for name in got.keys() ^ wanted.keys()]
    for name in got.keys() & wanted.keys():
        a, b = got[name], wanted[name]
        if a.shape != b.shape:
            lines.append(f"{label}: {name}: {tuple(a.shape)} != {tuple(b.shape)}")
        elif not torch.equal(a.float(), b.float()):
            lines.append(f"{label}: {name}: up to {(a.float() - b.float()).abs().max():.1e}")
    return lines


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rank(name: str) -> None:
    wanted = plain(name, 1)
    assert not [line for stage in range(4) for line in differences(f"stage {stage}", sharded(name, stage), wanted)]


def compare(group: Group, name: str, stages: tuple[int, ...], low: torch.dtype | None = None) -> list[str]:
    wanted = plain(name, group.size, low)
    found = {stage: sharded(name, stage, group, low) for stage in stages}
    return [line for n in found for line in differences(f"rank {group.rank}, stage {n}", found[n], wanted)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks(name: str) -> None:
    wide = any(word in name for word in ("muon", "lamb", "adafactor"))  # the others see pieces like any other's
    results = run_ranks(compare, 2, name, (0, 1, 2, 3) if wide else (1, 3))
    assert not [line for lines in results for line in lines]


@pytest.mark.parametrize("name", ["muon", "lamb", "lion"])
def test_two_ranks_in_bf16_with_fp32_masters(name: str) -> None:
    results = run_ranks(compare, 2, name, (1, 3), torch.bfloat16)
    assert not [line for lines in results for line in lines]


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_three_ranks(name: str) -> None:
    results = run_ranks(compare, 3, name, (1, 3))
    assert not [line for lines in results for line in lines]


def replicated(group: Group, name: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    wanted = sharded(name, 1, group, mesh=mesh)
    lines = [
        line for stage in (2, 3) for line in differences(str(stage), sharded(name, stage, group, mesh=mesh), wanted)
    ]
    whole = plain(name, 4)
    for key, value in wanted.items():  # two axes add in another order than one
        if value.is_floating_point() and "/" not in key:
            error = (value - whole[key]).abs().max()
            lines += [f"{key}: {error:.1e} apart"] if error > 2e-5 else []
    return lines


@pytest.mark.parametrize("name", ["lamb", "adafactor"])  # Muon amplifies rounding: its bf16 iteration is chaotic
def test_replicate_by_shard(name: str) -> None:
    results = run_ranks(replicated, 4, name)
    assert not [line for lines in results for line in lines]


def without_masters(group: Group, name: str, update: str) -> list[str]:
    """Whole parameters and norms of bf16 ones that are rounded by chance or compensated: the same at all stages."""
    runs = {stage: sharded(name, stage, group, torch.bfloat16, bf16_update=update) for stage in (0, 1, 3)}
    return [line for stage in (1, 3) for line in differences(f"stage {stage}", runs[stage], runs[0])]


@pytest.mark.parametrize("update", ["stochastic_rounding", "kahan"])
@pytest.mark.parametrize("name", ["muon", "lamb", "adafactor"])
def test_bf16_without_masters(name: str, update: str) -> None:
    assert run_ranks(without_masters, 2, name, update) == [[], []]


class Wide(nn.Module):
    def __init__(self, layers: int = 12, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def costs(group: Group, stage: int) -> tuple[list[int], list[int]]:
    """Bytes on the wire of a step, and of live tensors between steps, of SGD with momentum and of Muon."""
    wire, memory = [], []
    for kind in (partial(torch.optim.SGD, lr=0.01, momentum=0.9), partial(optimizers.Muon, lr=0.01)):
        model = Wide()
        optimizer = zs_zero.shard(model, kind(model.parameters()), stage=stage, mesh=group, units=[nn.Linear])
        before = live_tensor_nbytes()
        for step in range(5):
            log = CollectiveLog()
            group.observers.add(log)
            model(torch.ones(2, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            group.observers.remove(log)
            if step == 4:
                wire.append(log.total_wire_nbytes)
        memory.append(live_tensor_nbytes() - before)
        optimizer.close()
        del optimizer, model
    return wire, memory


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_matrices_cost_what_the_plan_says(stage: int) -> None:
    numel, world = 12 * 32 * 32, 4
    for wire, memory in run_ranks(costs, world, stage):
        # values and gradients to the owners, new values back: 3 numel / world elements, all but the rank's own
        assert wire[1] - wire[0] == 3 * 4 * numel * (world - 1) / world**2
        assert memory == [4 * numel / world] * 2  # the states, once, and nothing else


class Silent(torch.optim.SGD):
    """A client's own class that says what it needs."""

    __zs_requires__ = "whole"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad / param.grad.norm(), alpha=group["lr"])


def own_class(group: Group, stage: int) -> list[Tensor]:
    torch.manual_seed(1)
    model = Wide(3, 5)
    optimizer = zs_zero.shard(model, Silent(model.parameters(), lr=0.1), stage=stage, mesh=group)
    shapes = [tuple(piece.shape) for pieces in optimizer._pieces for piece in pieces]
    assert stage == 0 or all(shape == (5, 5) for shape in shapes)
    for _ in range(3):
        model(torch.eye(5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [optimizer.full_param(param) for param in model.parameters()]


def test_a_class_of_ones_own_says_what_it_needs() -> None:
    wanted = own_class(Group.single(), 0)
    for stage in range(4):
        for found in run_ranks(own_class, 2, stage):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Wrong(torch.optim.SGD):
    __zs_requires__ = "rows"


class Normless(torch.optim.SGD):
    __zs_requires__ = "norms"


@pytest.mark.parametrize(
    ("kind", "why"), [(Wrong, "one of elements, norms, whole .got 'rows'"), (Normless, "no attribute sum_pieces")]
)
def test_a_wrong_requirement(kind: Any, why: str) -> None:
    model = Wide(1)
    with pytest.raises(ConfigError, match=why):
        zs_zero.shard(model, kind(model.parameters(), lr=0.1), stage=0)


def with_ignored(group: Group, name: str) -> list[str]:
    """An ignored parameter is whole, local and updated by each rank for itself."""
    lines = []
    for stage in (1, 3):
        model, client, _ = new(name)
        twin, alone, _ = new(name)
        optimizer = zs_zero.shard(model, client, stage=stage, mesh=group, ignore=["head.weight"])
        for step in range(3):
            loss_of(model, step, group.rank).backward()
            twin.head.weight.grad = model.head.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            alone.step()
        if not torch.equal(model.head.weight, twin.head.weight):
            lines.append(f"stage {stage}: {name}")
    return lines


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_ignored_parameters(name: str) -> None:
    assert run_ranks(with_ignored, 2, name) == [[], []]


def failing(group: Group, name: str) -> list[str]:
    """An aborted window changes nothing; an update that fails leaves the optimizer torn on all ranks."""
    model, client, _ = new(name)
    optimizer = zs_zero.shard(model, client, stage=2, mesh=group)
    loss_of(model, 0, group.rank).backward()
    optimizer.step()
    before = [optimizer.full_param(param) for param in model.parameters()]
    loss_of(model, 1, group.rank).backward()
    optimizer.abort_step()
    if not all(torch.equal(a, optimizer.full_param(b)) for a, b in zip(before, model.parameters(), strict=True)):
        return ["changed"]
    client.param_groups[0]["ns_steps" if name == "muon" else "eps"] = None
    loss_of(model, 1, group.rank).backward()
    try:
        optimizer.step()
    except TypeError:
        return [] if optimizer.torn else ["not torn"]
    return ["no error"]


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_failures(name: str) -> None:
    assert run_ranks(failing, 2, name) == [[], []]
