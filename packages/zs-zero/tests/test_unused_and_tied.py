"""Parameters without a gradient are left alone, as torch leaves them; tied weights and reused modules are one."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero
from torch import Tensor, nn
from zs_comm import Group, RankDisagreement
from zs_comm.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))

from zoo import VOCAB, WIDTH, Block, Chosen, Detours, Gpt

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])
WORLDS = pytest.mark.parametrize("world", [1, 2])


def sharded(model: nn.Module, group: Group, stage: int, **options: Any) -> zs_zero.ZeroOptimizer:
    client = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    return zs_zero.shard(model, client, stage=stage, mesh=group, units=(Block,), **options)


def data(seed: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


def unused(group: Group, stage: int, dtype: torch.dtype | None) -> dict[str, Any]:
    model = Chosen()
    optimizer = sharded(model, group, stage, dtype=dtype)
    idle, busy = model.blocks[1].up.weight, model.blocks[0].up.weight
    first, found = optimizer.full_param(idle), {}
    for step, path in enumerate([(0, 2), (0, 2), (0, 1, 2), (2, 0)]):
        model(data(step).to(dtype or torch.float32), path).float().square().mean().backward()
        found[f"gradient {step}"] = optimizer.full_grad(idle) is not None
        optimizer.step()
        optimizer.zero_grad()
        count = optimizer.full_state(idle, "step")
        found[f"steps {step}"] = None if count is None else count.item()
        found[f"unmoved {step}"] = torch.equal(optimizer.full_param(idle), first)
        if step == 2:
            moments = optimizer.full_state(idle, "exp_avg")
            last = optimizer.full_param(idle)
    found["left alone again"] = torch.equal(optimizer.full_param(idle), last)
    found["moments kept"] = torch.equal(optimizer.full_state(idle, "exp_avg"), moments)
    found["steps of another"] = optimizer.full_state(busy, "step").item()
    return found


@STAGES
@WORLDS
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_parameter_without_gradient_is_left_alone(world: int, stage: int, dtype: torch.dtype | None) -> None:
    for found in run_ranks(unused, world, stage, dtype):
        assert found == {
            "gradient 0": False, "steps 0": None, "unmoved 0": True,
            "gradient 1": False, "steps 1": None, "unmoved 1": True,
            "gradient 2": True, "steps 2": 1.0, "unmoved 2": False,
            "gradient 3": False, "steps 3": 1.0, "unmoved 3": False,
            "left alone again": True, "moments kept": True, "steps of another": 4.0,
        }  # fmt: skip


def one_sided(group: Group, stage: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Detours()
    optimizer = sharded(model, group, stage)
    detour = model.blocks[0].detour.weight
    plain = Detours()
    plain.load_state_dict(zs_zero.full_state_dict(model))
    for each in (model, plain):
        each(data(group.rank), (group.rank == 1, False)).square().mean().backward()
    alone = plain.blocks[0].detour.weight.grad
    full = optimizer.full_grad(detour)
    optimizer.step()
    return torch.zeros(()) if alone is None else alone, full, optimizer.full_state(detour, "step")


@STAGES
def test_a_gradient_of_one_rank_is_its_share_of_the_mean(stage: int) -> None:
    (nothing, full, steps), (alone, full_there, _) = run_ranks(one_sided, 2, stage)
    assert not nothing.any()
    assert torch.equal(full, alone / 2)
    assert torch.equal(full, full_there)
    assert steps.item() == 1.0


def divergent_units(group: Group, stage: int) -> list[float]:
    model = Chosen()
    optimizer = sharded(model, group, stage)
    losses = []
    for step in range(3):
        loss = model(data(step), (0, 1, 2) if group.rank == 0 else (0, 2)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_whole_unit_may_run_on_one_rank(stage: int) -> None:
    losses = run_ranks(divergent_units, 2, stage)
    assert all(len(found) == 3 for found in losses)


def test_a_whole_unit_on_one_rank_is_an_error_at_stage_3() -> None:
    result = run_ranks(divergent_units, 2, 3, expect_exit=True)
    assert [outcome.error_type for outcome in result.outcomes] == [RankDisagreement.__name__] * 2
    assert all("blocks.1" in outcome.text and "blocks.2" in outcome.text for outcome in result.outcomes)


def tied(group: Group, stage: int) -> dict[str, Any]:
    model = Gpt(tied=True)
    optimizer = sharded(model, group, stage)
    first = optimizer.full_param(model.embed.weight)
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = zs_zero.full_state_dict(model)
    found = {
        "one parameter": model.head.weight is model.embed.weight,
        "in both places": torch.equal(whole["head.weight"], whole["embed.weight"]),
        "stepped once a step": optimizer.full_state(model.embed.weight, "step").item(),
        "moved": not torch.equal(whole["embed.weight"], first),
        "planned once": sum(e.spec.numel == VOCAB * WIDTH for flat in optimizer.plan.flats() for e in flat.entries),
    }
    optimizer.close()
    return found


@STAGES
@WORLDS
def test_tied_weights_are_one_parameter(world: int, stage: int) -> None:
    for found in run_ranks(tied, world, stage):
        assert found == {
            "one parameter": True, "in both places": True, "stepped once a step": 2.0, "moved": True, "planned once": 1,
        }  # fmt: skip


def reused(group: Group, stage: int) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    model, plain = Chosen(), Chosen()
    plain.load_state_dict(model.state_dict())
    optimizer = sharded(model, group, stage)
    for each in (model, plain):
        each(data(0), (0, 1, 0, 0, 2)).square().mean().backward()
    return optimizer.full_grad(model.blocks[0].down.weight), plain.blocks[0].down.weight.grad


@STAGES
@WORLDS
def test_all_uses_of_a_module_count(world: int, stage: int) -> None:
    for full, wanted in run_ranks(reused, world, stage):
        assert torch.equal(full, wanted)
