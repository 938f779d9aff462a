"""Casts, sums of squares, the thread pool and the choice of the instruction set."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

import pytest
import torch
from optim_cases import GRADS, bits, differing, fresh, numbers, step
from zs_offload_aio import optim

NEEDS = {"torch"}
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=optim.isas())
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def patterns() -> torch.Tensor:
    """Bit patterns of fp32: around every value of fp16 and bf16 and its neighbour's middle, and a million others."""
    source = torch.Generator().manual_seed(3)
    anything = torch.randint(-(2**31), 2**31, (1_000_000,), generator=source)
    every = torch.arange(65536, dtype=torch.int64)
    half = every.to(torch.int32).to(torch.int16).view(torch.float16).float().view(torch.int32).long()
    edges = [every * 65536 - 2**31 + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001)]
    edges += [half + low for low in (-1, 0, 1, 0xFFF, 0x1000, 0x1001)]
    edges += [torch.arange(0x33000000 - 64, 0x33000000 + 64)]  # half of fp16's least denormal
    return torch.cat([anything, *edges]).clamp(-(2**31), 2**31 - 1).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", GRADS, ids=str)
def test_the_copy_is_torchs_cast_of_every_value(isa: str, dtype: torch.dtype) -> None:
    param = patterns()
    param = param[~param.isnan()]
    before = param.clone()
    out = torch.zeros(param.numel(), dtype=dtype)
    optim.sgd(param, torch.ones_like(param), step=1, lr=0.0, out=out, isa=isa)  # p + 1 * -0 is p
    assert torch.equal(bits(param), bits(before))
    assert torch.equal(bits(out), bits(before.to(dtype)))


def test_nan_becomes_torchs_nan(isa: str) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch's scalar code makes another NaN than its vector code")
    param = torch.tensor([0x7FC00000, 0x7FC12345, 0x7FFFFFFF, -0x400000, -1] * 20, dtype=torch.int32)
    param = param.view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros(param.numel(), dtype=dtype)
        optim.sgd(param, torch.ones_like(param), step=1, lr=0.0, out=out, isa=isa)
        assert torch.equal(bits(out), bits(param.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_gradient_of_16_bits_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    grad = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    param = torch.zeros(65536)
    optim.sgd(param, grad, step=1, lr=1.0, isa=isa)
    assert bool(((param == -grad.float()) | (param.isnan() & grad.isnan())).all())


def test_large_outputs_are_streamed_to_the_right_place(isa: str) -> None:
    """From 4 MiB on the copy goes past the caches, from its first whole line on; nothing around it is touched."""
    numel = (1 << 21) + 77
    for dtype in GRADS:
        for shift in (0, 1, 31):
            memory = torch.full((numel + 96,), 5.0, dtype=dtype)
            out = memory[32 + shift :][:numel]
            param = numbers(5, numel)
            optim.sgd(param, torch.zeros(numel), step=1, lr=0.0, out=out, threads=2, isa=isa)
            assert differing(out, param.to(dtype)) == 0
            assert bool((memory[: 32 + shift] == 5).all()) and bool((memory[32 + shift + numel :] == 5).all())


@pytest.mark.parametrize("dtype", GRADS, ids=str)
def test_the_sum_of_squares_is_exact_to_1e_12(dtype: torch.dtype) -> None:
    for numel in (0, 1, 31, 32, 33, 16384, 16385, 40_001):
        grad = numbers(numel, numel, dtype)
        exact = sum((Fraction(value) ** 2 for value in grad.tolist()), Fraction(0))
        found = {optim.sum_of_squares(grad, isa=isa) for isa in optim.isas()}
        assert len(found) == 1
        total, finite = found.pop()
        assert finite
        assert abs(Fraction(total) - exact) <= exact * Fraction(1, 10**12)


def test_the_sum_of_squares_does_not_depend_on_threads_or_address() -> None:
    grad = numbers(1, 300_001)
    shifted = torch.cat([torch.zeros(3), grad])[3:]
    found = set()
    for values in (grad, shifted):
        for isa in optim.isas():
            found |= {optim.sum_of_squares(values, threads=threads, isa=isa) for threads in (1, 2, 3, 7)}
    assert len(found) == 1


def test_what_is_not_finite_is_found(isa: str) -> None:
    for dtype in GRADS:
        for position in (0, 31, 16383, 16384, 40_000):
            for value in (math.inf, -math.inf, math.nan):
                grad = torch.ones(40_001, dtype=dtype)
                grad[position] = value
                total, finite = optim.sum_of_squares(grad, threads=2, isa=isa)
                assert not finite and not math.isfinite(total)
    total, finite = optim.sum_of_squares(torch.full((40_000,), -torch.finfo(torch.float32).max), isa=isa)
    assert finite and math.isclose(total, 40_000 * torch.finfo(torch.float32).max ** 2, rel_tol=1e-12)


NUMEL = 200_000
PARAM, GRADIENTS = numbers(2, NUMEL), [numbers(number, NUMEL) for number in (1, 2, 3)]


def memory(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def three_steps(threads: int = 1) -> dict[str, torch.Tensor]:
    state = fresh("adamw", PARAM)
    for number, grad in enumerate(GRADIENTS, start=1):
        step("adamw", state, grad, number=number, threads=threads, **ADAMW)
    return state


def test_flushing_denormals_elsewhere_changes_nothing() -> None:
    wanted, tiny = three_steps(), torch.full((100,), 1e-41)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        found = three_steps(), three_steps(threads=3)
        norm = optim.sum_of_squares(tiny)[0]
    finally:
        torch.set_flush_denormal(False)
    for state in found:
        assert all(differing(state[name], tensor) == 0 for name, tensor in wanted.items())
    assert norm > 0


def test_callers_on_several_threads_take_turns() -> None:
    wanted, found = three_steps(), {}

    def work(index: int) -> None:
        found[index] = three_steps(threads=1 + index % 3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == list(range(6))
    for state in found.values():
        assert all(differing(state[name], tensor) == 0 for name, tensor in wanted.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own() -> None:
    wanted = three_steps(threads=3)  # the parent's threads are there now
    state = fresh("adamw", PARAM)  # here: torch's own threads do not survive a fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads is what is tested
        child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, grad in enumerate(GRADIENTS, start=1):
                step("adamw", state, grad, number=number, threads=3, **ADAMW)
            code = 0 if all(memory(tensor) == memory(wanted[name]) for name, tensor in state.items()) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(differing(three_steps(threads=3)[name], wanted[name]) == 0 for name in wanted)


def test_the_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZS_ISA", raising=False)
    assert optim.isa() == optim.isas()[0]
    assert optim.isas()[-1] == "portable"
    for name in optim.isas():
        monkeypatch.setenv("ZS_ISA", name)
        assert optim.isa() == name
    monkeypatch.setenv("ZS_ISA", "avx9")
    state = fresh("adamw", torch.ones(5))
    with pytest.raises(ValueError, match="ZS_ISA=avx9: unknown, it is one of .*portable"):
        step("adamw", state, torch.ones(5), number=1, **ADAMW)
    assert torch.equal(state["param"], torch.ones(5))
    with pytest.raises(ValueError, match="isa=mmx: unknown"):
        optim.sum_of_squares(torch.ones(5), isa="mmx")


def test_importing_it_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, zs_offload_aio.optim; print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
