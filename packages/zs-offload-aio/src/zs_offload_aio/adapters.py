"""Anything that holds bytes in one run of host memory, as a buffer: torch tensors, numpy arrays, DLPack.

Neither torch nor numpy is imported here: an object of theirs can only exist where they are imported already.

What is refused is refused with `TypeError`, never copied behind the caller's back: a copy that is read into would lose
the data. (The one exception says so: a CUDA tensor goes through pinned host memory, and `finish()` brings it back.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from . import _core

_NOT_CONTIGUOUS = "not contiguous (row-major): pass a contiguous copy, and copy back what was read"


def as_buffer(obj: Any, *, writable: bool) -> Any:
    """An exporter of the buffer protocol over `obj`'s bytes, which keeps its memory alive.

    `obj`: a tensor of any dtype, a numpy array of any dtype without Python objects, anything with the buffer protocol
    or `__dlpack__`. `writable`: it is to be read into. The result of a device's tensor has `finish()`, to be called
    once after a read into it succeeded.

    Raises `TypeError`: no bytes in one run, on no device that is known, read-only where `writable` is asked for.
    """
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(obj, torch.Tensor):
        return _tensor(torch, obj)
    if numpy is not None and isinstance(obj, numpy.ndarray):
        return _array(numpy, obj, writable)
    try:
        shown = memoryview(obj)
    except (TypeError, ValueError, BufferError):
        if not hasattr(type(obj), "__dlpack__"):
            raise _refusal(obj, "it has neither the buffer protocol nor __dlpack__") from None
        return _dlpack(obj, writable)
    if not shown.c_contiguous:
        raise _refusal(obj, _NOT_CONTIGUOUS)
    if "O" in shown.format:
        raise _refusal(obj, "it holds Python objects")
    if writable and shown.readonly:
        raise _refusal(obj, "it is read-only")
    return shown


def _refusal(obj: object, why: str) -> TypeError:
    kind = type(obj)
    return TypeError(f"the bytes of this {kind.__module__}.{kind.__qualname__} cannot be used: {why}")


def _tensor(torch: Any, tensor: Any) -> Any:
    """By its address: bf16, fp8 and the like have no dtype in the buffer protocol."""
    if tensor.layout is not torch.strided:
        raise _refusal(tensor, f"its layout is {tensor.layout}")
    if tensor.is_conj() or tensor.is_neg():
        raise _refusal(tensor, "it is a lazy conjugate or negative: pass .resolve_conj() or .resolve_neg()")
    if not tensor.is_contiguous():
        raise _refusal(tensor, _NOT_CONTIGUOUS)
    if tensor.device.type != "cpu":
        return device_transfer(torch, tensor)
    nbytes = tensor.numel() * tensor.element_size()
    try:
        storage = tensor.untyped_storage()
        address = tensor.data_ptr() if storage.device.type == "cpu" else 0  # a fake tensor's is on "meta"
    except (RuntimeError, NotImplementedError) as error:
        raise _refusal(tensor, f"it has no memory of its own ({str(error).splitlines()[0]})") from error
    start = tensor.storage_offset() * tensor.element_size()
    if nbytes and (not address or start + nbytes > storage.nbytes()):
        raise _refusal(tensor, "its storage was released, or never had memory")
    # The storage is kept, not the tensor, whose storage may be exchanged (`tensor.data = ...`) during a transfer.
    return _core.View(address if nbytes else 0, nbytes, storage, False)


def device_transfer(torch: Any, tensor: Any) -> Any:
    """Pinned host memory that holds a CUDA tensor's bytes now; `finish()` copies it to the tensor."""
    if tensor.device.type != "cuda":
        raise _refusal(tensor, f"it is on {tensor.device}")
    with torch.no_grad():
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        device = tensor.detach()
        host.copy_(device)  # waits for the work that is queued on this stream

    def finish() -> None:
        with torch.no_grad():
            device.copy_(host)

    return _core.View(host.data_ptr(), host.numel() * host.element_size(), host, False, finish)


def _array(numpy: Any, array: Any, writable: bool) -> Any:
    """Through a view as bytes: ml_dtypes' and datetimes have no format in the buffer protocol."""
    if array.dtype.hasobject:
        raise _refusal(array, "it holds Python objects")
    if not array.flags.c_contiguous:
        raise _refusal(array, _NOT_CONTIGUOUS)
    if writable and not array.flags.writeable:
        raise _refusal(array, "it is read-only")
    plain = array.view(numpy.ndarray)  # a subclass may mean something else by the calls below
    return plain.reshape(-1).view("u1") if plain.nbytes else memoryview(bytearray())


# Immutable, whatever their DLPack capsules say: the compiler may have shared their memory.
_IMMUTABLE = ("jax", "jaxlib")


def _dlpack(obj: Any, writable: bool) -> Any:
    where: Callable[[], tuple[int, int]] | None = getattr(obj, "__dlpack_device__", None)
    if where is not None and int(where()[0]) not in (1, 3, 11):
        raise _refusal(obj, f"it is on DLPack device {tuple(map(int, where()))}, not on the host")
    try:
        capsule = obj.__dlpack__(max_version=(1, 0))
    except TypeError:  # from before there were versions
        try:
            capsule = obj.__dlpack__()
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            raise _refusal(obj, f"__dlpack__: {error}") from error
    except (ValueError, RuntimeError, BufferError) as error:
        raise _refusal(obj, f"__dlpack__: {error}") from error
    found = _core.from_dlpack(capsule, True)
    immutable = type(obj).__module__.partition(".")[0] in _IMMUTABLE
    if writable and (immutable or memoryview(found).readonly):
        raise _refusal(obj, "it is read-only, or its DLPack is from before arrays could say that they are writable")
    return found
