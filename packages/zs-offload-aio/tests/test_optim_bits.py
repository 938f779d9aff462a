"""The same bits on every instruction set, thread count and slicing, and torch's bits where torch has the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import GRADS, HYPER, MORE, assert_same, cut, differing, fresh, numbers, pieces, step
from torch import Tensor
from zs_offload_aio import optim

NEEDS = {"torch"}
NUMEL = 70_000  # a multiple of every vector, and enough for three threads
STEPS = 100
FMA = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_fma = pytest.mark.skipif(not FMA, reason="torch's kernels have no fused multiply-add on this processor")
FACTORS = (1.0, 0.1, 1 / 3, 1 / 65536, 7.0)


def gradients(dtype: torch.dtype) -> list[Tensor]:
    return [numbers(100 + seed, NUMEL, dtype) for seed in range(7)]


@pytest.mark.parametrize("dtype", GRADS, ids=str)
@pytest.mark.parametrize(("kind", "hyper"), HYPER, ids=[kind for kind, _ in HYPER])
def test_every_isa_thread_count_and_slicing_gives_the_same_bits(
    kind: str, hyper: dict[str, Any], dtype: torch.dtype
) -> None:
    grads = gradients(dtype)
    wanted: dict[str, Tensor] | None = None
    for isa in reversed(optim.isas()):  # portable first: the reference
        for threads in (1, 2, 3):
            state = fresh(kind, numbers(1, NUMEL))
            state["out"] = torch.zeros(NUMEL, dtype=dtype)
            for number in range(1, STEPS + 1):
                keywords = {**hyper, "factor": FACTORS[number % 5], "threads": threads, "isa": isa}
                grad = grads[number % 7]
                for begin, end in pieces(NUMEL, number * threads):
                    part = cut(state, begin, end)
                    step(kind, part, grad[begin:end], number=number, out=part["out"], **keywords)
            if wanted is None:
                wanted = state
                assert differing(state["out"], state["param"].to(dtype)) == 0
            assert_same(state, wanted, f"{kind}, {dtype} gradients, {isa}, {threads} threads")


def reference(kind: str, param: torch.nn.Parameter, hyper: dict[str, Any]) -> torch.optim.Optimizer:
    classes = {"adamw": "AdamW", "adam": "Adam", "adagrad": "Adagrad", "sgd": "SGD"}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, classes[kind])([param], fused=True, **hyper)
    return optimizer


@needs_fma
@pytest.mark.parametrize("dtype", GRADS, ids=str)
@pytest.mark.parametrize(("kind", "hyper"), [case for case in HYPER + MORE if case[0] != "lion"])
def test_torch_fused_gives_the_same_bits_on_whole_vectors(kind: str, hyper: dict[str, Any], dtype: torch.dtype) -> None:
    """SGD too: its fused and its other forms agree on whole vectors (they differ in the last few elements only)."""
    grads = gradients(dtype)
    state = fresh(kind, numbers(1, NUMEL))
    param = torch.nn.Parameter(state["param"].clone())
    optimizer = reference(kind, param, hyper)
    for number in range(1, STEPS + 1):
        grad, factor = grads[number % 7], FACTORS[number % 5]
        param.grad = grad.float() * factor
        optimizer.step()
        step(kind, state, grad, number=number, factor=factor, **hyper)
    theirs = optimizer.state[param]
    wanted = {"param": param.detach(), **{name: theirs[name] for name in state if theirs.get(name) is not None}}
    assert_same(state, wanted, f"{kind} {hyper}")


@pytest.mark.parametrize("dtype", GRADS, ids=str)
def test_lion_is_its_paper_operation_by_operation(dtype: torch.dtype) -> None:
    """Each operation in fp64, rounded to fp32: what one fp32 operation gives."""

    def fp32(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32))

    def rounded(value: Tensor) -> Tensor:
        return value.float().double()

    lr, (b1, b2), decay = 1e-3, (0.9, 0.99), 0.1
    grads = gradients(dtype)
    state = fresh("lion", numbers(1, NUMEL))
    p, m = state["param"].double(), torch.zeros(NUMEL, dtype=torch.float64)
    for number in range(1, STEPS + 1):
        grad, factor = grads[number % 7], FACTORS[number % 5]
        g = rounded(grad.double() * fp32(factor))
        update = rounded(rounded(m * fp32(b1)) + rounded(g * fp32(1 - b1)))
        p = rounded(rounded(p * fp32(1 - lr * decay)) - fp32(lr) * torch.sign(update))
        m = rounded(rounded(m * fp32(b2)) + rounded(g * fp32(1 - b2)))
        optim.lion(state["param"], grad, state["exp_avg"], lr=lr, betas=(b1, b2), weight_decay=decay, factor=factor)
    assert_same(state, {"param": p.float(), "exp_avg": m.float()}, f"lion, {dtype}")


@pytest.mark.parametrize(("kind", "hyper"), HYPER, ids=[kind for kind, _ in HYPER])
def test_bf16_states_have_the_same_bits_everywhere(kind: str, hyper: dict[str, Any]) -> None:
    numel, wanted = 5003, None
    grads = [numbers(number % 7, numel, GRADS[number % 3]) for number in range(21)]
    for isa in reversed(optim.isas()):
        state = fresh(kind, numbers(1, numel, torch.bfloat16))
        state["out"] = torch.zeros(numel, dtype=torch.float32)
        for number in range(1, STEPS + 1):
            grad = grads[number % 21]
            for begin, end in pieces(numel, number):
                part = cut(state, begin, end)
                step(kind, part, grad[begin:end], number=number, out=part["out"], isa=isa, factor=0.3, **hyper)
        wanted = wanted or state
        assert_same(state, wanted, f"{kind}, {isa}")
        assert differing(state["out"], state["param"].float()) == 0  # the copy is that of the rounded weights


@needs_fma
@pytest.mark.parametrize(("kind", "hyper"), [case for case in HYPER + MORE if case[0] in ("adamw", "adam")])
def test_bf16_states_equal_torch_fused(kind: str, hyper: dict[str, Any]) -> None:
    """With everything in bf16. (torch's fused Adagrad and SGD round in between where these do not.)"""
    state = fresh(kind, numbers(1, NUMEL, torch.bfloat16))
    param = torch.nn.Parameter(state["param"].clone())
    optimizer, grads = reference(kind, param, hyper), gradients(torch.bfloat16)
    for number in range(1, STEPS + 1):
        param.grad = grads[number % 7]
        optimizer.step()
        step(kind, state, param.grad, number=number, **hyper)
    wanted = {"param": param.detach(), **{name: optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")}}
    assert_same(state, wanted, f"{kind} {hyper}")
