"""DeepSpeed's `aio_handle` over an `Engine`: the names, the arguments and the return values of the original.

What differs is what the original got wrong. There, errors, short files and unaligned tails went unnoticed or ended the
process; here each operation's outcome is looked at, and `wait` raises `AioError`. Any number of bytes, any offset and
any number of threads go together. `wait` with nothing pending returns 0.
"""

from __future__ import annotations

import errno
import operator
import os
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from time import monotonic
from typing import Any

from ._core import Ticket
from .adapters import as_buffer
from .buffers import Pool
from .engine import Engine
from .errors import AioError

_MOST_DEPTH = 256
_COMPARED_NBYTES = 1 << 24  # at a time


@dataclass(frozen=True)
class _Operation:
    ticket: Ticket
    buffer: Any
    path: str
    offset: int
    validate: bool


class aio_handle:  # noqa: N801 - DeepSpeed's name
    """Reads and writes whole buffers (torch tensors, or any buffer) from and to files, waited for together.

    `block_size`: bytes of one transfer, rounded up to 4096. `queue_depth`: transfers in flight for each of
    `intra_op_parallelism`; together at most 256. `single_submit` and `overlap_events` are remembered and change
    nothing: transfers are always submitted together and always overlap. Raises `ValueError` for a number below 1.
    """

    def __init__(
        self,
        block_size: int = 1024 * 1024,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        self._block_size = _positive("block_size", block_size)
        self._queue_depth = _positive("queue_depth", queue_depth)
        self._parallelism = _positive("intra_op_parallelism", intra_op_parallelism)
        self._single_submit = bool(single_submit)
        self._overlap_events = bool(overlap_events)
        self._engine = Engine(
            chunk_nbytes=-(-self._block_size // 4096) * 4096,
            depth=min(_MOST_DEPTH, self._queue_depth * self._parallelism),
        )
        self._pool = Pool(lock=True)
        self._locked: weakref.WeakValueDictionary[int, memoryview] = weakref.WeakValueDictionary()  # by address
        self._pending: deque[_Operation] = deque()
        self._waiting = threading.Lock()
        self._completed = 0  # since the last `wait` that returned
        self._failures: list[Exception] = []

    def get_block_size(self) -> int:
        """As it was asked for, in bytes."""
        return self._block_size

    def get_queue_depth(self) -> int:
        """As it was asked for."""
        return self._queue_depth

    def get_single_submit(self) -> bool:
        """As it was asked for."""
        return self._single_submit

    def get_overlap_events(self) -> bool:
        """As it was asked for."""
        return self._overlap_events

    def get_intra_op_parallelism(self) -> int:
        """As it was asked for."""
        return self._parallelism

    def get_alignment(self) -> int:
        """The bytes that the original needs a transfer to be a multiple of. Nothing here depends on it."""
        return 512 * self._parallelism

    # -- synchronous ----------------------------------------------------------------------------------------------

    def read(self, buffer: Any, filename: str | os.PathLike[str], validate: bool, file_offset: int = 0) -> int:
        """Fill `buffer` from `file_offset` (bytes) on; 0. `validate`: compare with an ordinary read of the file.

        Raises `ShortRead` where the file ends before the buffer does, `AioError` for every other failure, `TypeError`
        where `buffer` is read-only or not contiguous. What was issued before is not waited for.
        """
        self._finish(self._start_read(buffer, filename, validate, file_offset))
        return 0

    def write(self, buffer: Any, filename: str | os.PathLike[str], validate: bool, file_offset: int = 0) -> int:
        """Write all of `buffer` at `file_offset` (bytes); 0. The file is created where it is missing, never cut."""
        self._finish(self._start_write(buffer, filename, validate, file_offset))
        return 0

    def sync_pread(self, buffer: Any, filename: str | os.PathLike[str], file_offset: int = 0) -> int:
        """As `pread` without `validate`, waited for."""
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: Any, filename: str | os.PathLike[str], file_offset: int = 0) -> int:
        """As `pwrite` without `validate`, waited for."""
        return self.pwrite(buffer, filename, False, False, file_offset)

    # -- asynchronous ---------------------------------------------------------------------------------------------

    def pread(
        self,
        buffer: Any,
        filename: str | os.PathLike[str],
        validate: bool,
        asynchronous: bool = False,
        file_offset: int = 0,
        **keywords: bool,
    ) -> int:
        """Start filling `buffer`; 0. Unless `asynchronous` (or `**{"async": True}`) `wait`, and return what it returns.

        Raises as `read` does: at once where the file cannot be opened or `buffer` not be used, else in `wait`.
        """
        in_background = _async(asynchronous, keywords)
        self._pending.append(self._start_read(buffer, filename, validate, file_offset))
        return 0 if in_background else self.wait()

    def pwrite(
        self,
        buffer: Any,
        filename: str | os.PathLike[str],
        validate: bool,
        asynchronous: bool = False,
        file_offset: int = 0,
        **keywords: bool,
    ) -> int:
        """Start writing `buffer`; 0. Unless `asynchronous` (or `**{"async": True}`) `wait`, and return what it returns.

        `buffer` must not change before `wait` has returned.
        """
        in_background = _async(asynchronous, keywords)
        self._pending.append(self._start_write(buffer, filename, validate, file_offset))
        return 0 if in_background else self.wait()

    def async_pread(self, buffer: Any, filename: str | os.PathLike[str], file_offset: int = 0) -> int:
        """As `pread` without `validate`, not waited for: 0."""
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(self, buffer: Any, filename: str | os.PathLike[str] | int, file_offset: int = 0) -> int:
        """As `pwrite` without `validate`, not waited for: 0. `filename` may be the descriptor of an open file."""
        return self.pwrite(buffer, _path_of(filename), False, True, file_offset)

    def wait(self, timeout_s: float = 3600.0) -> int:
        """Wait for every operation that was started; the number that completed since the last `wait`.

        Raises the first failure, after all of them have ended, with a note that says how many completed; the handle
        is then as new. `TimeoutError` where one is not done after `timeout_s`: it goes on, and can be waited for again.
        """
        deadline = monotonic() + timeout_s
        with self._waiting:
            while self._pending:
                try:
                    self._finish(self._pending[0], max(0.0, deadline - monotonic()))
                    self._completed += 1
                except TimeoutError:  # it goes on
                    raise
                except Exception as error:  # of any kind: what comes after it is waited for as well
                    self._failures.append(error)
                self._pending.popleft()
            completed, failures = self._completed, self._failures
            self._completed, self._failures = 0, []
        if failures:
            failures[0].add_note(f"{completed} of {completed + len(failures)} operations completed")
            raise failures[0]
        return completed

    # -- memory ---------------------------------------------------------------------------------------------------

    def new_cpu_locked_tensor(self, num_elem: int, example: Any) -> Any:
        """A torch tensor of `num_elem` elements of the dtype of the tensor `example`, uninitialised, shape (num_elem,).

        Its memory is aligned, so that transfers need no copy, and locked in RAM as far as the limit allows.
        """
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(example, torch.Tensor):
            raise TypeError(f"example must be a torch tensor, not {type(example).__name__}")
        numel = operator.index(num_elem)
        if numel < 0:
            raise ValueError(f"num_elem must not be negative: {numel}")
        if numel == 0:
            return torch.empty(0, dtype=example.dtype)
        view = self._pool.buffer(numel * example.element_size())
        tensor = torch.frombuffer(view, dtype=torch.uint8)
        self._locked[tensor.data_ptr()] = view
        return tensor.view(example.dtype)

    def free_cpu_locked_tensor(self, tensor: Any) -> bool:
        """Forget a tensor of `new_cpu_locked_tensor`; False where it is none. Its memory goes when the tensor does."""
        return self._locked.pop(tensor.data_ptr(), None) is not None

    def is_pinned(self, buffer: Any) -> bool:
        """Whether transfers use the tensor's memory as it is: it came from `new_cpu_locked_tensor` of this handle (a
        slice of one counts), or is page-locked for CUDA."""
        start = buffer.data_ptr()
        end = start + buffer.numel() * buffer.element_size()
        if any(address <= start and end <= address + view.nbytes for address, view in list(self._locked.items())):
            return True
        return bool(buffer.is_pinned())

    # -- inside -----------------------------------------------------------------------------------------------------

    def _start_read(self, buffer: Any, filename: str | os.PathLike[str], validate: bool, offset: int) -> _Operation:
        path = os.fspath(filename)
        return _Operation(self._engine.read(path, buffer, offset), buffer, path, offset, bool(validate))

    def _start_write(self, buffer: Any, filename: str | os.PathLike[str], validate: bool, offset: int) -> _Operation:
        path = os.fspath(filename)
        if hasattr(buffer, "is_contiguous") and not buffer.is_contiguous():
            buffer = buffer.contiguous()
        return _Operation(self._engine.write(path, buffer, offset), buffer, path, offset, bool(validate))

    @staticmethod
    def _finish(operation: _Operation, timeout_s: float = 3600.0) -> None:
        operation.ticket.wait(timeout_s)
        if operation.validate:
            _compare(operation)


class gds_handle:  # noqa: N801 - DeepSpeed's name
    """GPUDirect Storage is not part of this package; making one raises `NotImplementedError`."""

    def __init__(self, *args: object, **keywords: object) -> None:
        raise NotImplementedError(
            "gds_handle: GPUDirect Storage is not supported; aio_handle moves CUDA tensors through pinned host memory"
        )


def aio_read(
    buffer: Any,
    filename: str | os.PathLike[str],
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """`aio_handle(...).read(buffer, filename, validate)`: 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).read(buffer, filename, validate)


def aio_write(
    buffer: Any,
    filename: str | os.PathLike[str],
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """`aio_handle(...).write(buffer, filename, validate)`: 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).write(buffer, filename, validate)


def deepspeed_memcpy(dest: Any, src: Any) -> int:
    """Copy the bytes of one contiguous buffer over another of the same size: 0. `ValueError` for another size."""
    target, source = _bytes(dest, writable=True), _bytes(src, writable=False)
    if target.nbytes != source.nbytes:
        raise ValueError(f"cannot copy {source.nbytes} bytes over {target.nbytes}")
    target[:] = source
    return 0


def _bytes(buffer: Any, *, writable: bool) -> memoryview:
    view = memoryview(as_buffer(buffer, writable=writable))
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def _compare(operation: _Operation) -> None:
    """Raise `AioError` unless an ordinary read finds the buffer's bytes in the file."""
    content = _bytes(operation.buffer, writable=False)
    with open(operation.path, "rb") as file:
        for start in range(0, content.nbytes, _COMPARED_NBYTES):
            part = content[start : start + _COMPARED_NBYTES]
            file.seek(operation.offset + start)
            if file.read(part.nbytes) != part:
                at = operation.offset + start
                text = f"validation failed: the {part.nbytes} bytes at offset {at} of the file are not the buffer's"
                raise AioError(errno.EIO, text, operation.path)


def _positive(name: str, value: int) -> int:
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1: {number}")
    return number


def _async(asynchronous: bool, keywords: dict[str, bool]) -> bool:
    """`async` is a reserved word: by name it only comes in a dictionary."""
    in_background = bool(keywords.pop("async", asynchronous))
    if keywords:
        raise TypeError(f"unexpected keyword arguments: {', '.join(keywords)}")
    return in_background


def _path_of(filename: str | os.PathLike[str] | int) -> str | os.PathLike[str]:
    """A path that opens the same file again, with the flags that direct I/O needs."""
    if not isinstance(filename, int):
        return filename
    os.fstat(filename)  # OSError where it is not open
    return f"/proc/self/fd/{filename}" if os.path.isdir("/proc/self/fd") else f"/dev/fd/{filename}"
