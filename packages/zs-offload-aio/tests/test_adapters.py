"""as_buffer with neither numpy nor torch: the buffer protocol, and DLPack by capsules made by hand."""

from __future__ import annotations

import array
import ctypes
import mmap
import subprocess
import sys
from typing import Any

import pytest
from zs_offload_aio import _core
from zs_offload_aio.adapters import as_buffer

CPU, CUDA, CUDA_HOST = 1, 2, 3
READ_ONLY, IS_COPIED, PADDED = 1, 2, 4


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Exporter:
    """Has only `__dlpack__` and `__dlpack_device__`; counts how often the deleter is called."""

    def __init__(
        self,
        memory: bytearray,
        shape: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        bits: int = 8,
        lanes: int = 1,
        device: int = CPU,
        byte_offset: int = 0,
        versioned: bool = True,
        major: int = 1,
        flags: int = 0,
        null: bool = False,
    ) -> None:
        self.memory, self.deleted, self.versioned, self.device = memory, 0, versioned, device
        self._data = (ctypes.c_char * len(memory)).from_buffer(memory)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*strides) if strides is not None else None
        address = None if null else ctypes.addressof(self._data)
        self._deleter = DELETER(self._count)
        tensor = Tensor(address, device, 0, len(shape), 0, bits, lanes, self._shape, self._strides, byte_offset)
        if versioned:
            self._managed: Any = Versioned(major, 0, None, self._deleter, flags, tensor)
        else:
            self._managed = Managed(tensor, None, self._deleter)

    def _count(self, _: int) -> None:
        self.deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **options: object) -> object:
        if not self.versioned and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return _new_capsule(ctypes.addressof(self._managed), name, None)


@pytest.mark.parametrize(
    "make", [bytearray, lambda data: array.array("B", data), lambda data: memoryview(bytearray(data))]
)
def test_the_buffer_protocol_passes_through(make: Any) -> None:
    obj = make(b"abcdef")
    shown = memoryview(as_buffer(obj, writable=True))
    shown[1:3] = b"xy"
    assert bytes(obj) == b"axydef"


def test_other_formats_and_shapes() -> None:
    doubles = array.array("d", [1.0, 2.0])
    assert memoryview(as_buffer(doubles, writable=True)).nbytes == 16
    shaped = memoryview(bytearray(24)).cast("d", (3, 1))
    assert memoryview(as_buffer(shaped, writable=True)).nbytes == 24
    with mmap.mmap(-1, 4096) as mapped:
        shown = memoryview(as_buffer(mapped, writable=True))
        shown[0] = 7
        assert mapped[0] == 7
        shown.release()


@pytest.mark.parametrize("obj", [b"bytes", memoryview(bytearray(4)).toreadonly()])
def test_read_only_is_refused_for_reading_into(obj: Any) -> None:
    assert bytes(as_buffer(obj, writable=False)) == bytes(obj)
    with pytest.raises(TypeError, match="read-only"):
        as_buffer(obj, writable=True)


@pytest.mark.parametrize(
    "obj",
    [memoryview(bytearray(8))[::2], memoryview(bytearray(8))[::-1], memoryview(bytearray(8)).cast("B", (4, 2))[::2]],
    ids=["step", "negative", "rows"],
)
def test_what_is_not_contiguous_is_refused(obj: Any) -> None:
    for writable in (False, True):
        with pytest.raises(TypeError, match="not contiguous"):
            as_buffer(obj, writable=writable)


@pytest.mark.parametrize("obj", [None, 5, "text", [1, 2], object()])
def test_what_has_no_bytes_is_refused_by_its_type(obj: Any) -> None:
    with pytest.raises(TypeError, match=type(obj).__name__):
        as_buffer(obj, writable=False)


@pytest.mark.parametrize("versioned", [True, False])
def test_dlpack_bytes_and_one_deleter_call(versioned: bool) -> None:
    memory = bytearray(range(24))
    exporter = Exporter(memory, (2, 4), bits=16, byte_offset=4, versioned=versioned)
    shown = memoryview(as_buffer(exporter, writable=False))
    assert bytes(shown) == bytes(range(4, 20))
    part = shown[:1]
    del shown
    assert exporter.deleted == 0
    del part
    assert exporter.deleted == 1


def test_dlpack_reading_into_needs_the_word_of_the_versioned_flags() -> None:
    memory = bytearray(8)
    memoryview(as_buffer(Exporter(memory, (8,)), writable=True))[2] = 9
    assert memory == b"\0\0\x09\0\0\0\0\0"
    for exporter in (
        Exporter(memory, (8,), versioned=False),
        Exporter(memory, (8,), flags=READ_ONLY),
        Exporter(memory, (8,), flags=IS_COPIED),
    ):
        with pytest.raises(TypeError, match="read-only"):
            as_buffer(exporter, writable=True)
        assert exporter.deleted == 1  # consumed, then given back
        assert memoryview(as_buffer(exporter, writable=False)).readonly


@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 4), (1, 2)), ((8,), (2,)), ((8,), (-1,)), ((8,), (0,)), ((4, 2), (4, 1))]
)
def test_dlpack_strides_that_are_refused(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    exporter = Exporter(bytearray(64), shape, strides=strides)
    with pytest.raises(TypeError, match="not contiguous"):
        as_buffer(exporter, writable=False)
    assert exporter.deleted == 0  # the capsule is as it was: its own destructor would call the deleter


@pytest.mark.parametrize(
    ("shape", "strides", "bits", "nbytes"),
    [
        ((2, 1, 4), (4, 77, 1), 8, 8),  # the stride of a dim of one says nothing
        ((), None, 64, 8),
        ((0, 5), (9, 9), 32, 0),
        ((2, 3), (3, 1), 32, 24),
        ((3,), None, 4, 2),  # packed: 12 bits
    ],
)
def test_dlpack_shapes(shape: tuple[int, ...], strides: tuple[int, ...] | None, bits: int, nbytes: int) -> None:
    assert (
        memoryview(as_buffer(Exporter(bytearray(64), shape, strides=strides, bits=bits), writable=True)).nbytes
        == nbytes
    )


def test_dlpack_elements_below_a_byte_may_be_padded_and_lanes_count() -> None:
    memory = bytearray(64)
    assert memoryview(as_buffer(Exporter(memory, (3,), bits=4, flags=PADDED), writable=True)).nbytes == 3
    assert memoryview(as_buffer(Exporter(memory, (3,), bits=32, lanes=4), writable=True)).nbytes == 48


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (-1,)},
        {"shape": (1 << 62, 1 << 62)},
        {"shape": (1 << 62,)},
        {"shape": (4,), "bits": 0},
        {"shape": (4,), "byte_offset": (1 << 64) - 2},
        {"shape": (4,), "null": True},
        {"shape": (4,), "device": CUDA},
        {"shape": (4,), "major": 2},
    ],
    ids=str,
)
def test_dlpack_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="DLPack"):
        as_buffer(Exporter(bytearray(64), **wrong), writable=False)


def test_dlpack_of_pinned_host_memory_is_host_memory() -> None:
    assert memoryview(as_buffer(Exporter(bytearray(4), (4,), device=CUDA_HOST), writable=True)).nbytes == 4


def test_a_capsule_is_consumed_once() -> None:
    exporter = Exporter(bytearray(4), (4,))
    capsule = exporter.__dlpack__()
    first = _core.from_dlpack(capsule, True)
    with pytest.raises(TypeError, match="consumed already"):
        _core.from_dlpack(capsule, True)
    with pytest.raises(TypeError, match="not a DLPack capsule"):
        _core.from_dlpack(b"", True)
    del first
    assert exporter.deleted == 1


def test_an_exporter_that_fails_says_why() -> None:
    class Broken:
        def __dlpack__(self, **_: object) -> object:
            raise BufferError("not today")

    with pytest.raises(TypeError, match="not today"):
        as_buffer(Broken(), writable=False)


def test_neither_numpy_nor_torch_is_imported() -> None:
    code = "import sys; from zs_offload_aio.adapters import as_buffer; as_buffer(bytearray(3), writable=True); "
    code += "print({'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "set()\n"
