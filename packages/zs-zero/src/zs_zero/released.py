"""What a parameter is while its values live on other ranks.

Its storage has zero bytes then, and torch reads a resized storage without looking: sums crash the interpreter, numpy
returns whatever lies there. So while it is released a parameter's class is a subclass that answers what needs no
values (shape, dtype, requires_grad ...) and raises for the rest, naming the parameter and the way out.
"""

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from zs_comm import ZsError

# One by one, never "every property": `.data` and `.T` are properties too and hand out the missing values.
_ALLOWED_GETTERS = (
    "shape dtype device layout requires_grad is_leaf grad grad_fn ndim is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_mkldnn is_nested is_xpu itemsize nbytes names retains_grad output_nr _version"
).split()
_ALLOWED_METHODS = (
    "size dim numel nelement ndimension element_size stride storage_offset is_contiguous is_floating_point is_complex "
    "is_signed is_same_size get_device register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad "
    "_is_view type_as __hash__ __len__"
).split()


def _allowed() -> set[Any]:
    allowed: set[Any] = set()
    for name in _ALLOWED_GETTERS:
        if (attribute := getattr(torch.Tensor, name, None)) is not None and hasattr(attribute, "__get__"):
            allowed.add(attribute.__get__)
    for name in ("requires_grad", "grad"):
        allowed.add(getattr(torch.Tensor, name).__set__)
        allowed.add(getattr(torch.Tensor, name).__delete__)
    for name in _ALLOWED_METHODS:
        if (attribute := getattr(torch.Tensor, name, None)) is not None:
            allowed.add(attribute)
    allowed -= {torch.Tensor.type_as}
    allowed |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.Tensor.is_floating_point}
    return allowed


_READ_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__


class ReleasedParameterError(ZsError, RuntimeError):
    """A parameter was read or written while its values are spread over the ranks (stage 3)."""


def classes_of(param: nn.Parameter) -> tuple[type[nn.Parameter], type[nn.Parameter]]:
    """The parameter's own class, and the one it has while it is released."""
    original = type(param)._zs_original if isinstance(param, _Released) else type(param)
    return original, type(f"Released{original.__name__}", (_Released, original), {"_zs_original": original})


class _Released(nn.Parameter):
    _zs_original: type[nn.Parameter]
    _zs_allowed: frozenset[Any] = frozenset(_allowed())
    _zs_name: str  # set on the instance

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == _READ_GRAD and sys._getframe(1).f_globals.get("__name__") == "torch.nn.utils.clip_grad":
            # it leaves out parameters without a gradient, so it would clip nothing and return 0
            _refuse(args[0], "torch.nn.utils.clip_grad_norm_ (use optimizer.clip_grad_norm_)")
        if func in cls._zs_allowed:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        released = _released_in((args, kwargs))
        fetch = released[0].__dict__.get("_zs_fetch")
        if fetch is not None:  # under Init: initialisation code may touch what it built before
            fetch(released)
            return func(*args, **kwargs)
        _refuse(released[0], getattr(func, "__name__", str(func)))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter {self._zs_name!r} (released: shape {tuple(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse(self, "pickling")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse(self, "copying")


def _refuse(param: Any, doing: str) -> NoReturn:
    gone = param.__dict__.get("_zs_gone")
    if gone is not None:
        raise ReleasedParameterError(
            f"parameter {param._zs_name!r} (shape {tuple(param.shape)}) {gone}, so {doing} has no values to work on"
        )
    raise ReleasedParameterError(
        f"parameter {param._zs_name!r} (shape {tuple(param.shape)}) is sharded and not gathered here, so {doing} has "
        f"no values to work on; use `with zs_zero.gathered(param): ...` on every rank (or "
        f"zs_zero.full_state_dict(model) for all of them). If the model's own forward did this, make the module whose "
        f"forward needs the parameter a unit: zs_zero.shard(..., units=[...])"
    )


def _released_in(values: Any) -> list[Any]:
    if isinstance(values, _Released):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [found for value in values for found in _released_in(value)]
