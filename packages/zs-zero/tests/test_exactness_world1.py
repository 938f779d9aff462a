"""One rank: every stage gives plain torch's bits: the loss of every step, every parameter and buffer at the end."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from zoo import BY_NAME, CASES, OPTIMIZERS, Case
from zoo_runs import How, close_grads, same, train_plain, train_sharded

STAGES = (0, 1, 2, 3)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def differences(case: Case, how: How, stages: Sequence[int]) -> str:
    wanted = train_plain(case, how)
    runs = {stage: train_sharded(case, how, stage=stage) for stage in stages}
    return "\n".join(line for stage in stages for line in same(f"stage {stage}", runs[stage], wanted))


@DTYPES
@pytest.mark.parametrize("case", [*CASES, *OPTIMIZERS], ids=repr)
def test_bitwise(case: Case, dtype: torch.dtype) -> None:
    assert not differences(case, How(dtype=dtype), STAGES)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_bitwise_with_accumulation(case: Case, dtype: torch.dtype) -> None:
    # one rank has one path for all stages: the first and the last stand for them
    assert not differences(case, How(dtype=dtype, accumulate=4), (0, 3))


@DTYPES
@pytest.mark.parametrize("case", [BY_NAME["gpt"], BY_NAME["frozen parameters"], BY_NAME["primes"]], ids=repr)
def test_clipping(case: Case, dtype: torch.dtype) -> None:
    how = How(dtype=dtype, clip=0.3, grads=True)
    plain = train_plain(case, how)
    runs = [train_sharded(case, how, stage=stage) for stage in STAGES]
    assert runs[0].norms[0] == pytest.approx(plain.norms[0], rel=1e-6), "the norm is not torch's"
    assert max(runs[0].norms) > 0.3, "nothing was clipped"
    assert not close_grads("stage 0", runs[0], plain, bound=0.0)
    assert not [line for stage in STAGES[1:] for line in same(f"stage {stage}", runs[stage], runs[0])]
