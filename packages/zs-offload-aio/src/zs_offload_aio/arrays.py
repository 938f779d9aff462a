"""What the optimizer kernels can work on: an object's elements, where they lie and of which dtype.

Neither torch nor numpy is imported here. A torch tensor and an array of ml_dtypes' bfloat16 are recognised by what
they can do; everything else goes to the extension as it is and is read by the buffer protocol there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeAlias

Array: TypeAlias = "tuple[int, int, str] | object"
"""(address, numel, "float32" | "bfloat16" | "float16"), or an exporter of the buffer protocol."""

_DTYPES = ("float32", "bfloat16", "float16")


def as_array(name: str, value: Any, *, written: bool = False) -> Array:
    """`value` in the form that `_core`'s optimizers take; the caller keeps `value` alive.

    Raises `TypeError` (no floating dtype that the kernels know, no host memory) or `ValueError` (not contiguous, or
    read-only where it is `written`), naming the argument.
    """
    if hasattr(value, "data_ptr"):
        array = tensor_array(name, value)
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous: shape {tuple(value.shape)}, strides {value.stride()}")
        return array
    if getattr(getattr(value, "dtype", None), "name", None) == "bfloat16" and hasattr(value, "__array_interface__"):
        interface = value.__array_interface__
        address, readonly = interface["data"]
        if not value.flags["C_CONTIGUOUS"] or not value.dtype.isnative:
            raise ValueError(f"{name} must be contiguous, in the machine's byte order")
        if readonly and written:
            raise ValueError(f"{name} must be contiguous and writable: it is read-only")
        return address, value.size, "bfloat16"
    return value  # type: ignore[no-any-return]


@cache  # of the few that there are: this is asked four times per parameter and step
def _last_name(constant: object) -> str:
    """ "float32" of torch.float32, "strided" of torch.strided."""
    return str(constant).rpartition(".")[2]


def tensor_array(name: str, tensor: Any) -> Array:
    """A torch tensor's memory, from its first element on, `numel` elements without gaps (which is not checked)."""
    dtype = _last_name(tensor.dtype)
    if dtype not in _DTYPES:
        raise TypeError(f"{name} is {dtype}: {', '.join(_DTYPES)}")
    if not tensor.is_cpu:
        raise TypeError(f"{name} is on {tensor.device}: the kernels work on host memory")
    if _last_name(tensor.layout) != "strided":
        raise TypeError(f"{name} has the layout {tensor.layout}: a dense tensor")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazy negative: pass .resolve_neg()")
    numel: int = tensor.numel()
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu":  # a fake tensor's is on "meta"
            raise TypeError(f"{name} has no memory of its own")
        address, held = tensor.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError) as error:  # a functional wrapper
        raise TypeError(f"{name} has no memory of its own: {str(error).splitlines()[0]}") from error
    if held < (tensor.storage_offset() + numel) * (4 if dtype == "float32" else 2):
        raise ValueError(f"{name}: the memory of this tensor was released")
    return address, numel, dtype


def changed(values: Iterable[Any]) -> None:
    """Tell torch's autograd that these were written, where they are tensors: a saved old value is then an error."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    tensors = [value for value in values if isinstance(value, torch.Tensor) and not value.is_inference()]
    if tensors:
        torch.autograd.graph.increment_version(tensors)
