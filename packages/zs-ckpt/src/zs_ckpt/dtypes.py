"""dtypes by name, and as safetensors spells them."""

from __future__ import annotations

import torch

# what every release of safetensors since 0.5 reads; anything else is stored as bytes
_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
_OTHERS = ("complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of that name; None where this torch has none or a checkpoint stores none."""
    if name not in _SAFETENSORS and name not in _OTHERS:
        return None
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def safetensors_name(dtype: torch.dtype) -> str | None:
    """safetensors' name of a dtype; None where it has none that old releases read."""
    return _SAFETENSORS.get(dtype_name(dtype))
