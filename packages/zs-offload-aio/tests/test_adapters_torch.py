"""as_buffer on torch tensors: every dtype by its address, and the refusals."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from zs_offload_aio.adapters import as_buffer

NEEDS = {"torch"}

DTYPES = [
    dtype
    for name in sorted(dir(torch))
    if isinstance(dtype := getattr(torch, name), torch.dtype) and name == str(dtype)[6:]
]


def holds(dtype: torch.dtype) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # some are experimental
            tensor = torch.empty(3, dtype=dtype)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return tensor.untyped_storage().nbytes() >= 3 * tensor.element_size()  # not so for quantized ones below a byte


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if holds(dtype)], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.empty(8, dtype=dtype)
    shown = memoryview(as_buffer(tensor, writable=True))
    assert shown.nbytes == 8 * tensor.element_size() and not shown.readonly
    shown[:] = bytes(shown.nbytes)
    shown[-1] = 1
    assert bytes(tensor.untyped_storage().tolist()) == bytes(shown)


def test_the_dtypes_that_matter_are_among_them() -> None:
    found = {str(dtype) for dtype in DTYPES if holds(dtype)}
    assert {"torch.bfloat16", "torch.float8_e4m3fn", "torch.bool", "torch.complex64", "torch.uint16"} <= found


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    assert memoryview(as_buffer(torch.zeros(shape), writable=True)).nbytes == 4 * torch.zeros(shape).numel()


def test_a_view_of_a_larger_storage_touches_only_its_bytes() -> None:
    whole = torch.zeros(100, dtype=torch.int16)
    memoryview(as_buffer(whole[10:20], writable=True))[:] = b"\xff" * 20
    assert whole.nonzero().flatten().tolist() == list(range(10, 20))


def test_parameters_are_tensors() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    memoryview(as_buffer(parameter, writable=True))[:4] = b"\0\0\x80\x3f"
    assert parameter.tolist() == [1.0, 0.0]


def refused() -> dict[str, Any]:
    released = torch.zeros(4)
    released.untyped_storage().resize_(0)
    return {
        "columns": torch.zeros(4, 4)[:, :2],
        "transposed": torch.zeros(3, 4).t(),
        "step": torch.zeros(8)[::2],
        "broadcast": torch.zeros(1).expand(4),
        "conjugate": torch.zeros(4, dtype=torch.complex64).conj(),
        "negative": torch.zeros(4, dtype=torch.complex64).conj().imag.contiguous()._neg_view(),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(4, device="meta"),
        "released": released,
    }


@pytest.mark.parametrize("kind", sorted(refused()))
def test_what_has_no_run_of_bytes_is_refused(kind: str) -> None:
    for writable in (False, True):
        with pytest.raises(TypeError, match="cannot be used"):
            as_buffer(refused()[kind], writable=writable)


def test_wrapper_subclasses_are_refused() -> None:
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> Any:
            raise NotImplementedError

    hollow = torch.Tensor._make_wrapper_subclass(Wrapper, (4,), device="cpu")
    with pytest.raises(TypeError, match="cannot be used"):
        as_buffer(hollow, writable=False)


def test_the_storage_is_kept_even_if_the_tensor_takes_another() -> None:
    tensor = torch.full((1 << 20,), 3.0)
    shown = memoryview(as_buffer(tensor, writable=True))
    tensor.data = torch.zeros(1)
    gc.collect()
    assert shown[-4:] == b"\0\0\x40\x40"


def test_nothing_is_kept_after_the_last_view() -> None:
    tensor = torch.zeros(4)
    alive = weakref.ref(tensor)
    shown = memoryview(as_buffer(tensor, writable=True))
    del tensor, shown
    assert alive() is None


class OnlyDlpack:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_dlpack_alone() -> None:
    tensor = torch.zeros(6, dtype=torch.bfloat16)
    memoryview(as_buffer(OnlyDlpack(tensor[2:4]), writable=True))[:] = b"\x80\x3f" * 2
    assert tensor.tolist() == [0, 0, 1, 1, 0, 0]
    with pytest.raises(TypeError, match="not contiguous"):
        as_buffer(OnlyDlpack(torch.zeros(4, 4).t()), writable=False)
    with pytest.raises(TypeError, match="__dlpack__"):
        as_buffer(OnlyDlpack(torch.zeros(2, requires_grad=True)), writable=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
def test_a_device_tensor_goes_through_pinned_memory(dtype: torch.dtype) -> None:
    device = torch.ones(3, 5, dtype=dtype, device="cuda")
    source = as_buffer(device, writable=False)
    assert bytes(source) == bytes(device.cpu().untyped_storage().tolist())
    target = as_buffer(device, writable=True)
    memoryview(target)[:] = bytes(memoryview(target).nbytes)
    assert device.bool().all()
    target.finish()
    assert not device.bool().any()
    with pytest.raises(TypeError, match="not contiguous"):
        as_buffer(device.t(), writable=False)
