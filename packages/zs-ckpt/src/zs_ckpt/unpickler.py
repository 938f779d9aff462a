"""Reads files of `torch.save` without running anything that is in them: for checkpoints of other programs.

Python's unpickler calls what the file names. This one is a small machine over `pickletools.genops` that builds plain
values only: dict, list, tuple, set, numbers, text, bytes, tensors, and `Record` for the few classes that DeepSpeed puts
into its checkpoints. Every global of the file is looked up in the tables below; any other is refused, also where the
file does not call it. Storages are memory-mapped and checked against the zip archive's CRC-32 where they are used.
"""

from __future__ import annotations

import os
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from zs_comm import ZsError

from .errors import CheckpointCorrupt
from .torchzip import Archive, Storage


class PickleRefused(ZsError, ValueError):
    """A pickle names something outside of the allow-list: `file` and `name` (`module.name`) say what and where."""

    def __init__(self, file: str | os.PathLike[str], name: str) -> None:
        self.file, self.name = str(file), name
        super().__init__(
            f"{file}: the pickle asks for {name}, which is not on the list of what is read; nothing was run"
        )

    def __reduce__(self) -> tuple[type[PickleRefused], tuple[str, str]]:
        return type(self), (self.file, self.name)


@dataclass(eq=False)  # by identity, so that it can be a key as its original could
class Record:
    """An object of another program's class, as data: never of that class, without its code."""

    name: str  # module.class
    arguments: tuple[Any, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


RECORDS = frozenset(  # classes of DeepSpeed, whichever of its modules a version keeps them in
    "LossScaler LossScalerBase DynamicLossScaler ZeroStageEnum fragment_address tensor_fragment SubparamShape "
    "OffloadDeviceEnum OffloadStateTypeEnum PipelineParallelGrid ProcessTopology PipeModelDataParallelTopology "
    "WarmupLR WarmupDecayLR WarmupCosineLR OneCycle LRRangeTest".split()
)
_OTHERS = ("argparse.Namespace", "types.SimpleNamespace", "numpy.dtype")
DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip


def read_pickled(path: str | os.PathLike[str], region: tuple[int, int] | None = None) -> Any:
    """What `torch.save` wrote to `path`, as plain values. Tensors are views of the mapped file, on the CPU.

    `region`: the first byte and the number of bytes of an archive inside of a larger file.

    Raises CheckpointCorrupt where the file is damaged or no torch archive, PickleRefused where it names a global that
    is not allowed, OSError where it cannot be read.
    """
    path = Path(path)
    try:
        archive = Archive(path, region)
        return _Machine(path, archive).run(archive.pickle())
    except (ZsError, OSError):
        raise
    except Exception as error:  # a hostile file has many ways to be wrong; each means the same to the caller
        raise CheckpointCorrupt(f"not a readable torch archive: {type(error).__name__}: {error}", path) from error


def read_bare_pickle(path: str | os.PathLike[str], classes: frozenset[str]) -> Any:
    """What the pickle at `path`, in no archive, holds; objects of `classes` (`module.class`) as `Record`s.

    Raises as `read_pickled`.
    """
    path = Path(path)
    try:
        return _Machine(path, None, classes).run(path.read_bytes())
    except (ZsError, OSError):
        raise
    except Exception as error:
        raise CheckpointCorrupt(f"not a readable pickle: {type(error).__name__}: {error}", path) from error


class _Machine:
    """The pickle's operations, one method for each family; `stack` and `memo` as in the language's definition."""

    def __init__(self, path: Path, archive: Archive | None, classes: frozenset[str] = frozenset()) -> None:
        self.path, self.archive, self.classes = path, archive, classes
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, data: bytes) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            else:
                operation = _OPERATIONS.get(name)
                if operation is None:
                    self.refuse(f"the operation {name}")
                operation(self, argument)
        raise ValueError("the pickle does not end")

    def refuse(self, name: str) -> NoReturn:
        raise PickleRefused(self.path, name)

    def marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def popped(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("the pickle takes more than it put")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def look_up(self, module: str, name: str) -> Any:
        found = _Global("builtins" if module == "__builtin__" else module, name)  # as protocol 2 calls it
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if str(found) in CALLS or (module in ("torch", "torch.storage") and name in DTYPES):
            return found
        if self.is_record(found):
            return found
        self.refuse(str(found))

    def is_record(self, found: _Global) -> bool:
        deepspeed = found.module.partition(".")[0] == "deepspeed" and found.name in RECORDS
        return deepspeed or str(found) in self.classes or str(found) in _OTHERS

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            self.refuse(f"a call of {type(function).__name__}")
        if self.is_record(function):
            return Record(str(function), arguments)
        if str(function) not in CALLS:
            self.refuse(f"a call of {function}")
        return CALLS[str(function)](*arguments)

    def build(self, _: Any) -> None:
        value, state = self.popped(2)
        if isinstance(value, Record):
            parts = state if isinstance(state, tuple) else (state,)  # (fields, slots), fields, or what a class likes
            if all(isinstance(part, dict | None) for part in parts):
                for part in parts:
                    value.fields.update(part or {})
            else:
                value.fields["state"] = state
        elif not isinstance(value, dict):  # a module's state_dict has a `_metadata` beside its items: not needed
            self.refuse(f"a state for {type(value).__name__}")
        self.stack.append(value)

    def persistent(self, _: Any) -> None:
        kind, storage, key, _, numel = self.popped(1)[0]
        if self.archive is None or kind != "storage" or not isinstance(storage, _Global) or storage.name not in DTYPES:
            raise ValueError(f"persistent id {kind!r}")
        if key not in self.storages:
            self.storages[key] = self.archive.storage(str(key), DTYPES[storage.name], numel)
        self.stack.append(self.storages[key])

    def stack_global(self, _: Any) -> None:
        module, name = self.popped(2)
        self.stack.append(self.look_up(str(module), str(name)))

    def reduce(self, _: Any) -> None:
        self.stack.append(self.call(*self.popped(2)))

    def new_with_keywords(self, _: Any) -> None:
        function, arguments, keywords = self.popped(3)
        made = self.call(function, arguments)
        if keywords and not isinstance(made, Record):
            self.refuse(f"a call of {function} with keywords")
        if keywords:
            made.fields.update(keywords)
        self.stack.append(made)

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def gather(self, kind: Callable[[list[Any]], Any]) -> None:
        found = kind(self.marked())
        self.stack.append(found)

    def new_dict(self, pairs: list[Any]) -> None:
        self.stack.append({})
        self.items(pairs)

    def items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            self.refuse(f"items for {type(target).__name__}")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            self.refuse(f"values for {type(target).__name__}")
        target.extend(values)

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            self.refuse(f"members for {type(target).__name__}")
        target.update(values)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`, with its bounds checked."""
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise ValueError("a tensor without its storage")
    if min((offset, *size, *stride)) < 0 or prod(size) > storage.flat.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} in {storage.flat.numel()} elements")
    if prod(size) and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= storage.flat.numel():
        raise ValueError(f"a tensor reaches beyond its {storage.flat.numel()} elements")
    return storage.flat.as_strided(tuple(size), tuple(stride), offset if prod(size) else 0)


def _of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Tensor:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, which are left out."""
    if not isinstance(function, _Global) or str(function) not in _TENSORS:
        raise ValueError(f"a tensor made by {function}")
    return _TENSORS[str(function)](*arguments)


def _data(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter without data")
    return data


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, by which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes as {encoding}")
    return text.encode("latin1")


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    """A numpy number, as those end up in a `client_state`: Python's own."""
    kind = dtype.arguments[0] if isinstance(dtype, Record) and dtype.arguments else None
    codes = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I"}
    code = {**codes, "u2": "H", "u1": "B", "b1": "?"}.get(str(kind))
    order = dtype.fields.get("state", (0, "<"))[1] if code else ""
    if order not in ("<", "|") or not isinstance(raw, bytes):
        raise ValueError(f"a numpy value of dtype {kind!r}")
    return struct.unpack(f"<{code}", raw)[0]


_TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _data,
    "torch._utils._rebuild_parameter_with_state": _data,
}
CALLS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch.device": lambda *_: "cpu",
    "torch.serialization._get_layout": lambda name: str(name),
    "torch.Tensor": _data,  # named as a type only
    "torch.nn.parameter.Parameter": _data,
    "collections.OrderedDict": lambda items=(): dict(items),
    "collections.defaultdict": lambda *_: {},
    "builtins.set": lambda values=(): set(values),
    "builtins.frozenset": lambda values=(): frozenset(values),
    "builtins.list": lambda values=(): list(values),
    "builtins.dict": lambda items=(): dict(items),
    "builtins.tuple": lambda values=(): tuple(values),
    "builtins.int": lambda *_: 0,  # as the factory of a defaultdict
    "builtins.float": lambda *_: 0.0,
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(real, imaginary),
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "pathlib.PosixPath": lambda *parts: "/".join(parts).replace("//", "/"),
    "pathlib._local.PosixPath": lambda *parts: "/".join(parts).replace("//", "/"),
}

_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": _Machine.mark,
    "POP": lambda m, _: m.popped(1).clear() if m.stack else m.marked().clear(),
    "POP_MARK": lambda m, _: m.marked().clear(),
    "TUPLE": lambda m, _: m.gather(tuple),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.popped(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.popped(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.popped(3))),
    "LIST": lambda m, _: m.gather(list),
    "FROZENSET": lambda m, _: m.gather(frozenset),
    "DICT": lambda m, _: m.new_dict(m.marked()),
    "SETITEM": lambda m, _: m.items(m.popped(2)),
    "SETITEMS": lambda m, _: m.items(m.marked()),
    "APPEND": lambda m, _: m.extend(m.popped(1)),
    "APPENDS": lambda m, _: m.extend(m.marked()),
    "ADDITEMS": lambda m, _: m.add(m.marked()),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "GLOBAL": lambda m, name: m.stack.append(m.look_up(*name.split(" ", 1))),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "BYTEARRAY8": lambda m, data: m.stack.append(bytes(data)),
}
