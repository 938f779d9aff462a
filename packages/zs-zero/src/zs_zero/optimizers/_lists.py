"""What the optimizers here share: the lists of tensors that torch's foreach kernels take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradients(group: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have a gradient, and their gradients.

    Raises:
        RuntimeError: for a sparse gradient.
    """
    params = [param for param in group["params"] if param.grad is not None]
    grads = [param.grad for param in params]
    if any(grad.layout != torch.strided for grad in grads):
        raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False")
    return params, grads


def states(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], *names: str, counted: bool = True
) -> list[list[Tensor]]:
    """One list for each state: made as zeros where it is missing. "step", counted up, comes last where asked for."""
    for param in params:
        state = optimizer.state[param]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if counted:
            state["step"] = state.get("step", torch.zeros(())) + 1.0
    return [[optimizer.state[p][name] for p in params] for name in (*names, *(["step"] if counted else []))]


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure given to `step()`."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check(**values: float) -> None:
    """Raises ValueError for a negative number."""
    for name, value in values.items():
        if not float(value) >= 0.0:
            raise ValueError(f"{name} is a number of at least 0 (got {value!r})")


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Raises ValueError unless there are two, each in [0, 1)."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas are two numbers in [0, 1) (got {betas!r})")
    return betas[0], betas[1]
