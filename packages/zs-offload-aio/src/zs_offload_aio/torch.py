"""The optimizer kernels for torch: `CPUAdam`, a `torch.optim.Optimizer`, and `HostOptimizer` for zs-zero.

The only module of this package that imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _core
from .arrays import changed, tensor_array
from .optim import check_betas, check_factor, check_momentum, check_step, check_threads, not_negative

__all__ = ["CPUAdam", "HostOptimizer"]


class CPUAdam(torch.optim.Optimizer):
    """AdamW (or Adam) on host memory, with the bits of `torch.optim.AdamW(fused=True)` on whole vectors.

    `params`: fp32 or bf16 CPU tensors; the states are of the same dtype. `adamw_mode`: False is Adam, whose decay is
    added to the gradient. `threads`: how many take part; None: as many as torch uses, fewer for small tensors. A state
    dict of `torch.optim.AdamW` (or `Adam`, as `adamw_mode` says) can be loaded here and one of this there.

    Raises `TypeError`: parameters of another dtype or device; `ValueError`: numbers out of range, `amsgrad` and
    `maximize`, parameters that do not fill their memory (channels_last does).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adamw_mode: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        threads: int | None = None,
    ) -> None:
        check_threads(threads)
        self.threads = threads
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            # torch's own keys, so that its optimizers take this one's state dict and go on by the same formula
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": adamw_mode,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "threads": self.threads}  # torch's copies and pickles what it names

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`; what the kernels cannot do is refused here."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _check_group(group)
            for param in group["params"]:
                _check_param(param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; `ValueError` for groups with `amsgrad` or `maximize`."""
        for group in state_dict["param_groups"]:
            _check_group({**self.defaults, **group})
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.update(foreach=None, fused=True)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        bf16_out: Sequence[Tensor | None] | None = None,
        grads: Sequence[Tensor | None] | None = None,
        factor: float = 1.0,
    ) -> Any:
        """One step; returns what `closure` does.

        `bf16_out`: receives copies of the new weights, one tensor (bf16, fp16 or fp32, of the parameter's shape) or
        None per parameter, in the order of the parameters over all groups. `grads`: used in place of `.grad`, in the
        same order; fp32, bf16 or fp16, whatever the parameter is. `factor`: every gradient is multiplied by it.
        A parameter without gradient stays as it is, and so does its copy.

        Raises `TypeError` or `ValueError`, before any parameter changes, naming the parameter by its number.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_factor(factor)
        with torch.no_grad():
            self._step(bf16_out, grads, factor)
        return loss

    def _step(self, outs: Sequence[Tensor | None] | None, grads: Sequence[Tensor | None] | None, factor: float) -> None:
        total = sum(len(group["params"]) for group in self.param_groups)
        for name, given in (("bf16_out", outs), ("grads", grads)):
            if given is not None and len(given) != total:
                raise ValueError(f"{name} has {len(given)} entries, the optimizer {total} parameters")
        threads = _threads(self.threads)
        todo: list[tuple[int, bool, tuple[Any, ...]]] = []  # number, decoupled, arguments
        written: list[Tensor] = []
        counters: list[Tensor] = []
        kept: list[Tensor] = []  # copies of gradients, until the kernels are through
        index = -1
        for group in self.param_groups:
            numbers = _check_group(group)
            for param in group["params"]:
                index += 1
                grad = param.grad if grads is None else grads[index]
                if grad is None:
                    continue
                out = None if outs is None else outs[index]
                try:
                    if not param.is_contiguous():
                        _check_param(param)  # what add_param_group checked may have been exchanged since
                    grad = _laid_out_as(param, grad)
                    counter, first, second = self._state_of(param)
                    tensors = [("param", param), ("grad", grad), ("exp_avg", first), ("exp_avg_sq", second)]
                    arrays = [tensor_array(name, tensor) for name, tensor in tensors]
                    arrays.append(None if out is None else _out_array(param, out))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"parameter {index}: {error}") from error
                step = int(counter.item()) + 1
                arguments = (*arrays, step, *numbers, factor, threads, None)
                todo.append((index, bool(group["decoupled_weight_decay"]), arguments))
                counters.append(counter)
                written.extend((param, first, second) if out is None else (param, first, second, out))
                kept.append(grad)
        _core.adam_many(todo)  # checks all of them first
        if counters:
            torch._foreach_add_(counters, 1)
        changed(written)

    def _state_of(self, param: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step's counter and the two moments, in the parameter's memory layout."""
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if not isinstance(state["step"], Tensor):
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].dtype != param.dtype:
                raise TypeError(f"{name} is {state[name].dtype}, the parameter {param.dtype}")
            if not (param.is_contiguous() and state[name].is_contiguous()):
                state[name] = _laid_out_as(param, state[name])
        return state["step"], state["exp_avg"], state["exp_avg_sq"]


def _check_group(group: Mapping[str, Any]) -> tuple[float, float, float, float, float]:
    for key in ("amsgrad", "maximize", "capturable", "differentiable"):
        if group[key]:
            raise ValueError(f"{key} is not supported")
    betas = check_betas((float(group["betas"][0]), float(group["betas"][1])))
    rates = (not_negative(eps=float(group["eps"])), not_negative(weight_decay=float(group["weight_decay"])))
    return not_negative(lr=float(group["lr"])), *betas, *rates


def _check_param(param: Tensor) -> None:
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{param.dtype} is not supported: float32 or bfloat16")
    if param.device.type != "cpu":
        raise TypeError(f"it is on {param.device}: the kernels work on host memory")
    if not _dense(param):
        raise ValueError(f"its elements do not fill their memory: shape {tuple(param.shape)}, strides {param.stride()}")


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie one after the other in some order of the dimensions, as in channels_last."""
    if tensor.layout != torch.strided:
        raise TypeError(f"it has the layout {tensor.layout}")
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(param: Tensor, other: Tensor) -> bool:
    if param.is_contiguous():
        return other.is_contiguous()
    sizes = zip(param.shape, param.stride(), other.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in sizes)


def _laid_out_as(param: Tensor, other: Tensor) -> Tensor:
    """`other` where its memory has the order of the parameter's, else a copy that does."""
    if other.layout != torch.strided:
        raise TypeError(f"a sparse gradient is not supported (layout {other.layout})")
    if other.shape != param.shape:
        raise ValueError(f"shape {tuple(other.shape)} beside a parameter of shape {tuple(param.shape)}")
    if _same_order(param, other):
        return other
    return torch.empty_like(param, dtype=other.dtype, memory_format=torch.preserve_format).copy_(other)


def _out_array(param: Tensor, out: Tensor) -> object:
    if out.shape != param.shape:
        raise ValueError(f"out has the shape {tuple(out.shape)}, the parameter {tuple(param.shape)}")
    array = tensor_array("out", out)
    if not _same_order(param, out):
        raise ValueError(f"out has the strides {out.stride()}, the parameter {param.stride()}")
    return array


class HostOptimizer:
    """zs-zero's `HostOptimizer` (checked there by `check_host_optimizer`), without importing zs-zero.

    `threads`: how many take part; None: as many as torch uses, fewer for small tensors. `isa`: one of `optim.isas()`;
    None: $ZS_ISA, or the best.
    """

    PROTOCOL = 1

    STATE: Mapping[str, tuple[str, ...]] = {
        "adamw": ("param", "exp_avg", "exp_avg_sq"),
        "adam": ("param", "exp_avg", "exp_avg_sq"),
        "sgd": ("param", "momentum_buffer"),
        "adagrad": ("param", "sum"),
        "lion": ("param", "exp_avg"),
    }
    HYPER: Mapping[str, tuple[str, ...]] = {
        "adamw": ("lr", "betas", "eps", "weight_decay"),
        "adam": ("lr", "betas", "eps", "weight_decay"),
        "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        "adagrad": ("lr", "lr_decay", "eps", "weight_decay"),
        "lion": ("lr", "betas", "weight_decay"),
    }

    def __init__(self, *, threads: int | None = None, isa: str | None = None) -> None:
        check_threads(threads)
        self.threads = threads
        self.isa = isa

    def step(
        self,
        kind: str,
        state: Mapping[str, Tensor],
        grad: Tensor,
        *,
        hyper: Mapping[str, Any],
        step: int,
        factor: float,
        out: Tensor | None = None,
    ) -> None:
        """Update `state` (`{name: (numel,) fp32}`) in place by the formula of `zs_offload_aio.optim`.

        `kind`: a key of `STATE`. `grad`, `out`: `(numel,)` fp32, bf16 or fp16. `hyper`: the keys of `HYPER[kind]`.
        Raises `ValueError` before anything changes.
        """
        self._check(kind, state, grad, hyper, out)
        check_step(step)
        check_factor(factor)
        names = self.STATE[kind]
        states = [_array(name, state[name]) if name in state else None for name in names]
        arrays = [states[0], _array("grad", grad), *states[1:], None if out is None else _array("out", out)]
        end = factor, _threads(self.threads), self.isa
        lr = not_negative(lr=hyper["lr"])
        decay = not_negative(weight_decay=hyper["weight_decay"])
        run: Callable[..., None] = getattr(_core, kind)
        match kind:
            case "adamw" | "adam":
                run(*arrays, step, lr, *check_betas(hyper["betas"]), not_negative(eps=hyper["eps"]), decay, *end)
            case "adagrad":
                lr_decay = not_negative(lr_decay=hyper["lr_decay"])
                run(*arrays, step, lr, lr_decay, not_negative(eps=hyper["eps"]), decay, *end)
            case "lion":
                run(*arrays, lr, *check_betas(hyper["betas"]), decay, *end)
            case "sgd":
                nesterov = hyper["nesterov"]
                momentum = check_momentum(hyper["momentum"], hyper["dampening"], nesterov)
                run(*arrays, step == 1, lr, *momentum, decay, nesterov, *end)
        changed([*state.values(), out])

    def sum_of_squares(self, grad: Tensor) -> tuple[float, bool]:
        """The sum of the squares of `grad` `(numel,)` in fp64, and whether every element is finite."""
        _check_flat("grad", grad, grad.numel())
        total = _core.sum_of_squares(_array("grad", grad), _threads(self.threads), self.isa)
        return total, math.isfinite(total)

    def _check(
        self, kind: str, state: Mapping[str, Tensor], grad: Tensor, hyper: Mapping[str, Any], out: Tensor | None
    ) -> None:
        if kind not in self.STATE:
            raise ValueError(f"kind {kind!r}: one of {', '.join(self.STATE)}")
        if set(hyper) != set(self.HYPER[kind]):
            raise ValueError(f"{kind} takes the hyper-parameters {', '.join(self.HYPER[kind])}, not {', '.join(hyper)}")
        known = self.STATE[kind]
        needed = [name for name in known if name != "momentum_buffer" or hyper["momentum"]]
        if not set(needed) <= set(state) <= set(known):
            raise ValueError(f"{kind} takes the states {', '.join(needed)}, not {', '.join(state)}")
        _check_flat("grad", grad, grad.numel())
        for name, tensor in state.items():
            _check_flat(name, tensor, grad.numel())
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype}: torch.float32")
        if out is not None:
            _check_flat("out", out, grad.numel())


def _threads(threads: int | None) -> int:
    """As the kernels take it: a negative number is an upper bound."""
    return -torch.get_num_threads() if threads is None else threads


def _array(name: str, tensor: Tensor) -> object:
    try:
        return tensor_array(name, tensor)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_flat(name: str, tensor: Tensor, numel: int) -> None:
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be flat and contiguous: shape {tuple(tensor.shape)}")
    if tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, the gradient {numel}")
