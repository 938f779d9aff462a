"""A tensor's memory as bytes, without numpy and without a copy."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, which they keep alive. Raises ConfigError for another one."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ConfigError(f"bytes of a {tensor.device.type} tensor with strides {tensor.stride()} are not in one place")
    nbytes = tensor.nbytes
    if not nbytes:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]  # what the memory belongs to
    return memoryview(array).cast("B")
