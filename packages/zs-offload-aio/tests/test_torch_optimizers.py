"""`CPUAdam`: torch's optimizer in its manners, the kernels' in its bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optim_cases import differing
from torch import Tensor, nn
from zs_offload_aio.torch import CPUAdam

NEEDS = {"torch"}
FMA = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_fma = pytest.mark.skipif(not FMA, reason="torch's kernels have no fused multiply-add on this processor")
SHAPES = ((64, 48), (48,), (3, 16), ())
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES[:3]
) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in shapes]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "lr": 1e-2}, {"params": params[1:], "weight_decay": 0.0}]


def feed(params: list[nn.Parameter], step: int) -> None:
    source = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=source).to(param.dtype)


def ours(groups: list[dict[str, Any]]) -> CPUAdam:
    return CPUAdam(groups, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)


def theirs(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


def train(make: Make, params: list[nn.Parameter], steps: range, state: dict[str, Any] | None = None) -> dict[str, Any]:
    optimizer = make(groups(params))
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for step in steps:
        feed(params, step)
        optimizer.step()
    return optimizer.state_dict()


def same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(differing(x.detach(), y.detach()) == 0 for x, y in zip(a, b, strict=True))


@needs_fma
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "second"), [(ours, theirs), (theirs, ours), (ours, ours)])
def test_state_dicts_go_both_ways_and_the_bits_go_on(first: Make, second: Make, dtype: torch.dtype) -> None:
    wanted, found = parameters(dtype), parameters(dtype)
    train(theirs, wanted, range(10))
    state = train(first, found, range(5))
    end = train(second, found, range(5, 10), state)
    assert same(wanted, found)
    keys = {key for group in torch.optim.AdamW(parameters(), fused=True).state_dict()["param_groups"] for key in group}
    assert {key for group in end["param_groups"] for key in group} == keys
    assert {key for entry in end["state"].values() for key in entry} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(float(entry["step"]) == 10 for entry in end["state"].values())


@needs_fma
def test_adam_mode_is_torchs_adam() -> None:
    wanted, found = parameters(), parameters()
    a = torch.optim.Adam(wanted, lr=1e-2, weight_decay=0.1, fused=True)
    b = CPUAdam(found, lr=1e-2, weight_decay=0.1, adamw_mode=False)
    for step in range(5):
        feed(wanted, step)
        feed(found, step)
        a.step()
        b.step()
    assert same(wanted, found)
    a.load_state_dict(b.state_dict())
    b.load_state_dict(a.state_dict())
    assert not b.param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_step_writes_the_copies(dtype: torch.dtype) -> None:
    params = parameters(shapes=SHAPES)
    outs: list[Tensor | None] = [torch.full(param.shape, 7.0, dtype=dtype) for param in params]
    outs[1] = None
    feed(params, 0)
    params[2].grad = None
    before = params[2].detach().clone()
    CPUAdam(params, threads=2).step(bf16_out=outs)
    for index in (0, 3):
        out = outs[index]
        assert out is not None and differing(out, params[index].detach().to(dtype)) == 0
    assert outs[2] is not None and bool((outs[2] == 7.0).all())  # no gradient: neither the parameter nor its copy
    assert torch.equal(params[2], before)


def test_gradients_of_another_dtype_and_a_factor() -> None:
    wanted, found = parameters(), parameters()
    feed(wanted, 0)
    halves = [param.grad.bfloat16() for param in wanted if param.grad is not None]
    for param, half in zip(wanted, halves, strict=True):
        param.grad = half.float() * 0.25
    CPUAdam(wanted).step()
    CPUAdam(found).step(grads=halves, factor=0.25)
    assert same(wanted, found)


@needs_fma
def test_channels_last_parameters_and_gradients_in_another_order() -> None:
    weight = torch.randn(8, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    for grad_format in (torch.channels_last, torch.contiguous_format):
        wanted = nn.Parameter(weight.clone(memory_format=torch.channels_last))
        found = nn.Parameter(weight.clone(memory_format=torch.channels_last))
        grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        wanted.grad = grad.clone(memory_format=torch.channels_last)
        found.grad = grad.clone(memory_format=grad_format)
        torch.optim.AdamW([wanted], fused=True).step()
        CPUAdam([found]).step()
        assert differing(found.detach(), wanted.detach()) == 0


def test_the_closure_runs_with_gradients_and_its_result_comes_back() -> None:
    (param,) = parameters(shapes=((5,),))
    optimizer = CPUAdam([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    before = param.detach().clone()
    assert optimizer.step(closure) == (before * before).sum()
    assert not torch.equal(param, before)


def test_autograd_sees_that_parameters_changed() -> None:
    (param,) = parameters(shapes=((5,),))
    product = (param * param).sum()
    param.grad = torch.ones(5)
    version = param._version
    out = torch.zeros(5, dtype=torch.bfloat16)
    CPUAdam([param]).step(bf16_out=[out])
    assert param._version > version and out._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_schedulers_hooks_and_tensor_rates_work() -> None:
    params = parameters()
    optimizer = CPUAdam(params, lr=torch.tensor(1e-2))
    assert optimizer.param_groups[0]["lr"] == torch.tensor(1e-2)
    optimizer = CPUAdam(params, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda it, _args, _kwargs: seen.append(it.param_groups[0]["lr"]))
    for step in range(3):
        feed(params, step)
        optimizer.step()
        scheduler.step()
    assert seen == [1e-2, 5e-3, 2.5e-3]


def test_a_copy_goes_on_where_the_original_was() -> None:
    params = parameters()
    optimizer = CPUAdam(params, threads=2)
    feed(params, 0)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    twins = other.param_groups[0]["params"]
    for each in (params, twins):
        feed(each, 1)
    optimizer.step()
    other.step()
    assert other.threads == 2
    assert same(params, twins)


def broken(**keywords: Any) -> Callable[[], object]:
    return lambda: CPUAdam(parameters(), **keywords)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (broken(amsgrad=True), ValueError, "amsgrad is not supported"),
        (broken(maximize=True), ValueError, "maximize is not supported"),
        (broken(lr=-1.0), ValueError, "lr must be finite and not negative"),
        (broken(betas=(0.9, 1.0)), ValueError, "betas must be"),
        (broken(eps=float("nan")), ValueError, "eps must be finite"),
        (broken(threads=0), ValueError, "threads must be at least 1"),
        (lambda: CPUAdam(parameters(torch.float64)), TypeError, "float64 is not supported"),
        (lambda: CPUAdam(parameters(torch.float16)), TypeError, "float16 is not supported"),
        (lambda: CPUAdam(parameters(torch.complex64)), TypeError, "complex64 is not supported"),
        (lambda: CPUAdam([nn.Parameter(torch.zeros(4, device="meta"))]), TypeError, "it is on meta"),
        (lambda: CPUAdam([torch.zeros(4, 4)[:, 1].requires_grad_()]), ValueError, "do not fill their memory"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(make: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_loading_what_cannot_be_done_is_refused() -> None:
    params = parameters()
    state = torch.optim.AdamW(params, amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad"):
        CPUAdam(params).load_state_dict(state)


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"bf16_out": [None]}, ValueError, "bf16_out has 1 entries, the optimizer 3 parameters"),
        ({"grads": []}, ValueError, "grads has 0 entries"),
        ({"factor": float("inf")}, ValueError, "factor must be finite"),
        ({"bf16_out": [None, None, torch.zeros(3, 15)]}, ValueError, "parameter 2: out has the shape"),
        ({"bf16_out": [None, None, torch.zeros(16, 3).T]}, ValueError, "parameter 2: out has the strides"),
        ({"bf16_out": [None, torch.zeros(48).long(), None]}, TypeError, "parameter 1: out is int64"),
        ({"grads": [None, None, torch.zeros(3, 16).to_sparse()]}, TypeError, "parameter 2: a sparse gradient"),
        ({"grads": [None, torch.zeros(48).double(), None]}, TypeError, "parameter 1: grad is float64"),
        ({"grads": [None, torch.zeros(47), None]}, ValueError, "parameter 1: shape"),
    ],
)
def test_bad_arguments_of_a_step_change_nothing(keywords: dict[str, Any], error: type[Exception], match: str) -> None:
    params = parameters()
    feed(params, 0)
    before = [param.detach().clone() for param in params]
    optimizer = CPUAdam(params)
    with pytest.raises(error, match=match):
        optimizer.step(**keywords)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert all(float(entry["step"]) == 0 for entry in optimizer.state.values())


def test_a_copy_over_the_parameter_is_refused_before_anything_changes() -> None:
    params = parameters()
    feed(params, 0)
    before = [param.detach().clone() for param in params]
    outs = [None, None, params[2].detach()]
    with pytest.raises(ValueError, match=r"parameter 2: param and out overlap"):
        CPUAdam(params).step(bf16_out=outs)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_nothing_changes_where_one_parameter_is_refused() -> None:
    """In groups of either kind of decay, and the message names the parameter that is wrong."""
    first, second = (torch.nn.Parameter(torch.ones(32)) for _ in range(2))
    optimizer = CPUAdam([{"params": [first]}, {"params": [second], "decoupled_weight_decay": False}], lr=0.1)
    for param in (first, second):
        param.grad = torch.ones(32)
    with pytest.raises(ValueError, match="parameter 1: param and out overlap"):
        optimizer.step(bf16_out=[None, second.detach().view(torch.bfloat16)[:32]])
    assert torch.equal(first, torch.ones(32)) and torch.equal(second, torch.ones(32))
    optimizer.step()
    assert optimizer.state[first]["step"] == 1
