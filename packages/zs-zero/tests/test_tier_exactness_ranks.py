"""As `test_tier_exactness`, among two ranks and on a mesh of four: the numbers are those in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from zs_comm import Group, Mesh
from zs_comm.testing import run_ranks
from zs_zero import DynamicLossScale

sys.path.insert(0, str(Path(__file__).parent))

import zoo
from tier_runs import B16, F16, F32, How, compared, policy
from zoo_runs import How as ZooHow
from zoo_runs import same, train_sharded

SOME = ("half of the states", "parameters", "everything")
SCALE = {"scale": lambda: DynamicLossScale(initial=2.0**10, hysteresis=1, window=2), "overflow": 1, "steps": 4}


def check(results: list[list[str]]) -> None:
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(results) for line in found]
    assert not lines, f"{len(lines)} differences\n" + "\n".join(sorted(lines)[:40])


def every_policy(group: Group, folder: Path, dtype: torch.dtype) -> list[str]:
    lines = compared(group, How(dtype=dtype, steps=2), folder, (3,))
    return lines + compared(
        group, How(dtype=dtype, steps=2), folder, (1, 2), ("cpu", "gradients", "half of the states")
    )


@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
def test_every_policy(dtype: torch.dtype, tmp_path: Path) -> None:
    check(run_ranks(every_policy, 2, tmp_path, dtype))


def windows(group: Group, folder: Path, clip: str) -> list[str]:
    lines = []
    for dtype, local in ((F32, "coalesced"), (B16, ""), (B16, "no_sync")):
        how = How(dtype=dtype, micros=3, steps=2, clip=clip, local=local)
        lines += compared(group, how, folder, (3,), ("gradients", "parameters", "everything"))
    return lines


@pytest.mark.parametrize("clip", ["in step", "by hand", "early"])
def test_windows_and_clipping(clip: str, tmp_path: Path) -> None:
    check(run_ranks(windows, 2, tmp_path, clip))


KEPT = {
    "momentum": How(optimizer="momentum", dtype=B16),
    "adagrad": How(optimizer="adagrad", schedule=True, groups=True),
    "amsgrad": How(optimizer="adam, amsgrad, maximize", groups=True),
    "lion": How(optimizer="lion", dtype=B16),
    "bf16 states": How(dtype=B16, micros=2, kept=(("state_dtype", B16),)),
    "bf16 masters": How(dtype=B16, micros=2, kept=(("master_dtype", B16),)),
    "compensated": How(dtype=B16, micros=2, kept=(("bf16_update", "kahan"),)),
    "by chance": How(dtype=B16, kept=(("bf16_update", "stochastic_rounding"),)),
    "gradients added in fp32": How(dtype=B16, micros=2, clip="by hand", kept=(("grad_accum_dtype", F32),)),
    "gradients sent in fp32": How(dtype=B16, micros=2, clip="in step", kept=(("reduce_dtype", F32),)),
    "gradients sent in bf16": How(micros=2, clip="in step", kept=(("reduce_dtype", B16),)),
    "prescaled": How(kept=(("prescale", True),)),
    "predivided": How(kept=(("predivide_factor", 2.0), ("broadcast_buffers", True))),
    "units stay whole": How(kept=(("reshard_after_forward", False), ("prefetch", False))),
    "overflow": How(micros=2, clip="in step", **SCALE),
    "overflow in fp16": How(dtype=F16, micros=2, **SCALE),
}


def variations(group: Group, folder: Path) -> list[str]:
    return [
        f"{name}: {line}"
        for name, how in KEPT.items()
        for line in compared(group, how, folder, (3,), ("half of the states", "everything"))
    ]


@pytest.mark.matrix
def test_variations(tmp_path: Path) -> None:
    check(run_ranks(variations, 2, tmp_path, timeout_s=90))


def early(group: Group, folder: Path) -> list[str]:
    lines = []
    for how in (How(steps=4), How(micros=2, clip="early"), How(micros=2, clip="in step", dtype=B16), How(**SCALE)):
        lines += compared(group, how, folder, (3,), SOME, zs_early_update=True)
    return lines


def test_updates_that_begin_in_backward(tmp_path: Path) -> None:
    check(run_ranks(early, 2, tmp_path))


CASES = (
    "tied embeddings", "many parameters used on some ranks", "frozen parameters", "two forwards and backwards",
    "checkpoint, reentrant", "many parameters, recomputed in pairs",
)  # fmt: skip


def hard_models(group: Group, folder: Path) -> list[str]:
    lines = []
    for case in map(zoo.BY_NAME.__getitem__, CASES):
        for dtype, name in ((F32, "parameters"), (B16, "everything")):
            how = ZooHow(dtype=dtype, steps=2, accumulate=2, clip=0.1)
            wanted = train_sharded(case, how, group, stage=3)
            found = train_sharded(case, how, group, stage=3, **policy(name, folder))
            lines += same(f"{case.name}: {name}", found, wanted)
    return lines


@pytest.mark.matrix
def test_hard_models(tmp_path: Path) -> None:
    check(run_ranks(hard_models, 2, tmp_path, timeout_s=90))


def on_a_mesh(group: Group, folder: Path) -> list[str]:
    mesh = Mesh.build(world=group, replicate=2)
    lines = compared(mesh, How(steps=2, clip="in step", groups=True), folder, (1, 3), SOME[1:])
    return lines + compared(mesh, How(dtype=B16, micros=2, clip="by hand"), folder, (3,), SOME[1:])


def test_replicas_of_shards(tmp_path: Path) -> None:
    check(run_ranks(on_a_mesh, 4, tmp_path))


def three(group: Group, folder: Path) -> list[str]:
    return compared(group, How(micros=2, clip="in step"), folder, (3,), SOME)


def test_three_ranks(tmp_path: Path) -> None:
    check(run_ranks(three, 3, tmp_path))
