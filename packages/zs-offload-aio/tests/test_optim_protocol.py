"""zs-zero's conformance check, on every instruction set and for several thread counts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from optim_cases import HYPER, assert_same, fresh, numbers
from zs_offload_aio import optim
from zs_offload_aio.torch import HostOptimizer
from zs_zero.host_optimizer import HostOptimizer as Protocol
from zs_zero.host_optimizer import TorchHostOptimizer
from zs_zero.testing import check_host_optimizer

NEEDS = {"torch", "zs_zero"}
FMA = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
pytestmark = pytest.mark.skipif(not FMA, reason="torch's kernels have no fused multiply-add on this processor")


def test_it_is_one() -> None:
    assert isinstance(HostOptimizer(), Protocol)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", [None, *optim.isas()])
def test_it_obeys_the_protocol(isa: str | None, threads: int) -> None:
    check_host_optimizer(lambda: HostOptimizer(threads=threads, isa=isa))


def test_it_equals_zs_zeros_own_on_many_elements() -> None:
    """Sizes at which the threads share the work and the copy is streamed."""
    numel = (1 << 21) + 333
    for kind, hyper in HYPER:
        states = [fresh(kind, numbers(1, numel)) for _ in range(2)]
        outs = [torch.zeros(numel, dtype=torch.bfloat16) for _ in range(2)]
        optimizers = (TorchHostOptimizer(), HostOptimizer(threads=3))
        for step in (1, 2):
            grad = numbers(step, numel, torch.bfloat16)
            for optimizer, state, out in zip(optimizers, states, outs, strict=True):
                optimizer.step(kind, state, grad, hyper=hyper, step=step, factor=0.3, out=out)
        assert_same({**states[1], "out": outs[1]}, {**states[0], "out": outs[0]}, kind)


def test_torch_avx2_gives_the_same_bits_too() -> None:
    """The conformance check, torch held to its AVX2 kernels; and $ZS_ISA, which a process reads for itself."""
    code = """
import torch
from zs_zero.testing import check_host_optimizer
from zs_offload_aio import optim
from zs_offload_aio.torch import HostOptimizer
for isa in [None, *optim.isas()]:
    check_host_optimizer(lambda: HostOptimizer(isa=isa))
print(torch.backends.cpu.get_cpu_capability(), optim.isa())
"""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ZS_ISA": "portable", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["AVX2", "portable"]), done.stderr
