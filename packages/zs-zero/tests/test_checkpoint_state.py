"""The pieces of sharded state that a checkpoint gets: they make up the whole, once, and go back anywhere."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import zs_zero
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zs_comm import ConfigError, Group, Mesh
from zs_comm.testing import run_ranks
from zs_zero.checkpoint import model_state
from zs_zero.parts import TensorSpec, boxes_of_range


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_boxes_follow_one_another(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    boxes = list(boxes_of_range(shape, start, stop))
    parts = [whole[tuple(slice(*pair) for pair in box)].reshape(-1) for box in boxes]
    assert torch.cat([whole.reshape(-1)[:0], *parts]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


# -- a store in memory ------------------------------------------------------------------------------------------------


@dataclass
class Store:
    """What a checkpoint would hold of one Shardable: whole tensors, each rank's own, rank 0's objects."""

    whole: dict[str, Tensor] = field(default_factory=dict)
    ranks: list[dict[str, Tensor]] = field(default_factory=list)
    objects: Mapping[str, Any] = field(default_factory=dict)


class Specs(dict[str, TensorSpec]):
    """What `places` is given: all ranks' tensors, this rank's own where as many load as saved; `ranks` by rank."""

    def __init__(self, store: Store, group: Group) -> None:
        self.ranks = [{n: TensorSpec(n, tuple(v.shape), v.dtype) for n, v in own.items()} for own in store.ranks]
        super().__init__({n: TensorSpec(n, tuple(v.shape), v.dtype) for n, v in store.whole.items()})
        if group.size == len(store.ranks):
            self.update(self.ranks[group.rank])


def given_by(shardable: Any) -> tuple[list[tuple[Any, ...]], Any]:
    pieces = [(p.spec, p.box, p.data.clone(), p.replica, p.replicas, p.scope) for p in shardable.pieces()]
    return pieces, copy.deepcopy(shardable.objects())


def stored(ranks: list[tuple[list[tuple[Any, ...]], Any]]) -> Store:
    """Puts the pieces together, each element once."""
    store, counts = Store(objects=ranks[0][1]), {}
    held: dict[Any, list[tuple[int, int, Tensor]]] = {}
    for pieces, _ in ranks:
        store.ranks.append({})
        for spec, box, data, replica, replicas, scope in pieces:
            assert data.is_contiguous() and data.numel() == torch.Size([b - a for a, b in box]).numel()
            if scope:
                store.ranks[-1][spec.name] = data.reshape(spec.shape)
                continue
            held.setdefault((spec.name, box), []).append((replica, replicas, data))
            whole = store.whole.setdefault(spec.name, torch.zeros(spec.shape, dtype=spec.dtype))
            assert (tuple(whole.shape), whole.dtype) == (spec.shape, spec.dtype)
            if replica == 0:
                at = tuple(slice(*pair) for pair in box)
                whole[at] = data.reshape([b - a for a, b in box])
                counts.setdefault(spec.name, torch.zeros(spec.shape))[at] += 1
    for name, copies in held.items():
        assert sorted(one[0] for one in copies) == list(range(copies[0][1])), name
        assert all(torch.equal(one[2], copies[0][2]) for one in copies), name
    assert all(bool((count == 1).all()) for count in counts.values())
    return store


def fill(shardable: Any, store: Store, group: Group) -> None:
    places = list(shardable.places(Specs(store, group), store.objects))
    for place in places:
        rank = group.rank if place.scope == "rank" else int(place.scope.partition(":")[2] or 0)
        source = store.ranks[rank] if place.scope else store.whole
        box = tuple(slice(*pair) for pair in place.box)
        place.data.copy_(source[place.spec.name][box].reshape(place.data.shape))
    shardable.finish(store.objects)


# -- trainings --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 9)
        self.second = nn.Linear(9, 5)
        self.own = nn.Linear(5, 3)  # ignored
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.second(self.first(x).tanh())) * self.gain


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.01),
}


def sharded(group: Group, name: str, stage: int, replicate: int) -> tuple[Net, zs_zero.ZeroOptimizer]:
    model = Net()
    mesh = Mesh.build(world=group, replicate=replicate) if replicate > 1 else group
    return model, zs_zero.shard(model, OPTIMIZERS[name](model.parameters()), stage=stage, mesh=mesh, ignore=["own"])


def backward(model: Net, group: Group, seed: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * seed + group.rank))
    model(x).square().mean().backward()


def go_on(model: Net, optimizer: zs_zero.ZeroOptimizer, group: Group) -> dict[str, Tensor]:
    """Ends the window that is open, and steps twice."""
    for seed in (3, 4, 5):
        backward(model, group, seed)
        optimizer.step()
        optimizer.zero_grad()
    return zs_zero.full_state_dict(model)


def saved(group: Group, name: str, stage: int, replicate: int) -> Any:
    model, optimizer = sharded(group, name, stage, replicate)
    for seed in range(2):
        backward(model, group, seed)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.005
    backward(model, group, 2)
    with optimizer.no_sync():
        backward(model, group, 2)
    parts = given_by(model_state(model)), given_by(optimizer.__zs_shardable__())
    return parts, go_on(model, optimizer, group)


def loaded(group: Group, name: str, stage: int, replicate: int, stores: tuple[Store, Store]) -> Any:
    model, optimizer = sharded(group, name, stage, replicate)
    backward(model, group, 9)
    optimizer.step()
    backward(model, group, 9)
    fill(model_state(model), stores[0], group)
    fill(optimizer.__zs_shardable__(), stores[1], group)
    parts = given_by(model_state(model)), given_by(optimizer.__zs_shardable__())
    return parts, go_on(model, optimizer, group)


CASES = [*((name, 2, 2, 1) for name in OPTIMIZERS), ("AdamW", 4, 2, 2), ("AdamW", 4, 3, 2), ("AdamW", 3, 1, 1)]


@pytest.mark.parametrize(("name", "world", "stage", "replicate"), CASES)
def test_pieces_go_back(name: str, world: int, stage: int, replicate: int) -> None:
    results = run_ranks(saved, world, name, stage, replicate)
    stores = stored([parts[0] for parts, _ in results]), stored([parts[1] for parts, _ in results])
    window = {key for key in (*stores[1].whole, *stores[1].ranks[0]) if "grad/" in key}
    assert ("grad/gain" in window) == (stage >= 2) and "local_grad/first.weight" in window

    again = run_ranks(loaded, world, name, stage, replicate, stores)
    for (parts, weights), (wanted, expected) in zip(again, results, strict=True):
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
        for (pieces, objects), (pieces_before, objects_before) in zip(parts, wanted, strict=True):
            assert objects == objects_before
            for here, there in zip(pieces, pieces_before, strict=True):
                assert here[:2] == there[:2] and torch.equal(here[2], there[2]), here[0]

    for other, other_stage in ((1, 0), (2, 3)):
        if other != world:
            results = run_ranks(loaded, other, name, other_stage, 1, stores)
            new = stored([parts[0] for parts, _ in results]), stored([parts[1] for parts, _ in results])
            for key, value in itertools.chain(stores[0].whole.items(), stores[1].whole.items()):
                if "grad/" not in key and not (key.startswith(("own", "local")) or "/own." in key):
                    assert torch.equal((new[0].whole | new[1].whole)[key], value), key


# -- alone ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_changes_nothing() -> None:
    alone = Group.single()
    model, optimizer = sharded(alone, "AdamW", 0, 1)
    backward(model, alone, 0)
    optimizer.step()
    store = stored([given_by(model_state(model))])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del store.whole["gain"]
    store.whole["first.weight"] = torch.zeros(2, 2)
    with pytest.raises(ConfigError, match=r"gain: missing; first\.weight: shape \(2, 2\), the model has \(9, 5\)"):
        fill(model_state(model), store, alone)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    states = stored([given_by(optimizer.__zs_shardable__())])
    states.whole["exp_avg/other"] = torch.zeros(1)
    with pytest.raises(ConfigError, match="exp_avg/other: there is no such parameter"):
        fill(optimizer.__zs_shardable__(), states, alone)
    with pytest.raises(ConfigError, match="holds no optimizer state"):
        fill(optimizer.__zs_shardable__(), Store(ranks=[{}], objects={"world": 1}), alone)
    with pytest.raises(ConfigError, match="loading a checkpoint inside"), zs_zero.gathered(model):
        fill(model_state(model), store, alone)


def test_a_load_that_is_not_finished_leaves_a_torn_state() -> None:
    alone = Group.single()
    model, optimizer = sharded(alone, "AdamW", 0, 1)
    store = stored([given_by(model_state(model))])
    loading = model_state(model)
    list(loading.places(Specs(store, alone), store.objects))
    loading.begin()
    with pytest.raises(zs_zero.TornError):
        optimizer.step()
    fill(loading, store, alone)
    optimizer.step()


def test_names_of_tied_parameters() -> None:
    """A checkpoint of tied weights fits a model in which they are two, and the other way round."""
    alone = Group.single()

    def pair(tied: bool) -> nn.ModuleDict:
        torch.manual_seed(int(tied))
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        if tied:
            model["b"].weight = model["a"].weight
        return model

    tied, apart = pair(True), pair(False)
    for model in (tied, apart):
        zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=0, mesh=alone)
    store = stored([given_by(model_state(tied))])
    assert list(store.whole) == ["a.weight"] and store.objects["tied"] == {"b.weight": "a.weight"}
    fill(model_state(apart), store, alone)
    assert torch.equal(apart["a"].weight, tied["a"].weight) and torch.equal(apart["b"].weight, tied["a"].weight)
    with torch.no_grad():
        apart["a"].weight.add_(1)
    fill(model_state(tied), stored([given_by(model_state(apart))]), alone)
    assert torch.equal(tied["b"].weight, apart["a"].weight)


def test_the_hook_is_the_models_own() -> None:
    model, optimizer = sharded(Group.single(), "SGD", 0, 1)
    assert model.__zs_shardable__().PROTOCOL == optimizer.__zs_shardable__().PROTOCOL == 1
    assert copy.deepcopy(model).__zs_shardable__ is None
    optimizer.close()
    assert not hasattr(model, "__zs_shardable__")
    with pytest.raises(ConfigError, match="not sharded"):
        model_state(model)
