"""What a `HostOptimizer` must do, as a check to run on any of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..host_optimizer import LOW_PRECISION, PROTOCOL, STATE, HostOptimizer
from ._expect import expect, refused, run_checks

_NUMEL = 1003  # no multiple of any vector
_STEPS = 6
_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}),
    ("adamw", {"lr": 3e-4, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.0}),
    ("adam", {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "nesterov": False}),
    ("sgd", {"lr": 0.1, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.01, "nesterov": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.01, "nesterov": False}),
    ("adagrad", {"lr": 1e-2, "lr_decay": 0.01, "eps": 1e-10, "weight_decay": 0.1}),
    ("adagrad", {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}),
    ("lion", {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    ("lion", {"lr": 1e-3, "betas": (0.95, 0.98), "weight_decay": 0.0}),
]


def check_host_optimizer(make: Callable[[], HostOptimizer]) -> None:
    """Raise `AssertionError`, naming the rule, where the optimizers made by `make` break the Protocol.

    Bits are compared with torch's own optimizers (Lion with a written-out reference), on this machine.
    """
    run_checks(_CHECKS, make, lambda _: None)


# -- the reference: torch.optim on tensors padded to whole vectors, see [Note: One formula] --------------------------


class _Reference:
    """The formula on `param`, by torch's optimizer classes; `state` is what a HostOptimizer's must equal."""

    def __init__(self, kind: str, hyper: dict[str, Any], param: Tensor) -> None:
        self.kind, self.hyper, self.numel = kind, hyper, param.numel()
        self.param = torch.nn.Parameter(torch.nn.functional.pad(param, (0, -param.numel() % 16)))
        self.lion_momentum = torch.zeros(self.param.numel())
        classes: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}
        self.optimizer: torch.optim.Optimizer | None = None
        if kind == "sgd":
            self.optimizer = torch.optim.SGD([self.param], fused=True, **hyper)
        elif kind != "lion":
            self.optimizer = classes[kind]([self.param], fused=True, **hyper)

    def step(self, grad: Tensor, factor: float) -> None:
        # fp64 holds the product of two fp32 exactly, so this rounds once
        g = (grad.double() * float(torch.tensor(factor, dtype=torch.float32))).float()
        g = torch.nn.functional.pad(g, (0, self.param.numel() - self.numel))
        if self.optimizer is None:
            self._lion(g)
        else:
            self.param.grad = g
            self.optimizer.step()

    def _lion(self, g: Tensor) -> None:
        """Chen et al. 2023, each operation in fp64 and rounded to fp32, which is what one fp32 operation gives."""

        def fp32(value: float) -> float:
            return float(torch.tensor(value, dtype=torch.float32))

        def mix(m: Tensor, beta: float) -> Tensor:
            kept = (m.double() * fp32(beta)).float()
            new = (g.double() * fp32(1 - beta)).float()
            return (kept.double() + new.double()).float()

        lr, (b1, b2) = self.hyper["lr"], self.hyper["betas"]
        with torch.no_grad():
            p = (self.param.double() * fp32(1 - lr * self.hyper["weight_decay"])).float()
            self.param.copy_(p.double() - fp32(lr) * torch.sign(mix(self.lion_momentum, b1)).double())
        self.lion_momentum = mix(self.lion_momentum, b2)

    @property
    def state(self) -> dict[str, Tensor]:
        if self.optimizer is None:
            found: dict[str, Any] = {"exp_avg": self.lion_momentum}
        else:
            found = dict(self.optimizer.state[self.param])
        found["param"] = self.param.detach()
        return {name: found[name][: self.numel] for name in STATE[self.kind] if found.get(name) is not None}


def _settings() -> Iterator[tuple[str, dict[str, Any], str]]:
    for kind, hyper in _SETTINGS:
        yield kind, hyper, f"{kind} {hyper}"


def _numbers(seed: int, numel: int = _NUMEL, dtype: torch.dtype = torch.float32) -> Tensor:
    """Over thirty orders of magnitude, zeros and denormals among them."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=source) * torch.exp(8 * torch.randn(numel, generator=source))
    values[::17] = 0.0
    values[5::31] = 1e-41
    return values.to(dtype)


def _fresh_state(kind: str, param: Tensor) -> dict[str, Tensor]:
    return {name: param.clone() if name == "param" else torch.zeros_like(param) for name in STATE[kind]}


def _same(state: dict[str, Tensor], reference: dict[str, Tensor], what: str) -> None:
    for name, wanted in reference.items():
        differ = int((state[name].view(torch.int32) != wanted.contiguous().view(torch.int32)).sum())
        expect(differ == 0, f"{what}: {differ} of {wanted.numel()} elements of {name!r} have other bits")


# -- the rules -------------------------------------------------------------------------------------------------------


def _says_what_it_is(optimizer: HostOptimizer) -> None:
    """PROTOCOL is there"""
    expect(isinstance(optimizer, HostOptimizer), "a member of the Protocol is missing")
    expect(optimizer.PROTOCOL == PROTOCOL, f"PROTOCOL is {optimizer.PROTOCOL}, not {PROTOCOL}")


def _equals_torch(optimizer: HostOptimizer) -> None:
    """every kind gives the bits of torch's optimizer, for fp32, bf16 and fp16 gradients"""
    for kind, hyper, what in _settings():
        for dtype in LOW_PRECISION:
            param = _numbers(1)
            reference, state = _Reference(kind, hyper, param), _fresh_state(kind, param)
            for step in range(1, _STEPS + 1):
                grad = _numbers(10 + step, dtype=dtype).clamp(-60000, 60000)
                reference.step(grad, 1.0)
                optimizer.step(kind, state, grad, hyper=hyper, step=step, factor=1.0)
                _same(state, reference.state, f"{what}, {dtype}, step {step}")


def _factor(optimizer: HostOptimizer) -> None:
    """the factor is rounded to fp32, the product with the gradient once more, and nothing else is"""
    for kind, hyper, what in _settings():
        param = _numbers(2)
        reference, state = _Reference(kind, hyper, param), _fresh_state(kind, param)
        for step, factor in enumerate((0.1, 1 / 65536, 1.0, 1 / 3, 0.7), start=1):
            grad = _numbers(20 + step, dtype=torch.bfloat16 if step % 2 else torch.float32)
            reference.step(grad, factor)
            optimizer.step(kind, state, grad, hyper=hyper, step=step, factor=factor)
            _same(state, reference.state, f"{what}, factor {factor}")


def _slices(optimizer: HostOptimizer) -> None:
    """the bits do not depend on where a tensor is cut, nor on its address"""
    for kind, hyper, what in _settings():
        whole, parts = _fresh_state(kind, _numbers(3)), _fresh_state(kind, _numbers(3))
        borders = [0, 1, 9, 26, 27, 300, 317, 900, _NUMEL]
        for step in range(1, _STEPS + 1):
            grad = _numbers(30 + step)
            optimizer.step(kind, whole, grad, hyper=hyper, step=step, factor=0.5)
            for a, b in itertools.pairwise(borders):
                part = {name: tensor[a:b] for name, tensor in parts.items()}
                optimizer.step(kind, part, grad[a:b], hyper=hyper, step=step, factor=0.5)
            _same(parts, whole, f"{what}, cut at {borders}, step {step}")


def _outputs(optimizer: HostOptimizer) -> None:
    """the copy is torch's cast of the new weights, denormals included; the gradient is left as it is"""
    for kind, hyper, what in _settings():
        for dtype in LOW_PRECISION:
            state, grad = _fresh_state(kind, _numbers(4)), _numbers(40, dtype=torch.bfloat16)
            state["param"][3::31] = 1e-41
            grad[3::31] = 0.0
            before, out = grad.clone(), torch.full((_NUMEL,), 7.0, dtype=dtype)
            optimizer.step(kind, state, grad, hyper=hyper, step=1, factor=0.5, out=out)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            same = torch.equal(out.view(bits), state["param"].to(dtype).view(bits))
            expect(same, f"{what}: out in {dtype} is not the cast of the weights")
            expect(torch.equal(grad.view(torch.int16), before.view(torch.int16)), f"{what}: the gradient was changed")


def _sizes(optimizer: HostOptimizer) -> None:
    """no size is special: 0, 1, one vector more or less; nothing beyond the slice is touched"""
    for kind, hyper, what in _settings():
        for numel in (0, 1, 15, 16, 17, 64, 65):
            memory = {name: torch.full((numel + 32,), 5.0) for name in STATE[kind]}
            state = {name: tensor[16 : 16 + numel] for name, tensor in memory.items()}
            initial = _fresh_state(kind, _numbers(5, numel))
            for name, tensor in state.items():
                tensor.copy_(initial[name])
            reference = _Reference(kind, hyper, initial["param"])
            reference.step(_numbers(50, numel), 1.0)
            optimizer.step(kind, state, _numbers(50, numel), hyper=hyper, step=1, factor=1.0)
            if numel:
                _same(state, reference.state, f"{what}, {numel} elements")
            for name, tensor in memory.items():
                edges = torch.cat([tensor[:16], tensor[16 + numel :]])
                expect(bool((edges == 5.0).all()), f"{what}, {numel} elements: {name!r} was written beyond its slice")


def _later_step(optimizer: HostOptimizer) -> None:
    """an optimizer keeps nothing between calls: state and step number are all there is"""
    for kind, hyper, what in _settings():
        param = _numbers(6)
        reference, state = _Reference(kind, hyper, param), _fresh_state(kind, param)
        for step in range(1, 4):
            grad = _numbers(60 + step)
            reference.step(grad, 1.0)
            other = _fresh_state(kind, _numbers(7))
            optimizer.step(kind, other, grad, hyper=hyper, step=step + 5, factor=1.0)
            optimizer.step(kind, state, grad, hyper=hyper, step=step, factor=1.0)
            _same(state, reference.state, f"{what}, two tensors in turn, step {step}")


def _refusals(optimizer: HostOptimizer) -> None:
    """what does not fit is a ValueError, and changes nothing"""
    hyper = _SETTINGS[0][1]
    state, grad = _fresh_state("adamw", _numbers(8)), _numbers(80)
    before = {name: tensor.clone() for name, tensor in state.items()}
    wide = {name: torch.zeros(_NUMEL, 2)[:, 0] for name in state}
    wrong: list[tuple[str, str, dict[str, Tensor], Tensor, dict[str, Any], int, Tensor | None]] = [
        ("an unknown kind", "adamx", state, grad, hyper, 1, None),
        ("an unknown hyper-parameter", "adamw", state, grad, {**hyper, "momentum": 0.9}, 1, None),
        ("a missing hyper-parameter", "adamw", state, grad, {k: v for k, v in hyper.items() if k != "lr"}, 1, None),
        ("a missing state", "adamw", {k: v for k, v in state.items() if k != "exp_avg"}, grad, hyper, 1, None),
        ("a state too many", "adamw", {**state, "momentum_buffer": state["exp_avg"]}, grad, hyper, 1, None),
        ("step 0", "adamw", state, grad, hyper, 0, None),
        ("a short gradient", "adamw", state, grad[:-1], hyper, 1, None),
        ("an fp64 gradient", "adamw", state, grad.double(), hyper, 1, None),
        ("an integer gradient", "adamw", state, grad.int(), hyper, 1, None),
        ("a short output", "adamw", state, grad, hyper, 1, torch.zeros(_NUMEL - 1)),
        ("an fp64 output", "adamw", state, grad, hyper, 1, torch.zeros(_NUMEL, dtype=torch.float64)),
        ("strided states", "adamw", wide, grad, hyper, 1, None),
        ("an fp64 state", "adamw", {**state, "exp_avg": state["exp_avg"].double()}, grad, hyper, 1, None),
    ]
    for what, kind, given, gradient, settings, step, out in wrong:
        with refused(ValueError, what=what):
            optimizer.step(kind, given, gradient, hyper=settings, step=step, factor=1.0, out=out)
        _same(state, before, f"after {what}")


def _norm(optimizer: HostOptimizer) -> None:
    """the sum of squares is exact to 1e-12, does not overflow, and finds what is not finite"""
    for dtype in LOW_PRECISION:
        for numel in (0, 1, 17, _NUMEL):
            grad = _numbers(90, numel, dtype=dtype).clamp(-60000, 60000)
            exact = sum((Fraction(value) ** 2 for value in grad.tolist()), Fraction(0))
            found, finite = optimizer.sum_of_squares(grad)
            expect(finite, f"{dtype}, {numel} elements: finite is {finite!r}, the sum {found!r}")
            expect(abs(Fraction(found) - exact) <= exact * Fraction(1, 10**12), f"{dtype}: {found} for {float(exact)}")
        for position in (0, 8, 1000, _NUMEL - 1):
            for value in (math.inf, -math.inf, math.nan):
                grad = torch.ones(_NUMEL, dtype=dtype)
                grad[position] = value
                found, finite = optimizer.sum_of_squares(grad)
                expect(not finite and not math.isfinite(found), f"{value} at {position} in {dtype} was not found")
    huge = torch.full((_NUMEL,), torch.finfo(torch.float32).max)
    found, finite = optimizer.sum_of_squares(huge)
    exact = _NUMEL * Fraction(torch.finfo(torch.float32).max) ** 2
    expect(finite and abs(Fraction(found) - exact) <= exact * Fraction(1, 10**12), "fp32's largest values overflow")


_CHECKS: list[Callable[[HostOptimizer], None]] = [
    _says_what_it_is,
    _equals_torch,
    _factor,
    _later_step,
    _slices,
    _outputs,
    _sizes,
    _refusals,
    _norm,
]
