"""Several ranks: the stages among each other and against DDP. What is bitwise and what has a bound:

- One backward per step: all stages and DDP do the same additions at two ranks, so all bits are equal. At three ranks
  and more DDP's ring adds in another order than rank order, which the stages share: equal among each other, DDP by a
  bound.
- More backwards per step: stages 0 and 1 add a rank's gradients first and the ranks' sums last, as DDP does under
  `no_sync`; stages 2 and 3 reduce each backward and add the results. Equal within a pair, the pairs by a bound.
- Replicate x shard adds within the shard axis first: another order again.

The bounds are those of fp32 additions in another order, after 20 steps of an optimizer that divides by small numbers.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from zs_comm import Group
from zs_comm.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))

from zoo import BY_NAME, CASES, OPTIMIZERS
from zoo_runs import How, Run, close, close_grads, same, train_plain, train_sharded

STAGES = (0, 1, 2, 3)
LOSSES = 1e-5  # relative
PARAMS = 2e-5  # absolute; the parameters are of order 1 and move by about 5e-2
GRADS = 1e-6  # of the tensor's largest value
FEW = ["tied embeddings", "many parameters used on some ranks", "primes", "a module used twice"]


def stages(group: Group, name: str, how: How, **options: Any) -> dict[int, Run]:
    return {stage: train_sharded(BY_NAME[name], how, group, stage=stage, **options) for stage in STAGES}


def compare(group: Group, name: str, how: How) -> list[str]:
    """On each rank: its own differences."""
    case, runs = BY_NAME[name], stages(group, name, how)
    lines = same("stage 1 against 0", runs[1], runs[0]) + same("stage 3 against 2", runs[3], runs[2])
    if case.backwards * how.accumulate == 1:
        lines += same("stage 2 against 1", runs[2], runs[1])
    elif how.dtype == torch.float32:
        lines += close("stage 2 against 1", runs[2], runs[1], losses=LOSSES, params=PARAMS)
        lines += close_grads("stage 2 against 1", runs[2], runs[1], bound=GRADS)
    if how.dtype == torch.float32:
        ddp = train_plain(case, how, group)
        if group.size == 2:
            lines += same("stage 0 against DDP", runs[0], ddp)
        else:
            lines += close("stage 0 against DDP", runs[0], ddp, losses=LOSSES, params=PARAMS)
    return lines


def check(results: list[list[str]]) -> None:
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(results) for line in found]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", [case.name for case in [*CASES, *OPTIMIZERS]])
def test_two_ranks(name: str) -> None:
    check(run_ranks(compare, 2, name, How()))


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_two_ranks_in_bf16(name: str) -> None:
    check(run_ranks(compare, 2, name, How(dtype=torch.bfloat16)))


@pytest.mark.parametrize("name", [*FEW, "cnn with batch norm", "two forwards and backwards", "checkpoint, reentrant"])
def test_two_ranks_with_accumulation(name: str) -> None:
    check(run_ranks(compare, 2, name, How(accumulate=2, grads=True)))


@pytest.mark.parametrize("name", FEW[:3])
def test_two_ranks_with_accumulation_in_bf16(name: str) -> None:
    check(run_ranks(compare, 2, name, How(dtype=torch.bfloat16, accumulate=3)))


@pytest.mark.parametrize(("world", "name"), [*((3, name) for name in FEW), *((4, name) for name in FEW[:2])])
def test_more_ranks(name: str, world: int) -> None:
    check(run_ranks(compare, world, name, How()))


def compare_hybrid(group: Group, name: str, how: How) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    runs = stages(group, name, how, mesh=mesh)
    whole = train_sharded(BY_NAME[name], how, group, stage=0)
    lines = []
    for a, b in pairwise(STAGES[1:]):
        lines += same(f"stage {b} against {a}", runs[b], runs[a])
    for stage, run in runs.items() if how.dtype == torch.float32 else ():
        lines += close(f"stage {stage} against one axis", run, whole, losses=LOSSES, params=PARAMS)
    return lines


@pytest.mark.parametrize("name", FEW[:3])
def test_replicate_by_shard(name: str) -> None:
    check(run_ranks(compare_hybrid, 4, name, How()))


@pytest.mark.parametrize(("world", "run"), [(3, compare), (4, compare_hybrid)])
def test_more_ranks_in_bf16(world: int, run: Callable[..., list[str]]) -> None:
    check(run_ranks(run, world, FEW[0], How(dtype=torch.bfloat16)))


def compare_clipped(group: Group, name: str, how: How) -> list[str]:
    runs, ddp = stages(group, name, how), train_plain(BY_NAME[name], how, group)
    lines = [line for a, b in pairwise(STAGES) for line in same(f"stage {b} against {a}", runs[b], runs[a])]
    if max(runs[0].norms) <= how.clip:
        lines.append("nothing was clipped")
    if abs(runs[0].norms[0] - ddp.norms[0]) > 1e-6 * ddp.norms[0]:
        lines.append(f"the first norm is {runs[0].norms[0]}, torch's is {ddp.norms[0]}")
    return lines + close("stage 0 against DDP", runs[0], ddp, losses=LOSSES, params=PARAMS)


@pytest.mark.parametrize(("world", "name"), [(2, FEW[0]), (2, FEW[1]), (2, FEW[2]), (3, FEW[1]), (3, FEW[3])])
def test_clipping(name: str, world: int) -> None:
    check(run_ranks(compare_clipped, world, name, How(clip=0.3)))
