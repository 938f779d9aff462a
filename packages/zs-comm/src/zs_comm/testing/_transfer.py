"""How functions and values travel between the test and its ranks.

A function travels as (file, module name, qualified name): test directories are no packages, so pickle
cannot find it by import. A value travels as a plain pickle in which tensors are bytes: torch's own
reductions for multiprocessing put tensors into shared memory, which dies with the rank.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FunctionRef:
    """Where a function is found again in another process."""

    path: str
    module: str
    qualname: str

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> FunctionRef:
        """Raises ValueError for what another process cannot find: lambdas, closures, partials, methods."""
        target = inspect.unwrap(fn)
        if not isinstance(target, FunctionType):
            raise ValueError(f"run_ranks needs a module-level function, not {fn!r}")
        if "<" in target.__qualname__:
            raise ValueError(
                f"run_ranks needs a module-level function: {target.__qualname__} in {target.__code__.co_filename} "
                "is a lambda or local to another function, so a rank cannot find it by name"
            )
        name = target.__module__
        # multiprocessing keeps "__mp_main__" as the other name of "__main__", in this process too.
        name = "__mp_main__" if name == "__main__" else name
        return cls(str(Path(target.__code__.co_filename).resolve()), name, target.__qualname__)

    def load(self) -> Callable[..., Any]:
        found: Any = self._module()
        for part in self.qualname.split("."):
            found = getattr(found, part)
        if not callable(found):
            raise TypeError(f"{self.qualname} in {self.path} is no function")
        return found  # type: ignore[no-any-return]

    def _module(self) -> ModuleType:
        loaded = sys.modules.get(self.module)
        if loaded is not None and self._is_ours(getattr(loaded, "__file__", None)):
            return loaded
        try:
            spec = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and self._is_ours(spec.origin):
            return importlib.import_module(self.module)
        spec = importlib.util.spec_from_file_location(self.module, self.path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import {self.path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.module] = module  # under the test's own name: classes defined in it unpickle on both sides
        for parent in _parents(self.module):  # unpickling imports them first; pytest has made them up in the test too
            sys.modules.setdefault(parent, ModuleType(parent))
        spec.loader.exec_module(module)
        return module

    def _is_ours(self, origin: str | None) -> bool:
        return origin is not None and str(Path(origin).resolve()) == self.path


def _parents(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _tensor_from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(shape).requires_grad_(requires_grad)


def _parameter(data: Tensor, requires_grad: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad=requires_grad)


class _Pickler(pickle.Pickler):
    """Plain pickle, but dense tensors become a CPU copy of their elements (a view only of its own)."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.nn.Parameter:
            return _parameter, (obj.detach().clone(), obj.requires_grad)
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_quantized or obj.is_complex():
            return NotImplemented
        if obj.device.type == "meta":
            return NotImplemented
        dense = obj.detach().cpu().contiguous()
        data = ctypes.string_at(dense.data_ptr(), dense.nbytes) if dense.numel() else b""
        return _tensor_from_bytes, (data, obj.dtype, tuple(obj.shape), obj.requires_grad)


def dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    return pickle.loads(data)
