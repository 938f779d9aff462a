"""Plain torch: modules, optimizers, DDP, FSDP2, schedulers, random streams, data."""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_ckpt
from torch import Tensor, nn
from torch.utils.data import IterableDataset, RandomSampler
from zs_ckpt.loader import DataLoader
from zs_ckpt.position import DataPosition
from zs_ckpt.rng import RandomState
from zs_comm import ConfigError, Group
from zs_comm.testing import run_ranks


class Net(nn.Module):
    """Tied parameters, statistics, a buffer that is not kept, and state of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.second = nn.Linear(10, 6, bias=False)
        self.third = nn.Linear(6, 10, bias=False)
        self.third.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.0 + seed))
        self.register_buffer("cache", torch.full((2,), float(seed)), persistent=False)
        self.extra = {"seen": seed}

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.norm(self.first(x)))) * self.scale

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "Adam, lr tensor": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01), amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, rank: int = 0) -> None:
    for step in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(here: Any, there: Any) -> bool:
    if isinstance(here, Tensor) and isinstance(there, Tensor):
        return here.dtype == there.dtype and torch.equal(here, there)
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(same(here[key], there[key]) for key in here)
    if isinstance(here, list | tuple):
        return len(here) == len(there) and all(map(same, here, there))
    return bool(here == there)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_module_and_its_optimizer(name: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20) if name == "AdamW" else None
    train(model, optimizer)
    if schedule is not None:
        schedule.step()
    state = {"model": model, "optimizer": optimizer} | ({"schedule": schedule} if schedule else {})
    zs_ckpt.save(tmp_path, state)
    assert "model/third.weight" not in zs_ckpt.read(tmp_path)
    for stepped in (0, 2):  # states that do not exist yet, and some that do
        other = Net(seed=1)
        again = OPTIMIZERS[name](other.parameters())
        train(other, again, stepped)
        later = torch.optim.lr_scheduler.OneCycleLR(again, 0.1, total_steps=20) if schedule else None
        lr = again.param_groups[0]["lr"]
        zs_ckpt.load(tmp_path, {"model": other, "optimizer": again} | ({"schedule": later} if later else {}))
        assert same(other.state_dict(), model.state_dict()) and other.extra == {"seen": 0}
        assert torch.equal(other.cache, torch.ones(2)) and other.third.weight is other.first.weight
        assert same(again.state_dict(), optimizer.state_dict())
        assert not isinstance(lr, Tensor) or again.param_groups[0]["lr"] is lr
        if schedule and later:
            assert same(later.state_dict(), schedule.state_dict())
        train(other, again)
        zs_ckpt.load(tmp_path, {"model": other, "optimizer": again})
        assert same(again.state_dict(), optimizer.state_dict())


def test_names_of_parameters(tmp_path: Path) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1, momentum=0.9)
    for param in (*first.parameters(), *second.parameters()):
        param.grad = torch.ones_like(param)
    optimizer.step()
    zs_ckpt.save(tmp_path, {"one": first, "two": second, "both": optimizer}, tag="named")
    names = {"both/momentum_buffer/one.weight", "both/momentum_buffer/two.bias"}
    assert names <= zs_ckpt.read(tmp_path, tag="named").keys()
    zs_ckpt.save(tmp_path, {"optimizer": optimizer}, tag="alone")
    assert "optimizer/momentum_buffer/3" in zs_ckpt.read(tmp_path, tag="alone")
    zs_ckpt.load(tmp_path, {"optimizer": optimizer}, tag="alone")


def test_dictionaries_in_dictionaries(tmp_path: Path) -> None:
    def state(seed: int) -> dict[str, Any]:
        model = Net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        if not seed:
            train(model, optimizer)
            schedule.step()
        inner = {"model": model, "optimizer": optimizer, "best": 0.5 + seed, "seen": torch.full((2,), seed)}
        return {"actor": inner, "more": {"deep": {"schedule": schedule, "rng": RandomState()}}}

    first, second = state(0), state(1)
    zs_ckpt.save(tmp_path, first)
    assert "actor/optimizer/exp_avg/first.weight" in zs_ckpt.read(tmp_path)
    drawn = torch.rand(2)
    zs_ckpt.load(tmp_path, second)
    assert torch.equal(torch.rand(2), drawn)
    for key in ("model", "optimizer"):
        assert same(second["actor"][key].state_dict(), first["actor"][key].state_dict())
    assert second["actor"]["best"] == 0.5 and second["actor"]["seen"].tolist() == [0, 0]
    assert second["more"]["deep"]["schedule"].last_epoch == 1
    with pytest.raises(ConfigError, match="has no .*critic"):
        zs_ckpt.load(tmp_path, {"actor": {"critic": nn.Linear(1, 1)}})


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    zs_ckpt.save(tmp_path, {"model": model, "optimizer": optimizer, "other": {"x": 1}})
    with pytest.raises(ConfigError, match=r"bias: not in the model"):
        zs_ckpt.load(tmp_path, {"model": nn.Linear(2, 2, bias=False)})
    with pytest.raises(ConfigError, match=r"weight: shape \(2, 2\), the model has \(2, 3\)"):
        zs_ckpt.load(tmp_path, {"model": nn.Linear(3, 2)}, strict=False)
    bigger = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"0\.weight: missing"):
        zs_ckpt.load(tmp_path, {"model": bigger})
    zs_ckpt.load(tmp_path, {"model": bigger}, strict=False)
    groups = torch.optim.AdamW([{"params": [param]} for param in model.parameters()])
    with pytest.raises(ConfigError, match="1 parameter groups, the optimizer has 2"):
        zs_ckpt.load(tmp_path, {"model": model, "optimizer": groups})
    few = torch.optim.AdamW([model.weight])
    with pytest.raises(ConfigError, match=r"parameter group 0: bias .* in the checkpoint's only"):
        zs_ckpt.load(tmp_path, {"model": model, "optimizer": few})
    with pytest.raises(ConfigError, match="holds no optimizer state"):
        zs_ckpt.load(tmp_path, {"model": model, "other": optimizer})


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> Any:
            return {"function": test_what_cannot_be_saved}

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(ConfigError, match="function"):
        zs_ckpt.save(tmp_path, {"odd": Odd()})
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["a/b"] = torch.zeros(2)
    with pytest.raises(ConfigError, match="'a/b' cannot be saved"):
        zs_ckpt.save(tmp_path, {"optimizer": optimizer})
    optimizer.state[model.weight] = {"grad": torch.zeros(2)}
    with pytest.raises(ConfigError, match="'grad' cannot be saved"):
        zs_ckpt.save(tmp_path, {"optimizer": optimizer})
    assert zs_ckpt.tags(tmp_path) == []


def test_other_dtypes(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    zs_ckpt.save(tmp_path, {"model": model})
    half = nn.Linear(3, 3, dtype=torch.bfloat16)
    zs_ckpt.load(tmp_path, {"model": half})
    assert torch.equal(half.weight, model.weight.bfloat16())
    turned = nn.Linear(3, 3)
    turned.weight.data = turned.weight.data.t()  # not contiguous
    zs_ckpt.load(tmp_path, {"model": turned})
    assert torch.equal(turned.weight, model.weight)


# -- several ranks ----------------------------------------------------------------------------------------------------


def under_ddp(group: Group, folder: str) -> list[str]:
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)  # statistics differ after each forward
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    train(wrapped, optimizer, rank=group.rank)
    zs_ckpt.save(folder, {"model": wrapped, "optimizer": optimizer})
    other = Net(1)
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    zs_ckpt.load(folder, {"model": nn.parallel.DistributedDataParallel(other), "optimizer": again})
    pairs = {"model": (other, model), "optimizer": (again, optimizer)}
    return [name for name, (a, b) in pairs.items() if not same(a.state_dict(), b.state_dict())]


def test_ddp_and_one_rank(tmp_path: Path) -> None:
    assert run_ranks(under_ddp, 2, str(tmp_path)) == [[], []]
    model = Net(1)
    optimizer = torch.optim.AdamW(model.parameters())
    zs_ckpt.load(tmp_path, {"model": model, "optimizer": optimizer})  # names without `module.`
    found = zs_ckpt.read(tmp_path)
    assert torch.equal(model.norm.running_mean, found["model/norm.running_mean"])
    assert torch.equal(optimizer.state[model.scale]["exp_avg"], found["optimizer/exp_avg/scale"])


def fully_sharded(group: Group, folder: str, load: bool, replicate: bool) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(int(load))
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    sizes, names = ((2, group.size // 2), ("r", "s")) if replicate else ((group.size,), ("s",))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 if load else 0.01)
    if load:
        zs_ckpt.load(folder, {"model": model, "optimizer": optimizer})
    else:
        for step in range(2):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        zs_ckpt.save(folder, {"model": model, "optimizer": optimizer})
    found = {f"model/{name}": value.full_tensor() for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            found[f"optimizer/{key}/{name}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found | {"lr": optimizer.param_groups[0]["lr"]}


def test_fsdp2_at_other_sizes_and_plain(tmp_path: Path) -> None:
    wanted = run_ranks(fully_sharded, 3, str(tmp_path), False, False)[0]
    stored = zs_ckpt.read(tmp_path)
    assert {*stored, "lr"} == wanted.keys() and same({**stored, "lr": 0.01}, wanted)
    for world, replicate in ((2, False), (4, True)):
        for found in run_ranks(fully_sharded, world, str(tmp_path), True, replicate):
            assert same(found, wanted)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    zs_ckpt.load(tmp_path, {"model": model, "optimizer": optimizer})
    assert all(torch.equal(value, wanted[f"model/{name}"]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(value, wanted[f"optimizer/{key}/{name}"])
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    )
    run_ranks(fully_sharded, 4, str(tmp_path / "both"), False, True)
    assert zs_ckpt.read(tmp_path / "both").keys() == stored.keys()


# -- random streams and data ------------------------------------------------------------------------------------------


def streams() -> list[Any]:
    found = [torch.rand(2).tolist(), random.random(), random.gauss(0, 1)]
    if importlib.util.find_spec("numpy"):
        import numpy

        found += [numpy.random.rand(), numpy.random.randn()]
    return found


def drawn(group: Group, folder: str, save: bool) -> list[Any]:
    torch.manual_seed(group.rank if save else 9)
    random.seed(group.rank)
    streams()
    if save:
        zs_ckpt.save(folder, {"rng": RandomState(step=4)})
    else:
        zs_ckpt.load(folder, {"rng": RandomState()})
    return streams()


def test_random_streams(tmp_path: Path) -> None:
    first = run_ranks(drawn, 2, str(tmp_path), True)
    assert first[0] != first[1]
    assert run_ranks(drawn, 2, str(tmp_path), False) == first
    three = run_ranks(drawn, 3, str(tmp_path), False)
    assert three == run_ranks(drawn, 3, str(tmp_path), False)  # derived, and so the same each time
    assert len({str(found[0]) for found in (*three, *first)}) == 5


def items(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("kind", ["own", "random sampler", "iterable", "generator", "workers"])
def test_a_pass_goes_on_where_it_was(kind: str) -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(20))

    def loader() -> DataLoader:
        if kind == "random sampler":
            return DataLoader(range(20), 3, sampler=RandomSampler(range(20)))
        if kind == "generator":
            own = torch.Generator().manual_seed(5)
            return DataLoader(range(20), 3, sampler=RandomSampler(range(20), generator=own), generator=own)
        if kind == "iterable":
            return DataLoader(Stream(), 3)
        return DataLoader(range(20), 3, num_workers=int(kind == "workers"))

    for stop in (0, 2, 7):
        torch.manual_seed(1)
        one = loader()
        items(one)
        batches = iter(one)
        for _ in range(stop):
            next(batches)
        state, stream = one.state_dict(), torch.get_rng_state()
        rest = items(batches)
        wanted = [rest if stop < 7 else [], items(one), torch.rand(1).item()]
        two = loader()
        torch.manual_seed(2)
        two.load_state_dict(state)
        assert two.state_dict()["epoch"] == state["epoch"] or stop == 7
        torch.set_rng_state(stream)
        found = [items(two) if stop < 7 or kind not in ("own", "workers") else [], items(two), torch.rand(1).item()]
        assert found == wanted, stop


def test_a_pass_of_other_ranks() -> None:
    whole = [items(DataLoader(range(24), 2, rank=rank, world=2)) for rank in range(2)]
    one = DataLoader(range(24), 2, rank=0, world=2)
    batches = iter(one)
    next(batches), next(batches), next(batches)
    state = one.state_dict()
    rest = DataLoader(range(24), 2, rank=0, world=1)
    rest.load_state_dict(state)
    drawn = sorted(item for batch in items(rest) for item in batch)
    assert drawn == sorted(item for share in whole for batch in share[3:] for item in batch)
    three = DataLoader(range(24), 2, rank=0, world=3)
    three.load_state_dict(state)
    assert len(items(three)) == 2
    with pytest.raises(ConfigError, match="12 samples of epoch 0 are drawn"):
        DataLoader(range(24), 5, rank=0, world=1).load_state_dict(state)


def test_a_loader_without_state_must_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Sampler:
        def __init__(self) -> None:
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    class Loader:
        def __init__(self, sampler: Any = None) -> None:
            self.sampler = sampler

    loader = Loader(Sampler())
    loader.sampler.at = 7
    zs_ckpt.save(tmp_path, {"data": DataPosition(loader, drawn=5)}, tag="kept")
    zs_ckpt.save(tmp_path, {"data": DataPosition(Loader(), drawn=5)}, tag="bare")
    other = Loader(Sampler())
    with caplog.at_level(logging.WARNING):
        zs_ckpt.load(tmp_path, {"data": DataPosition(other)}, tag="kept")
        assert other.sampler.at == 7 and not caplog.records
        zs_ckpt.load(tmp_path, {"data": DataPosition(other)}, tag="bare")
    assert "skip the 5 batches" in caplog.text
