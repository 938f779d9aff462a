"""Values of Python that JSON lacks, in JSON: each comes back as it was, and nothing is executed to read it.

    (1, 2)        {"__zs__": "tuple", "value": [1, 2]}
    b"ab"         {"__zs__": "bytes", "value": "YWI="}
    2**64         {"__zs__": "int", "value": "18446744073709551616"}
    {1: "a"}      {"__zs__": "dict", "value": [[1, "a"]]}
    {"__zs__": 1} {"__zs____zs__": 1}                            a user's own key is escaped

Subclasses come back as their base: an `OrderedDict` as a dict, a named tuple as a tuple, an `IntEnum` as an int.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .dtypes import dtype_name, dtype_of

MARK = "__zs__"
_MOST_DEPTH = 64
_MOST_TENSOR_NBYTES = 1 << 20  # larger ones belong among the tensors
_EXACT = 2**53  # integers beyond it are not kept by every reader of JSON
_DEVICE = re.compile(r"[a-z]{2,20}(?::[0-9]{1,4})?")


class NotJson(ValueError):
    """A value that has no form here; the path to it is in the message."""


def encode(value: Any, path: str = "") -> Any:
    """`value` as what `json.dumps(..., allow_nan=False)` takes.

    Raises:
        NotJson: a part of it is of a type that has no form here, it is nested deeper than 64, or a tensor in it has
            more than 1 MiB.
    """
    return _encode(value, path or "value", 0)


def decode(value: Any) -> Any:
    """What `encode` was given.

    Raises:
        ValueError: no `encode` gives this.
    """
    return _decode(value, 0)


def _encode(value: Any, path: str, depth: int) -> Any:
    if depth > _MOST_DEPTH:
        raise NotJson(f"{path[:200]}: nested deeper than {_MOST_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value) if abs(value) <= _EXACT else _marked("int", str(int(value)))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _marked("float", repr(float(value)))
    if isinstance(value, complex):
        return _marked("complex", [_encode(value.real, path, depth + 1), _encode(value.imag, path, depth + 1)])
    if isinstance(value, bytes | bytearray):
        return _marked("bytes", base64.b64encode(value).decode())
    if isinstance(value, torch.Size):
        return _marked("size", list(value))
    if isinstance(value, list):
        return [_encode(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return _marked("tuple", [_encode(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)])
    if isinstance(value, set | frozenset):
        kind = "set" if isinstance(value, set) else "frozenset"
        items = sorted(value, key=lambda item: (type(item).__name__, repr(item)))
        return _marked(kind, [_encode(item, f"{path}{{}}", depth + 1) for item in items])
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, depth)
    if isinstance(value, torch.dtype):
        return _marked("dtype", dtype_name(value))
    if isinstance(value, torch.device):
        return _marked("device", str(value))
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _encode(value.item(), path, depth)  # a numpy scalar
    raise NotJson(f"{path}: a {type(value).__module__}.{type(value).__qualname__} has no form in JSON")


def _marked(kind: str, value: Any) -> dict[str, Any]:
    return {MARK: kind, "value": value}


def _encode_mapping(value: Mapping[Any, Any], path: str, depth: int) -> Any:
    if all(isinstance(key, str) for key in value):
        return {
            (MARK + key if key.startswith(MARK) else str(key)): _encode(item, f"{path}.{key}", depth + 1)
            for key, item in value.items()
        }
    pairs = [
        [_encode(key, f"{path} key", depth + 1), _encode(item, f"{path}[{key!r}]", depth + 1)]
        for key, item in value.items()
    ]
    return _marked("dict", pairs)


def _encode_tensor(value: torch.Tensor, path: str) -> Any:
    if value.layout != torch.strided or value.nbytes > _MOST_TENSOR_NBYTES or dtype_of(dtype_name(value.dtype)) is None:
        raise NotJson(
            f"{path}: a tensor of {value.dtype} with {value.nbytes:,} bytes is no small state of another kind"
        )
    raw = bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""
    text = base64.b64encode(raw).decode()
    return _marked("tensor", {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "data": text})


def _decode(value: Any, depth: int) -> Any:
    if depth > 2 * _MOST_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, list):
        return [_decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if MARK in value:
        kind = value[MARK]
        if set(value) != {MARK, "value"} or not isinstance(kind, str) or kind not in _DECODERS:
            raise ValueError(f"a value marked {kind!r} with the members {sorted(value)} is none that is known")
        try:
            return _DECODERS[kind](value["value"], depth + 1)
        except (TypeError, KeyError, RuntimeError, binascii.Error, OverflowError) as error:
            raise ValueError(f"a value marked {kind!r} is not well formed: {error}") from error
    return {
        (key.removeprefix(MARK) if key.startswith(MARK) else key): _decode(item, depth + 1)
        for key, item in value.items()
    }


def _items(value: Any, depth: int) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} instead of a list")
    return [_decode(item, depth) for item in value]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a str")
    return value


def _pairs(value: Any, depth: int) -> dict[Any, Any]:
    made = {}
    for pair in value:
        key, item = _items(pair, depth)
        if key in made:
            raise ValueError(f"the key {key!r} is there twice")
        made[key] = item
    return made


def _float(value: Any, depth: int) -> float:
    return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[_text(value)]


def _complex(value: Any, depth: int) -> complex:
    real, imag = _items(value, depth)
    return complex(real, imag)


def _size(value: Any, depth: int) -> torch.Size:
    if not all(isinstance(size, int) and size >= 0 for size in value):
        raise ValueError(f"{value} is no shape")
    return torch.Size(value)


def _dtype(value: Any, depth: int) -> torch.dtype:
    found = getattr(torch, _text(value), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {value!r}")
    return found


def _device(value: Any, depth: int) -> torch.device:
    if not _DEVICE.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is no device")
    return torch.device(value)


def _tensor(value: Any, depth: int) -> torch.Tensor:
    dtype, raw, shape = (
        dtype_of(_text(value["dtype"])),
        base64.b64decode(_text(value["data"]), validate=True),
        value["shape"],
    )
    if dtype is None:
        raise ValueError(f"torch has no dtype {value['dtype']!r}")
    size = _size(shape, depth)
    if math.prod(size) * dtype.itemsize != len(raw):
        raise ValueError(f"{len(raw)} bytes are not a tensor of {list(size)} and {dtype}")
    if not raw:
        return torch.empty(size, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(size)


_DECODERS: dict[str, Callable[[Any, int], Any]] = {
    "int": lambda value, depth: int(_text(value)),
    "float": _float,
    "complex": _complex,
    "bytes": lambda value, depth: base64.b64decode(_text(value), validate=True),
    "tuple": lambda value, depth: tuple(_items(value, depth)),
    "set": lambda value, depth: set(_items(value, depth)),
    "frozenset": lambda value, depth: frozenset(_items(value, depth)),
    "dict": _pairs,
    "size": _size,
    "dtype": _dtype,
    "device": _device,
    "tensor": _tensor,
}
