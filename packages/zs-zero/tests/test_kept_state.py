"""bf16 weights without masters, and gradients added in a dtype of their own: saved, resumed, read and written."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero
from zs_comm import Group
from zs_comm.testing import run_ranks
from zs_zero import optimizers
from zs_zero.checkpoint import model_state
from zs_zero.rounding import split

sys.path.insert(0, str(Path(__file__).parent))

from kept_runs import B16, F32, How, Training, differences, train, varied
from test_checkpoint_state import Store, fill, given_by, stored

KEPT = {
    "by chance": How(update="stochastic_rounding", micros=3),
    "compensated": How(update="kahan", accum=F32, micros=3),
    "compensated, fp32 states": How(update="kahan", state=F32, micros=3, local=True, accum=F32),
    "plain, fp32 states": How(master=B16, state=F32, micros=3, accum=F32),
}
Stores = tuple[Store, Store]


def parts_of(training: Training) -> Any:
    return given_by(model_state(training.model)), given_by(training.optimizer.__zs_shardable__())


def go_on(training: Training) -> Any:
    """Ends the window that is open after two of three micro-steps, and steps twice more."""
    training.losses = []
    training.micro(3, 2)
    training.update()
    training.steps(4, 6)
    return training.result()


def saved(group: Group, how: How, stage: int) -> Any:
    training = Training(group, how, stage=stage)
    training.steps(0, 3)
    training.micro(3, 0)
    training.micro(3, 1)
    return parts_of(training), go_on(training)


def loaded(group: Group, how: How, stage: int, stores: Stores) -> Any:
    training = Training(group, how, stage=stage)
    training.steps(7, 8)
    training.micro(8, 0)
    fill(model_state(training.model), stores[0], group)
    fill(training.optimizer.__zs_shardable__(), stores[1], group)
    return parts_of(training), go_on(training)


def stores_of(results: list[Any]) -> Stores:
    return stored([parts[0] for parts, _ in results]), stored([parts[1] for parts, _ in results])


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", KEPT)
def test_a_resumed_run_repeats_itself(name: str, stage: int) -> None:
    how = KEPT[name]
    results = run_ranks(saved, 2, how, stage)
    stores = stores_of(results)
    if how.accum == F32 and (stage == 1 or how.local):
        assert stores[1].ranks[0]["local_grad/first.weight"].dtype == F32
    again = run_ranks(loaded, 2, how, stage, stores)
    for (_, here), (_, wanted) in zip(again, results, strict=True):
        assert not (lines := differences("resumed", here, wanted)), lines

    values = stores[0].whole | {key: value for key, value in stores[1].whole.items() if "grad/" not in key}
    for world, other in ((1, 0), (3, 3)) if stage == 3 else ():  # what was saved stands there, however it is cut
        new = stores_of(run_ranks(loaded, world, how, other, stores))
        assert all(torch.equal((new[0].whole | new[1].whole)[key], value) for key, value in values.items())


def test_compensated_weights_and_masters_are_the_same_to_a_checkpoint() -> None:
    masters = How(state=F32, micros=3, accum=F32)
    stores = stores_of(run_ranks(saved, 1, masters, 0))
    assert stores[0].whole["first.weight"].dtype == F32
    compensated = varied(masters, update="kahan")
    back = stores_of(run_ranks(loaded, 1, compensated, 0, stores))
    for before, after in zip(stores, back, strict=True):
        assert before.whole.keys() == after.whole.keys()
        assert all(torch.equal(after.whole[key], value) for key, value in before.whole.items())


def test_compensated_numbers_are_those_of_masters() -> None:
    """Ties apart, which a weight meets once in 2**16 times."""
    masters = How(steps=6)
    compensated = varied(masters, update="kahan", state=F32)
    assert not differences("compensated", train(None, compensated), train(None, masters))


@pytest.mark.parametrize("name", KEPT)
def test_state_dicts(name: str) -> None:
    how, alone = KEPT[name], Group.single()
    first, second = Training(alone, how, stage=0), Training(alone, how, stage=0)
    first.steps(0, 3)
    second.steps(5, 6)
    weights = zs_zero.full_state_dict(first.model, masters=True)
    assert weights["first.weight"].dtype == (F32 if how.update == "kahan" else B16)
    zs_zero.load_full_state_dict(second.model, weights)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))  # torch takes the very tensors
    for training in (first, second):
        training.losses = []
        training.steps(3, 5)
    assert not (lines := differences("loaded", second.result(), first.result())), lines


# -- written by hand ---------------------------------------------------------------------------------------------------


def write(group: Group, stage: int, how: str) -> list[str]:
    """Writes one element of one parameter, everywhere alike; the others keep what they have, all digits of it."""
    training = Training(group, How(update="kahan"), stage=stage)
    training.steps(0, 2)
    model, optimizer = training.model, training.optimizer
    param = model.first.weight
    wanted = {name: optimizer.full_param(p) for name, p in model.named_parameters()}
    assert not torch.equal(wanted["first.weight"], wanted["first.weight"].bfloat16().float())
    match how:
        case "read":
            with zs_zero.gathered(model):
                param.sum()
        case "gathered":
            wanted["first.weight"].view(-1)[5] = 2.0
            with zs_zero.gathered(param):
                param.data.view(-1)[5] = 2.0
        case "by one rank":
            wanted["first.weight"].view(-1)[5] = 2.0
            with zs_zero.gathered(param, modifier_rank=0):
                if group.rank == 0:
                    param.data.view(-1)[5] = 2.0
        case "set":
            wanted["first.weight"] = torch.linspace(-1, 1, param.numel()).view(param.shape)
            optimizer.set_full_param(param, wanted["first.weight"])
        case "in place":  # which elements is not known then: what rounding cut off of this parameter is dropped
            wanted["first.weight"] = split(wanted["first.weight"])[0].float()
            wanted["first.weight"][0] = 2.0
            with torch.no_grad():
                param[0] = 2.0
    found = {name: optimizer.full_param(p) for name, p in model.named_parameters()}
    lines = [f"stage {stage}: {name}" for name, value in wanted.items() if not torch.equal(found[name], value)]
    whole = zs_zero.full_state_dict(model)
    lines += [f"stage {stage}: model's {n}" for n, v in wanted.items() if not torch.equal(whole[n], split(v)[0])]
    training.steps(2, 3)
    return lines


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("how", ["read", "gathered", "by one rank", "set", "in place"])
def test_writes(how: str, stage: int) -> None:
    if how == "in place" and stage == 3:
        return  # a released parameter refuses
    assert run_ranks(write, 2, stage, how) == [[], []]


# -- optimizers that need whole matrices -------------------------------------------------------------------------------


def whole_matrices(params: Any) -> torch.optim.Optimizer:
    return optimizers.Muon(params, lr=0.01)


def placed(group: Group, how: How) -> list[str]:
    alone = train(group, how, stage=0)
    return [line for stage in (1, 3) for line in differences(f"stage {stage}", train(group, how, stage=stage), alone)]


@pytest.mark.parametrize("name", ["by chance", "compensated", "plain, fp32 states"])
def test_whole_matrices(name: str) -> None:
    how = varied(KEPT[name], micros=1, steps=4, optimizer=whole_matrices)
    assert run_ranks(placed, 2, how) == [[], []]
