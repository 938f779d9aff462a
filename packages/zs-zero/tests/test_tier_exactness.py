"""In every tier the numbers are those of the run in memory, bit for bit; here among one rank. See `tier_runs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zs_comm import Group
from zs_zero import DynamicLossScale

sys.path.insert(0, str(Path(__file__).parent))

import zoo
from tier_runs import B16, F16, F32, OPTIMIZERS, PARAMETERS, STATES, How, compared, differences, policy, train, varied
from zoo_runs import How as ZooHow
from zoo_runs import same, train_sharded

SOME = ("half of the states", "parameters", "everything")

# Kept precisions, each with what else may go with it: {name: (dtype, keywords)}.
KEPT: dict[str, How] = {
    "bf16 states": How(dtype=B16, kept=(("state_dtype", B16),)),
    "bf16 masters": How(dtype=B16, kept=(("master_dtype", B16),)),
    "bf16 masters, fp32 states": How(dtype=B16, kept=(("master_dtype", B16), ("state_dtype", F32))),
    "compensated": How(dtype=B16, kept=(("bf16_update", "kahan"),)),
    "compensated, fp32 states": How(dtype=B16, kept=(("bf16_update", "kahan"), ("state_dtype", F32))),
    "by chance": How(dtype=B16, kept=(("bf16_update", "stochastic_rounding"), ("seed", 3))),
    "gradients added in fp32": How(dtype=B16, kept=(("grad_accum_dtype", F32),)),
    "bf16 masters, gradients added in fp32": How(dtype=B16, kept=(("master_dtype", B16), ("grad_accum_dtype", F32))),
    "fp32, bf16 states": How(kept=(("state_dtype", B16),)),
    "fp32, gradients added in bf16": How(kept=(("grad_accum_dtype", B16),)),
}


def check(lines: list[str]) -> None:
    assert not lines, f"{len(lines)} differences\n" + "\n".join(sorted(lines)[:40])


@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_policy(stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    check(compared(None, How(dtype=dtype), tmp_path, (stage,)))


@pytest.mark.parametrize("clip", ["in step", "by hand", "early"])
@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
def test_windows_and_clipping(clip: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for local in ("", "no_sync", "all", "coalesced"):
        how = How(dtype=dtype, micros=3, steps=2, clip=clip, local=local)
        chosen = STATES + PARAMETERS if not local else SOME
        if (dtype, clip, local) == (B16, "early", "no_sync"):
            chosen = SOME[:2]  # clipped gradients have more digits than bf16, in which they would wait in files
        check(compared(None, how, tmp_path, (3,), chosen))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, tmp_path: Path) -> None:
    for dtype in (F32, B16):
        check(compared(None, How(optimizer=name, dtype=dtype), tmp_path, (3,), (*SOME, "cpu")))


@pytest.mark.parametrize("name", KEPT)
def test_kept_precisions(name: str, tmp_path: Path) -> None:
    for optimizer in ("fused adamw", "momentum"):
        how = varied(KEPT[name], optimizer=optimizer, micros=2, clip="in step")
        check(compared(None, how, tmp_path, (3,), (*SOME, "cpu", "gradients")))


@pytest.mark.parametrize("dtype", [F32, B16, F16], ids=["fp32", "bf16", "fp16"])
def test_skipped_steps(dtype: torch.dtype, tmp_path: Path) -> None:
    """The second step overflows: nothing changes but the scale."""
    how = How(
        dtype=dtype, micros=2, steps=4, overflow=1, clip="in step", groups=True,
        scale=lambda: DynamicLossScale(initial=2.0**10, hysteresis=1, window=2),
    )  # fmt: skip
    check(compared(None, how, tmp_path, (1, 3)))
    assert train(None, how, stage=3, **policy("everything", tmp_path))["scale"] == 2.0**9  # halved


def test_a_loss_scale_that_stays(tmp_path: Path) -> None:
    for optimizer in ("adamw", "fused adamw"):
        for clip in ("in step", "by hand"):  # two factors: of the scale, and of clipping
            how = How(dtype=F16, micros=2, clip=clip, scale=lambda: 1024.0, optimizer=optimizer)
            check(compared(None, how, tmp_path, (3,), SOME))


@pytest.mark.parametrize("optimizer", ["fused adamw", "momentum", "adam, amsgrad, maximize"])
def test_groups_and_schedules(optimizer: str, tmp_path: Path) -> None:
    how = How(groups=True, schedule=True, optimizer=optimizer, steps=4)
    check(compared(None, how, tmp_path, (1, 3), (*SOME, "cpu", "some parameters")))


def test_groups_that_keep_different_states(tmp_path: Path) -> None:
    def client(params: Any) -> torch.optim.Optimizer:
        half = len(params) // 2
        return torch.optim.SGD([{"params": params[:half], "momentum": 0.9}, {"params": params[half:]}], lr=0.01)

    OPTIMIZERS["of two kinds"] = client  # type: ignore[index]
    try:
        check(compared(None, How(optimizer="of two kinds"), tmp_path, (3,), (*SOME, "cpu")))
    finally:
        del OPTIMIZERS["of two kinds"]  # type: ignore[attr-defined]


def test_updates_that_begin_in_backward(tmp_path: Path) -> None:
    """What an early trial assumes holds, or does not: clips, more backwards, local ones, other learning rates."""
    for how in (
        How(steps=4), How(steps=4, micros=2, clip="in step"), How(steps=4, micros=2, clip="early"),
        How(steps=4, micros=2, local="no_sync"), How(steps=4, schedule=True, groups=True),
        How(steps=4, dtype=F16, overflow=1, scale=lambda: DynamicLossScale(initial=2.0**10, hysteresis=1)),
        How(steps=4, dtype=B16, optimizer="momentum"),
    ):  # fmt: skip
        chosen = ("states", "gradients", "some parameters", "everything", "parameters alone")
        check(compared(None, how, tmp_path, (3,), chosen, zs_early_update=True))


@pytest.mark.parametrize("case", [*zoo.CASES, *zoo.OPTIMIZERS], ids=repr)
def test_hard_models(case: zoo.Case, tmp_path: Path) -> None:
    for dtype, names in ((F32, ("parameters", "half of the states")), (B16, ("everything",))):
        how = ZooHow(dtype=dtype, steps=2, accumulate=2, clip=0.1)
        wanted = train_sharded(case, how, stage=3)
        for name in names:
            check(same(name, train_sharded(case, how, stage=3, **policy(name, tmp_path)), wanted))


def test_through_the_fast_store(tmp_path: Path) -> None:
    pytest.importorskip("zs_offload_aio")
    for name in SOME:
        options = policy(name, tmp_path) | {"aio": {"zs_store": "aio"}}
        check(differences(name, train(Group.single(), How(), **options), train(None, How())))


def test_files_are_gone_at_the_end(tmp_path: Path) -> None:
    train(None, How(steps=1), **policy("everything", tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
