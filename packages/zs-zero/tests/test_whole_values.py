"""Whole values by parameter and by model: read, set, gathered, and the same at every stage."""

import copy

import pytest
import torch
import torch.nn.functional as F
import zs_zero
from torch import nn
from zs_comm import ConfigError, RankDisagreement
from zs_comm.testing import run_ranks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7)) for _ in range(2))
        self.head = nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.ones(5))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def data(step, rank):
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(10 * step + rank))


def build(group, stage, dtype=None):
    torch.manual_seed(1)
    model = Net()
    for buffer in model.buffers() if dtype else ():  # torch's batch norm wants weights and statistics of one dtype
        buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, zs_zero.shard(model, client, stage=stage, mesh=group, dtype=dtype)


def train(model, optimizer, group, steps=2, first=0):
    for step in range(first, first + steps):
        model(data(step, group.rank).to(model.head.weight.dtype)).float().square().mean().backward()
        optimizer.step()


def by_parameter(group, stage):
    model, optimizer = build(group, stage)
    weight, bias = model.head.weight, model.layers[0][0].bias
    before = optimizer.full_state(weight, "exp_avg")
    train(model, optimizer, group)
    model(data(5, group.rank)).square().mean().backward()
    found = {
        "param": optimizer.full_param(weight),
        "grad": optimizer.full_grad(weight),
        "unused grad": optimizer.full_grad(model.unused),
        "exp_avg": optimizer.full_state(weight, "exp_avg"),
        "exp_avg_sq": optimizer.full_state(bias, "exp_avg_sq"),
        "step": optimizer.full_state(bias, "step"),
        "unused state": optimizer.full_state(model.unused, "exp_avg"),
        "before": before,
        "nonsense": optimizer.full_state(weight, "nonsense"),
    }
    optimizer.set_full_grad(weight, torch.zeros(3, 7))
    optimizer.set_full_param(weight, torch.full((3, 7), 0.25))
    optimizer.set_full_state(weight, "exp_avg", torch.zeros(3, 7))
    optimizer.set_full_state(weight, "step", torch.tensor(9.0))
    found["set grad"] = optimizer.full_grad(weight)
    found["set param"] = optimizer.full_param(weight)
    found["set state"] = optimizer.full_state(weight, "exp_avg"), optimizer.full_state(weight, "step")
    optimizer.step()
    found["after"] = optimizer.full_param(weight)
    with pytest.raises(ConfigError, match="no parameter of the sharded model"):
        optimizer.full_param(nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match=r"shape \(2,\) for a parameter of shape \(3, 7\)"):
        optimizer.set_full_param(weight, torch.ones(2))
    return found


def equal(one, other):
    if isinstance(one, tuple):
        return all(equal(a, b) for a, b in zip(one, other, strict=True))
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def test_parameters_gradients_and_states_by_parameter():
    everything = [run_ranks(by_parameter, 2, stage) for stage in (0, 1, 2, 3)]
    reference = everything[0][0]
    for results in everything:
        for found in results:
            for key, value in reference.items():
                assert equal(found[key], value), key
    assert reference["grad"].abs().max() > 0
    assert reference["unused grad"] is reference["unused state"] is reference["before"] is reference["nonsense"] is None
    assert reference["step"].item() == 2.0
    assert torch.equal(reference["set param"], torch.full((3, 7), 0.25))
    assert torch.equal(reference["set grad"], torch.zeros(3, 7))
    assert reference["set state"][1].item() == 9.0
    # no gradient and no momentum: only AdamW's decay of lr * 0.01 acts
    torch.testing.assert_close(reference["after"], torch.full((3, 7), 0.25 * (1 - 1e-4)), rtol=0, atol=1e-8)


def round_trip(group, stage, dtype):
    model, optimizer = build(group, stage, dtype)
    train(model, optimizer, group)
    saved = zs_zero.full_state_dict(model)
    exact = zs_zero.full_state_dict(model, masters=True)
    halves = zs_zero.full_state_dict(model, dtype=torch.float16, rank0_only=True)
    other, _ = build(group, stage, dtype)
    zs_zero.load_full_state_dict(other, exact)
    again = zs_zero.full_state_dict(other, masters=True)
    equal = all(torch.equal(exact[key], again[key]) for key in exact)
    model_equal = all(torch.equal(saved[key], v) for key, v in zs_zero.full_state_dict(other).items())
    with pytest.raises(ConfigError, match="head.weight: missing; nonsense: not in the model"):
        zs_zero.load_full_state_dict(
            other, {**{k: v for k, v in exact.items() if k != "head.weight"}, "nonsense": v0()}
        )
    with pytest.raises(ConfigError, match=r"head.bias: shape \(1,\), the model has \(3,\)"):
        zs_zero.load_full_state_dict(other, {"head.bias": v0()}, strict=False)
    zs_zero.load_full_state_dict(other, {"head.bias": torch.tensor([1.0, 2.0, 3.0])}, strict=False)
    partial = zs_zero.full_state_dict(other)["head.bias"].tolist()
    return list(saved), equal, model_equal, partial, (len(halves), {v.dtype for v in halves.values()}), saved


def v0():
    return torch.zeros(1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_full_state_dict_round_trip(dtype):
    names = list(Net().state_dict())
    states = []
    for stage in (0, 1, 2, 3):
        for rank, (keys, same, model_same, partial, halves, saved) in enumerate(run_ranks(round_trip, 2, stage, dtype)):
            assert keys == names and same and model_same and partial == [1.0, 2.0, 3.0]
            assert halves == ((len(names), {torch.float16, torch.int64}) if rank == 0 else (0, set()))
            states.append(saved)
    for state in states:  # BatchNorm's running statistics are local: compare parameters only
        assert all(torch.equal(state[k], states[0][k]) for k in names if "running" not in k)


def change(group, stage, dtype, how):
    model, optimizer = build(group, stage, dtype)
    train(model, optimizer, group)
    precise = optimizer.full_param(model.head.weight)
    if how == "alike":
        with zs_zero.gathered(model.head.weight), torch.no_grad():
            model.head.weight[1, 2] = 4.0
            seen = model.head.weight[1, 2].item()
    elif how == "data":
        with zs_zero.gathered([model.head.weight, model.head.bias]):
            model.head.weight.data[1, 2] = 4.0
            seen = model.head.weight[1, 2].item()
    elif how == "one rank":
        with zs_zero.gathered(model, modifier_rank=1):
            if group.rank == 1:
                model.head.weight.data[1, 2] = 4.0
            seen = 4.0
    else:
        with pytest.raises(RankDisagreement, match="'head.weight'.*modifier_rank"), zs_zero.gathered(model):
            if group.rank == 1:
                model.head.weight.data[1, 2] = 4.0
        return True
    changed = optimizer.full_param(model.head.weight)
    expected = precise.clone()
    expected[1, 2] = 4.0  # and the masters of all others keep their precision
    train(model, optimizer, group, first=7)
    return seen == 4.0 and torch.equal(changed, expected), zs_zero.full_state_dict(model)["head.weight"]


@pytest.mark.parametrize("how", ["alike", "data", "one rank"])
def test_changes_inside_gathered_are_kept(how):
    for dtype in (None, torch.bfloat16):
        results = [result for stage in (0, 1, 2, 3) for result in run_ranks(change, 2, stage, dtype, how)]
        assert all(kept for kept, _ in results)
        assert all(torch.equal(weight, results[0][1]) for _, weight in results)


def test_different_changes_are_an_error_on_every_rank():
    for stage in (1, 3):
        assert run_ranks(change, 2, stage, None, "differently") == [True, True]


def outside_changes(group, dtype):
    """Values written into whole parameters between steps reach the masters (an average of weights, a clamp ...)."""
    results = []
    for stage in (0, 1, 2):
        model, optimizer = build(group, stage, dtype)
        train(model, optimizer, group)
        with torch.no_grad():
            model.head.weight.clamp_(-0.1, 0.1)
        train(model, optimizer, group, first=5)
        model.load_state_dict(model.state_dict())
        train(model, optimizer, group, first=8)
        results.append(zs_zero.full_state_dict(model, masters=True)["head.weight"])
    return results


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_in_place_changes_reach_the_masters(dtype):
    for results in run_ranks(outside_changes, 2, dtype):
        assert all(torch.equal(result, results[0]) for result in results)
        assert results[0].abs().max() < 0.2


def scheduled(group, before):
    torch.manual_seed(1)
    model = Net()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if before:
        scheduler = torch.optim.lr_scheduler.StepLR(client, step_size=1, gamma=0.5)
    optimizer = zs_zero.shard(model, client, stage=2, mesh=group)
    if not before:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    rates = []
    for step in range(3):
        F.mse_loss(model(data(step, group.rank)), torch.zeros(6, 3)).backward()
        optimizer.step()
        scheduler.step()
        rates.append((client.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]))
    optimizer.param_groups[0]["lr"] = 0.5
    listed = [p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)]
    return rates, client.param_groups[0]["lr"], client.param_groups is optimizer.param_groups, all(listed)


@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_on_either_object_steers(before):
    for result in run_ranks(scheduled, 2, before):
        assert result == ([(5e-3, 5e-3), (2.5e-3, 2.5e-3), (1.25e-3, 1.25e-3)], 0.5, True, True)


def taken_over(group):
    """An optimizer that has stepped before brings its state."""
    torch.manual_seed(1)
    model = nn.Linear(7, 3)
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain = nn.Linear(7, 3)
    plain.load_state_dict(model.state_dict())
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(4):
        if step == 2:
            client = zs_zero.shard(model, client, stage=3, mesh=group)
        for m, o in ((model, client), (plain, reference)):
            m(data(step, 0)).square().mean().backward()
            o.step()
            o.zero_grad()
    return torch.equal(zs_zero.full_state_dict(model)["weight"], plain.weight)


def test_the_state_of_a_used_optimizer_is_taken_over():
    assert run_ranks(taken_over, 2) == [True, True]


def saved_state(group, stage):
    model, optimizer = build(group, stage)
    train(model, optimizer, group)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    values, state = zs_zero.full_state_dict(model), copy.deepcopy(optimizer.state_dict())
    groups = optimizer.param_groups[0]
    train(model, optimizer, group, first=4)
    expected = zs_zero.full_state_dict(model)["head.weight"]
    zs_zero.load_full_state_dict(model, values)
    optimizer.load_state_dict(state)
    train(model, optimizer, group, first=4)
    same = torch.equal(zs_zero.full_state_dict(model)["head.weight"], expected)
    scheduler.step()
    return same, optimizer.param_groups[0] is groups


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_state_dict_restores_this_ranks_part(stage):
    assert run_ranks(saved_state, 2, stage) == [(True, True)] * 2
