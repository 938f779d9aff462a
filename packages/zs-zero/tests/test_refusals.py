"""What is refused, with which type and words, on every rank and quickly."""

import logging
import time

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import ConfigError, Mesh, ZsError
from zs_comm.testing import run_ranks


class Net(nn.Module):
    def __init__(self, width=8, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x, skip=None, order=None):
        for index in order or range(len(self.layers)):
            if index != skip:
                x = torch.relu(self.layers[index](x))
        return x


# -- by one process ---------------------------------------------------------------
def test_a_stage_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"stage is 0, 1, 2 or 3 \(got 4\)"):
        zs_zero.shard(Net(), stage=4)


def test_a_model_without_parameters():
    with pytest.raises(ConfigError, match="ReLU has no parameters"):
        zs_zero.shard(nn.ReLU(), stage=1)


def test_a_dtype_that_cannot_be():
    with pytest.raises(ConfigError, match=r"dtype is torch.float32, .*\(got torch.int8\)"):
        zs_zero.shard(Net(), dtype=torch.int8)
    with pytest.raises(ConfigError, match="reduce_dtype"):
        zs_zero.shard(Net(), reduce_dtype=torch.float64)


def test_a_foreign_parameter_in_the_optimizer():
    model = Net()
    client = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(
        ConfigError, match=r"param_groups\[0\]\['params'\]\[6\].*shape \(2, 3\).*no parameter of the model"
    ):
        zs_zero.shard(model, client)


def test_a_model_sharded_twice():
    model = Net()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigError, match="Net is sharded already"):
        zs_zero.shard(model)
    optimizer.close()
    zs_zero.shard(model)


def test_a_model_that_is_not_sharded():
    with pytest.raises(ConfigError, match="Net is not sharded"):
        zs_zero.full_state_dict(Net())


def test_parameter_groups_after_sharding():
    model = Net()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigError, match="fixed once a model is sharded"):
        optimizer.add_param_group({"params": []})


def test_names_to_ignore_that_do_not_exist():
    with pytest.raises(ConfigError, match="ignore: 'nosuch' names no module or parameter"):
        zs_zero.shard(Net(), ignore=["nosuch"])


def test_a_predivide_factor_of_zero():
    with pytest.raises(ConfigError, match="predivide_factor is a number above 0"):
        zs_zero.shard(Net(), predivide_factor=0.0)


class Own(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS is not element-wise: it looks at all parameters"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam is not element-wise: it needs sparse gradients"),
        (lambda p: Own(p), "Own is not known to be element-wise.*zero_allow_untested_optimizer"),
    ],
)
def test_optimizers_that_are_not_element_wise(make, why):
    for stage in (1, 2, 3):
        model = Net()
        with pytest.raises(ConfigError, match=f"stage {stage} .*{why}"):
            zs_zero.shard(model, make(list(model.parameters())), stage=stage)
    model = Net()
    zs_zero.shard(model, make(list(model.parameters())), stage=0)


def test_an_untested_optimizer_if_asked_for():
    model = Net()
    optimizer = zs_zero.shard(model, Own(model.parameters()), stage=3, allow_untested_optimizer=True)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()


def test_lbfgs_at_stage_0():
    torch.manual_seed(0)
    model, plain = Net(layers=1), Net(layers=1)
    plain.load_state_dict(model.state_dict())
    optimizer = zs_zero.shard(model, torch.optim.LBFGS(model.parameters(), max_iter=3), stage=0)
    reference = torch.optim.LBFGS(plain.parameters(), max_iter=3)
    x = torch.randn(4, 8)

    def closure_for(m, o):
        def closure():
            o.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            return loss

        return closure

    losses = [o.step(closure_for(m, o)).item() for m, o in ((model, optimizer), (plain, reference))]
    assert losses[0] == losses[1]
    assert torch.equal(model.layers[0].weight, plain.layers[0].weight)


def closure_at_stage_2(group):
    model = Net()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters()), stage=2, mesh=group)
    with pytest.raises(ConfigError, match="whole parameters.*: stage 0"):
        optimizer.step(lambda: 0.0)


def test_a_closure_with_sharded_state():
    run_ranks(closure_at_stage_2, 2)


def test_unfreezing_after_sharding():
    model = Net()
    model.layers[0].weight.requires_grad_(False)
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters()))
    model.layers[0].weight.requires_grad_(True)
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(ConfigError, match="'layers.0.weight' was frozen when the model was sharded"):
        optimizer.step()


# -- by some ranks ---------------------------------------------------------------
def quickly(result, seconds=12.0):
    assert all(outcome.seconds < seconds for outcome in result.outcomes), [o.seconds for o in result.outcomes]
    return result.outcomes


def different_models(group, how):
    model = Net(width=8 + (how == "shape") * group.rank, layers=3 + (how == "layers") * group.rank)
    if how == "frozen" and group.rank:
        model.layers[1].bias.requires_grad_(False)
    dtype = torch.bfloat16 if how == "dtype" and group.rank else None
    stage = 2 + (how == "stage") * group.rank
    zs_zero.shard(model, torch.optim.SGD(model.parameters()), stage=stage, mesh=group, dtype=dtype)


@pytest.mark.parametrize(
    ("how", "named"),
    [("shape", "layers.0.weight"), ("layers", "layers.3.weight"), ("frozen", "layers.1.bias"), ("dtype", "bfloat16"),
     ("stage", "stage 3")],
)  # fmt: skip
def test_ranks_with_different_models(how, named):
    for outcome in quickly(run_ranks(different_models, 2, how, expect_exit=True)):
        assert outcome.error_type == "RankDisagreement", outcome
        assert named in outcome.text and "rank 0" in outcome.text and "rank 1" in outcome.text


def differing_values(group):
    torch.manual_seed(group.rank)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].running_mean.fill_(group.rank)
    zs_zero.shard(model, torch.optim.SGD(model.parameters()), stage=2, mesh=group)
    return model.state_dict()


def test_differing_values_become_rank_0s():
    first, second = run_ranks(differing_values, 2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["1.running_mean"].tolist() == [0.0] * 4


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def what_is_said(group, seed):
    heard = Lines()
    logging.getLogger("zs_zero").addHandler(heard)
    torch.manual_seed(seed * group.rank)
    model = Net()
    zs_zero.shard(model, torch.optim.SGD(model.parameters()), stage=3, mesh=group)
    return heard.lines


def test_differing_values_are_said_once():
    (line,), nothing = run_ranks(what_is_said, 2, 1)
    assert "6 tensors differed between ranks" in line and "layers.0.weight" in line and nothing == []
    assert run_ranks(what_is_said, 2, 0) == [[], []]


def local_and_sent_buffers(group, broadcast):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = zs_zero.shard(
        model, torch.optim.SGD(model.parameters()), stage=2, mesh=group, broadcast_buffers=broadcast
    )
    for step in range(2):
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(group.rank + 2 * step))).sum().backward()
        optimizer.step()
    return model[1].running_mean


def test_buffers_stay_local_unless_asked():
    one, other = run_ranks(local_and_sent_buffers, 2, False)
    assert not torch.equal(one, other)
    one, other = run_ranks(local_and_sent_buffers, 2, True)
    # the second forward started from rank 0's statistics on both: what differs is one step's share
    assert not torch.equal(one, other) and (one - other).abs().max() < 0.2


def different_calls(group, stage, how):
    torch.manual_seed(0)
    model = Net()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage, mesh=group)
    odd = group.rank == group.size - 1
    for step in range(8):
        strange = odd and step == (1 if how != "late" else 6)
        if strange and how == "no backward":
            model(torch.ones(2, 8))
            continue
        model(torch.ones(2, 8), skip=1 if strange and how in ("skip", "late") else None,
              order=[2, 1, 0] if strange and how == "order" else None).sum().backward()  # fmt: skip
        if not (strange and how == "no step"):
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("stage", "how"), [(3, "skip"), (3, "order"), (3, "late"), (3, "no step"), (2, "no backward"), (1, "no step")]
)
def test_ranks_with_different_calls(stage, how):
    started = time.monotonic()
    outcomes = quickly(run_ranks(different_calls, 2, stage, how, expect_exit=True, comm_timeout_s=2.0), seconds=25)
    if how in ("no backward", "no step"):  # the same calls, one window apart: seen when the other rank is through
        outcomes = outcomes[:1]
    for outcome in outcomes:
        assert outcome.error_type in ("RankDisagreement", "CommTimeout", "PeerLost"), outcome
        assert "last" in outcome.text  # each rank's last calls
    if how in ("skip", "order"):
        assert all("layers." in outcome.text for outcome in outcomes)  # the module is named
    assert time.monotonic() - started < 30


def checked_after_each_step(group):
    torch.manual_seed(0)
    model = Net()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, mesh=group)
    checked = [group.checked]
    for step in range(9):
        model(torch.ones(2, 8), order=[2, 1, 0] if step == 5 else None).sum().backward()
        optimizer.step()
        checked.append(group.checked)
    return checked


def test_calls_are_compared_for_three_steps_and_again_after_the_order_changed():
    for checked in run_ranks(checked_after_each_step, 2):
        assert checked[:3] == [True] * 3  # the first three steps
        assert checked[3:6] == [False] * 3
        assert checked[6]  # the order changed in the sixth


def unused_everywhere_but_one(group, stage):
    """Not an error: a parameter used on one rank only."""
    torch.manual_seed(0)
    model = Net()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage, mesh=group)
    model(torch.ones(2, 8), skip=1 if group.rank else None).sum().backward()
    optimizer.step()
    return zs_zero.full_state_dict(model)["layers.1.weight"]


def test_a_layer_skipped_by_one_rank_is_fine_where_parameters_are_whole():
    results = [result for stage in (0, 1, 2) for result in run_ranks(unused_everywhere_but_one, 2, stage)]
    assert all(torch.equal(result, results[0]) for result in results)


def dies(group, stage):
    torch.manual_seed(0)
    model = Net()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage, mesh=group)
    for step in range(4):
        if step == 2 and group.rank == 1:
            import os

            os._exit(7)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rank_that_dies(stage):
    survivors = [o for o in quickly(run_ranks(dies, 3, stage, expect_exit=True)) if o.rank != 1]
    for outcome in survivors:
        assert outcome.error_type in ("PeerLost", "CommTimeout"), outcome
        assert "rank 1" in outcome.text or "members" in outcome.text


def hybrid_that_does_not_fit(group):
    with pytest.raises(ZsError, match=r"replicate.*3|3.*world"):
        Mesh.build(world=group, replicate=3)
    return True


def test_a_mesh_that_does_not_fit_shows_the_equation():
    assert run_ranks(hybrid_that_does_not_fit, 2) == [True, True]


def ignored(group):
    torch.manual_seed(0)
    model = Net()
    client = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = zs_zero.shard(model, client, stage=3, mesh=group, ignore=["layers.1"])
    before = model.layers[1].weight.detach().clone()
    model(torch.full((2, 8), 1.0 + group.rank)).sum().backward()
    local = model.layers[1].weight.grad.clone()
    optimizer.step()
    return torch.allclose(model.layers[1].weight, before - 0.1 * local), "layers.1" in str(optimizer.plan), local


def test_ignored_parameters_stay_whole_and_local():
    first, second = run_ranks(ignored, 2)
    assert first[:2] == second[:2] == (True, False)
    assert not torch.equal(first[2], second[2])
