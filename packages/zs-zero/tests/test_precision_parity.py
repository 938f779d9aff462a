"""Every stage against mixed precision training written out by hand (`reference/training.py`), bit for bit.

Losses, loss scales, which steps were skipped, masters and parameters are equal. Norms are added up in another order, so
they have a bound; what is clipped by is then taken from the training under test, and the rest is bitwise again.
"""

import functools
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero
from torch import Tensor
from zs_comm import Group
from zs_comm.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))

from reference.plans import PRECISIONS, plan_of
from reference.toy import Block, Micro, Toy, loss_of
from reference.training import AdamW, Plan, Scaling, Trained, train

STAGES = (0, 1, 2, 3)
NORM = 1e-6  # relative


def scale_of(scaling: Scaling | None) -> zs_zero.LossScale | float:
    if scaling is None:
        return 1.0  # skips only
    if not scaling.window:
        return scaling.initial
    return zs_zero.DynamicLossScale(
        initial=scaling.initial,
        window=scaling.window,
        hysteresis=scaling.hysteresis,
        consecutive_hysteresis=scaling.consecutive,
        minimum=scaling.minimum,
    )


def sharded(group: Group | None, plan: Plan, stage: int, **options: Any) -> Trained:
    """What `train` does, by zs_zero: this rank's losses and the whole masters."""
    model, rank, run = Toy(), group.rank if group else 0, Trained(losses=[[]])
    client = torch.optim.AdamW(
        model.parameters(), AdamW.rate, AdamW.betas, AdamW.eps, AdamW.decay, foreach=False, fused=False
    )
    dtype = None if plan.dtype == torch.float32 else plan.dtype
    options.setdefault("loss_scale", scale_of(plan.scaling) if plan.skips else None)
    zero = zs_zero.shard(model, client, stage=stage, mesh=group, units=(Block,), dtype=dtype, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(zero, lambda taken: min(1.0, (taken + 1) / max(1, plan.warmup)))
    for step in range(plan.steps):
        run.scales.append(zero.loss_scale)
        run.rates.append(zero.param_groups[0]["lr"])
        for micro in range(plan.accumulate):
            loss, recorded = loss_of(model, Micro(step, micro, rank), plan.inject)
            zero.scale(loss / plan.accumulate).backward()
            run.losses[0].append(recorded)
        zero.step(max_norm=torch.inf if plan.clip is None else plan.clip)  # which uses the gradients up, also skipped
        run.norms.append(float(zero.norm))
        if zero.overflow:
            run.skipped.append(step)
        else:
            schedule.step()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    run.masters = {name: zero.full_param(param) for name, param in trained.items()}
    run.values = zs_zero.full_state_dict(model)
    zero.close()
    return run


def differences(label: str, rank: int, got: Trained, plan: Plan) -> list[str]:
    """Between what rank `rank` of a training of zs has and what the reference gives."""
    wanted = expected(plan, tuple(got.norms) if plan.clip is not None else ())
    lines = [] if got.skipped == wanted.skipped else [f"{label}: skipped {got.skipped} instead of {wanted.skipped}"]
    series = {"loss": (got.losses[0], wanted.losses[rank]), "scale": (got.scales, wanted.scales)}
    for what, (here, there) in (series | {"rate": (got.rates, wanted.rates)}).items():
        unequal = [index for index, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
        lines += [f"{label}: {what} {index}: {here[index]!r} != {there[index]!r}" for index in unequal[:1]]
    for step, (a, b) in enumerate(zip(got.norms, wanted.norms, strict=True)):
        if step not in wanted.skipped and not abs(a - b) <= NORM * b:
            lines.append(f"{label}: norm {step}: {a!r} != {b!r}")
    for kind, here, there in (("master", got.masters, wanted.masters), ("parameter", got.values, wanted.values)):
        for name, value in there.items():
            lines += _apart(f"{label}: {kind} {name}", here[name], value)
    return lines


@functools.cache
def expected(plan: Plan, norms: tuple[float, ...]) -> Trained:
    return train(plan, norms)


def _apart(label: str, got: Tensor, wanted: Tensor) -> list[str]:
    if got.dtype != wanted.dtype:
        return [f"{label}: {got.dtype} != {wanted.dtype}"]
    error = (got.double() - wanted.double()).abs().max().item()
    return [] if error == 0 else [f"{label}: {error:.1e} apart"]


def all_stages(group: Group | None, plan: Plan, options: dict[str, Any]) -> dict[int, Trained]:
    return {stage: sharded(group, plan, stage, **options) for stage in STAGES}


def check(plan: Plan, **options: Any) -> None:
    runs = [all_stages(None, plan, options)] if plan.world == 1 else run_ranks(all_stages, plan.world, plan, options)
    lines = []
    for rank, stages in enumerate(runs):
        for stage, run in stages.items():
            ordered = replace(plan, ranks_first=stage >= 2 and plan.world > 1)
            lines += differences(f"rank {rank}, stage {stage}", rank, run, ordered)
    assert not lines, "\n".join(lines)


CASES = list(itertools.product(PRECISIONS, (1, 2), (1, 4), (False, True)))


@pytest.mark.parametrize(("precision", "world", "accumulate", "clip"), CASES)
def test_parity(precision: str, world: int, accumulate: int, clip: bool) -> None:
    check(plan_of(precision, world=world, accumulate=accumulate, clip=clip))


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("precision", "travels", "adds"),
    [
        ("bf16", FP32, None),
        ("bf16", None, FP32),
        ("bf16", FP32, FP32),
        ("bf16", FP16, None),
        ("fp16", FP32, None),
        ("fp16", FP32, FP32),
        ("fp16 static", BF16, FP32),
        ("fp32", BF16, None),
        ("fp32", FP16, None),
    ],
    ids=str,
)
def test_dtypes_of_the_sums(precision: str, travels: torch.dtype | None, adds: torch.dtype | None) -> None:
    plan = replace(plan_of(precision, world=2, accumulate=4, clip=False), travels=travels, adds=adds, steps=7)
    check(plan, reduce_dtype=travels, grad_accum_dtype=adds)
    if adds is not None:  # one rank has them too
        check(replace(plan, world=1, travels=None, inject=frozenset()), grad_accum_dtype=adds)


def test_a_schedule_stands_still_while_steps_are_skipped() -> None:
    plan = replace(plan_of("fp16", world=1, accumulate=1, clip=False), warmup=10)
    assert train(plan).rates[-1] == AdamW.rate and len(set(train(plan).rates)) == 10
    check(plan)


def not_checked(group: Group | None, plan: Plan) -> list[Trained]:
    return [sharded(group, replace(plan, skips=False), stage) for stage in STAGES]


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_is_not_checked_is_taken_as_torch_takes_it(world: int) -> None:
    plan = plan_of("bf16", world=world, accumulate=1, clip=False)
    first = min(step for step, _, _ in plan.inject)
    wanted = train(replace(plan, skips=False))
    runs = [not_checked(None, plan)] if world == 1 else run_ranks(not_checked, world, plan)
    for rank, stages in enumerate(runs):
        for run in stages:
            assert run.losses[0][: first + 1] == wanted.losses[rank][: first + 1] and not run.skipped
            assert all(math.isnan(loss) for loss in run.losses[0][first + 1 :] + wanted.losses[rank][first + 1 :])
            for name, value in wanted.masters.items():
                assert torch.equal(run.masters[name].isfinite(), value.isfinite()), name


def test_a_scale_that_is_no_power_of_two() -> None:
    """It rounds where it is multiplied and divided: the last bit of a gradient, no more."""
    plan = replace(plan_of("fp16 static", world=1, accumulate=4, clip=True), scaling=Scaling(initial=1000.0))
    wanted = train(plan)
    for stage in STAGES:
        run = sharded(None, plan, stage)
        assert run.skipped == wanted.skipped and set(run.scales) == {1000.0}
        assert run.losses[0] == pytest.approx(wanted.losses[0], rel=1e-3)
        taken = [step for step in range(plan.steps) if step not in run.skipped]
        assert [run.norms[step] for step in taken] == pytest.approx([wanted.norms[step] for step in taken], rel=1e-3)


def test_three_ranks() -> None:
    check(plan_of("fp16", world=3, accumulate=2, clip=True))
