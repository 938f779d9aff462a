"""Steps of element-wise optimizers on flat host memory: one pass over gradient, states and the copy of the weights.

Every function updates its states in place by one formula:

    g = fp32(grad) * fp32(factor)     rounded once: unscaling and clipping are one factor
    adamw, adam, adagrad              the vector body of torch's fused CPU kernels, operation by operation, on g
    sgd                               torch.optim.SGD
    lion                              Chen et al., "Symbolic discovery of optimization algorithms", 2023; nothing fused
    out = cast(param)                 to nearest, ties to even, denormals kept

The bits are the same for every instruction set, number of threads, address and slicing; which NaN a NaN is may differ.

Arguments that hold elements may be anything contiguous: numpy arrays, torch CPU tensors, `array.array`, memoryviews.
Their dtype is the object's own: float32 ("f"), float16 ("e"), bfloat16 (torch, ml_dtypes, or 16-bit integers "H", taken
for its bits). States are float32, or all bfloat16: then the step is computed in fp32 and each state rounded once.
`grad` and `out` are any of the three. Two arguments must not share memory when one of them is written.

Common keywords. `step`: which step of these elements this is, from 1. `factor`: what each gradient is multiplied by.
`out`: receives the new weights. `threads`: how many take part; None: as many as there are processors, up to 8, and
fewer where the arrays are small.
`isa`: one of `isas()`, None for `isa()`.

Raised before anything changes, naming the argument: `TypeError` for a dtype or object that does not fit, `ValueError`
for sizes, read-only or non-contiguous memory, overlaps and numbers out of range.
"""

from __future__ import annotations

import math
from typing import Any

from . import _core
from .arrays import as_array, changed

__all__ = ["adagrad", "adam", "adamw", "isa", "isas", "lion", "sgd", "sum_of_squares"]

_LARGEST = 3.4028234663852886e38  # of fp32


def adamw(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    factor: float = 1.0,
    out: Any = None,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019)."""
    numbers = _adam_numbers(step, lr, betas, eps, weight_decay, factor, threads)
    p, g, m, v, copy = _four(param, grad, exp_avg, exp_avg_sq, out)
    _core.adamw(p, g, m, v, copy, *numbers, isa)
    changed((param, exp_avg, exp_avg_sq, out))


def adam(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    factor: float = 1.0,
    out: Any = None,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """One step of Adam (Kingma and Ba, 2015); the decay is added to the gradient."""
    numbers = _adam_numbers(step, lr, betas, eps, weight_decay, factor, threads)
    p, g, m, v, copy = _four(param, grad, exp_avg, exp_avg_sq, out)
    _core.adam(p, g, m, v, copy, *numbers, isa)
    changed((param, exp_avg, exp_avg_sq, out))


def adagrad(
    param: Any,
    grad: Any,
    sum: Any,  # noqa: A002  torch's name of the state
    *,
    step: int,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    factor: float = 1.0,
    out: Any = None,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """One step of Adagrad (Duchi, Hazan and Singer, 2011)."""
    numbers = check_step(step), not_negative(lr=lr), not_negative(lr_decay=lr_decay), not_negative(eps=eps)
    arrays = _three(param, grad, "sum", sum, out)
    decay = not_negative(weight_decay=weight_decay)
    _core.adagrad(*arrays, *numbers, decay, check_factor(factor), check_threads(threads), isa)
    changed((param, sum, out))


def lion(
    param: Any,
    grad: Any,
    exp_avg: Any,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    factor: float = 1.0,
    out: Any = None,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """One step of Lion: the weights move by `lr` against the sign of the mixed gradient."""
    numbers = not_negative(lr=lr), *check_betas(betas), not_negative(weight_decay=weight_decay)
    arrays = _three(param, grad, "exp_avg", exp_avg, out)
    _core.lion(*arrays, *numbers, check_factor(factor), check_threads(threads), isa)
    changed((param, exp_avg, out))


def sgd(
    param: Any,
    grad: Any,
    momentum_buffer: Any = None,
    *,
    step: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    factor: float = 1.0,
    out: Any = None,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """One step of SGD. With `momentum`, step 1 sets the buffer to the gradient (undamped, as torch does it)."""
    numbers = check_step(step) == 1, not_negative(lr=lr), *check_momentum(momentum, dampening, nesterov)
    arrays = _three(param, grad, "momentum_buffer", momentum_buffer, out)
    decay = not_negative(weight_decay=weight_decay)
    _core.sgd(*arrays, *numbers, decay, nesterov, check_factor(factor), check_threads(threads), isa)
    changed((param, momentum_buffer if momentum else None, out))


def sum_of_squares(grad: Any, *, threads: int | None = None, isa: str | None = None) -> tuple[float, bool]:
    """The sum of the squares of `grad`, and whether every element is finite.

    Squared and summed in fp64, within 1e-12 relative of the exact sum; the same bits for any number of threads. Where
    an element is not finite the sum is not, either.
    """
    total = _core.sum_of_squares(as_array("grad", grad), check_threads(threads), isa)
    return total, math.isfinite(total)


def isa() -> str:
    """The instruction set in use: $ZS_ISA, else the best of `isas()`. `ValueError` where $ZS_ISA cannot be had."""
    return _core.isa()


def isas() -> list[str]:
    """The instruction sets that this processor and this build have, the best first; "portable" is the last."""
    return _core.isas()


# -- numbers; also for torch.py ---------------------------------------------------------------------------------------


def check_step(step: int) -> int:
    if step < 1:
        raise ValueError(f"step counts from 1: {step}")
    return step


def not_negative(**number: float) -> float:
    ((name, value),) = number.items()
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative: {value}")
    return value


def check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    first, second = betas
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"betas must be at least 0 and below 1: {betas}")
    return first, second


def check_factor(factor: float) -> float:
    if not abs(factor) <= _LARGEST:
        raise ValueError(f"factor must be finite in fp32: {factor}")
    return factor


def check_threads(threads: int | None) -> int:
    if threads is None:
        return 0
    if threads < 1:
        raise ValueError(f"threads must be at least 1: {threads}")
    return min(threads, 1 << 16)


def check_momentum(momentum: float, dampening: float, nesterov: bool) -> tuple[float, float]:
    not_negative(momentum=momentum)
    if not math.isfinite(dampening):
        raise ValueError(f"dampening must be finite: {dampening}")
    if nesterov and (not momentum or dampening):
        raise ValueError(f"nesterov needs momentum and no dampening: {momentum}, {dampening}")
    return momentum, dampening


def _adam_numbers(
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: float,
    threads: int | None,
) -> tuple[int, float, float, float, float, float, float, int]:
    numbers = not_negative(lr=lr), *check_betas(betas), not_negative(eps=eps), not_negative(weight_decay=weight_decay)
    return check_step(step), *numbers, check_factor(factor), check_threads(threads)


def _four(param: Any, grad: Any, first: Any, second: Any, out: Any) -> tuple[Any, Any, Any, Any, Any]:
    a, b, c, e = _three(param, grad, "exp_avg", first, out)
    return a, b, c, as_array("exp_avg_sq", second, written=True), e


def _three(param: Any, grad: Any, name: str, state: Any, out: Any) -> tuple[Any, Any, Any, Any]:
    arrays = as_array("param", param, written=True), as_array("grad", grad), as_array(name, state, written=True)
    return *arrays, as_array("out", out, written=True)
