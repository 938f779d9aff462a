"""as_buffer on numpy arrays: every dtype that has bytes, and the refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from zs_offload_aio.adapters import as_buffer

NEEDS = {"numpy"}

DTYPES = ["u1", "i8", "f2", "f4", ">f8", "c16", "?", "S7", "U3", "M8[ns]", "m8[s]", "V5", [("a", "i4"), ("b", "f8")]]


class OnlyDlpack:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 3)], ids=str)
def test_every_dtype_and_shape(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, dtype)
    shown = memoryview(as_buffer(array, writable=True)).cast("B")
    assert shown.nbytes == array.nbytes
    shown[:] = bytes(range(33, 33 + 160))[: shown.nbytes] if shown.nbytes < 160 else b"\1" * shown.nbytes
    assert array.tobytes() == bytes(shown)


def test_a_view_of_a_larger_array_touches_only_its_bytes() -> None:
    whole = np.zeros(100, "i4")
    shown = memoryview(as_buffer(whole[10:20], writable=True)).cast("B")
    shown[:] = b"\xff" * 40
    assert (whole != 0).nonzero()[0].tolist() == list(range(10, 20))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4))[:, :2],
        np.zeros(8)[::-1],
        np.zeros(8)[::2],
        np.broadcast_to(np.zeros(1), (4,)),
        np.asfortranarray(np.zeros((3, 4))),
    ],
    ids=["columns", "negative", "step", "broadcast", "fortran"],
)
def test_what_is_not_contiguous_is_refused(array: Any) -> None:
    for writable in (False, True):
        with pytest.raises(TypeError, match="not contiguous"):
            as_buffer(array, writable=writable)


def test_read_only_and_objects_are_refused() -> None:
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    assert memoryview(as_buffer(frozen, writable=False)).readonly
    with pytest.raises(TypeError, match="read-only"):
        as_buffer(frozen, writable=True)
    for holder in (np.array([object()]), np.zeros(2, [("a", "O"), ("b", "f8")])):
        with pytest.raises(TypeError, match="Python objects"):
            as_buffer(holder, writable=False)


def test_subclasses_are_arrays() -> None:
    class Odd(np.ndarray):  # type: ignore[type-arg]
        def reshape(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError

    assert memoryview(as_buffer(np.zeros((2, 2)).view(Odd), writable=True)).nbytes == 32


def test_dlpack_alone() -> None:
    array = np.arange(6, dtype="f4")
    shown = memoryview(as_buffer(OnlyDlpack(array), writable=True))
    shown[:4] = b"\0\0\x80\x3f"
    assert array.tolist() == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    del array
    assert shown.nbytes == 24
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    with pytest.raises(TypeError, match="read-only"):
        as_buffer(OnlyDlpack(frozen), writable=True)
    with pytest.raises(TypeError, match="not contiguous"):
        as_buffer(OnlyDlpack(np.zeros(8)[::-1]), writable=False)
    with pytest.raises(TypeError, match="not contiguous"):
        as_buffer(OnlyDlpack(np.broadcast_to(np.zeros(1), (4,)).copy()[::2]), writable=False)
