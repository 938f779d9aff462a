"""DeepSpeed's functions for the high-precision values of single parameters: they need nothing but the parameter.

    safe_get_full_*     whole tensors in the parameter's shape, on every rank; collective
    safe_set_full_*     from whole tensors, the same on every rank, which is checked; collective
    safe_*_local_*      this rank's part, 1-d, empty where it owns no element of the parameter

They work at every stage, the local ones too. The getters give None for a tensor that is no parameter of a sharded
model, as DeepSpeed's do; the setters raise.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from zs_comm import ConfigError

from .access import GradUpdate, ParameterAccess

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
]


def _of(param: Tensor) -> ParameterAccess | None:
    """The optimizer whose model has `param`, or None."""
    found = getattr(param, "_zs_flat", None)
    access: ParameterAccess | None = None if found is None else found[0].access
    return access


def _must(param: Tensor) -> ParameterAccess:
    optimizer = _of(param)
    if optimizer is None:
        raise ConfigError(f"this tensor of shape {tuple(param.shape)} is no parameter of a sharded model")
    return optimizer


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The master value of `param`, whole, fp32 (or more precise). Collective."""
    optimizer = _of(param)
    return None if optimizer is None else optimizer.full_param(param)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Sets `param`, master and model value, from a whole tensor that is the same on every rank. Collective.

    Raises:
        ConfigError: for another number of elements, or a tensor that is no parameter of a sharded model.
        RankDisagreement: for values that differ between ranks.
    """
    _must(param).set_full_param(param, value)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The mean gradient of `param` over ranks, whole, fp32; None where it got none in this window. Collective.

    Between the last backward and the step. Reduces what has not been reduced yet. Unscaled under fp16's loss scale.
    """
    optimizer = _of(param)
    return None if optimizer is None else optimizer.full_grad(param)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replaces the mean gradient of `param` for the coming step. Collective; raises as `safe_set_full_fp32_param`."""
    _must(param).set_full_grad(param, value)


def safe_update_full_grad_vectorized(param_list: Iterable[nn.Parameter], update_func: GradUpdate) -> None:
    """Replaces each gradient by `update_func(whole gradient, param)`: one collective for each flat buffer, not for each
    parameter.

    Parameters without a gradient are left out. Collective; raises as `safe_set_full_fp32_param`.
    """
    by_optimizer: dict[int, tuple[ParameterAccess, list[nn.Parameter]]] = {}
    for param in param_list:
        optimizer = _must(param)
        by_optimizer.setdefault(id(optimizer), (optimizer, []))[1].append(param)
    for optimizer, params in by_optimizer.values():
        optimizer.update_grads(params, update_func)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """The optimizer state ("exp_avg", ...) of `param`, whole, fp32, or a counter (0-dim); None where there is none.

    Collective.
    """
    optimizer = _of(param)
    return None if optimizer is None else optimizer.full_state(param, optim_state_key)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Sets an optimizer state that exists, from a whole tensor. Collective; raises as `safe_set_full_fp32_param`."""
    _must(param).set_full_state(param, optim_state_key, value)


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """This rank's part of the master value: (n,), at every stage (stage 0: all of it)."""
    optimizer = _of(param)
    return None if optimizer is None else optimizer.local_param(param)


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Sets this rank's part from `value` (n,) and spreads it where parameters are whole. Collective."""
    _must(param).set_local_param(param, value)


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """This rank's part of the mean gradient: (n,); None where `param` got none. Collective."""
    optimizer = _of(param)
    return None if optimizer is None else optimizer.local_grad(param)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replaces this rank's part of the mean gradient for the coming step, from `value` (n,). Collective."""
    _must(param).set_local_grad(param, value)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """This rank's part of an optimizer state: (n,), or a counter; None where it has none."""
    optimizer = _of(param)
    return None if optimizer is None else optimizer.local_state(param, optim_state_key)


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Sets this rank's part of an optimizer state from `value` (n,), or a counter."""
    _must(param).set_local_state(param, optim_state_key, value)
