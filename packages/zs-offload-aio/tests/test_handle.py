"""DeepSpeed's handle: its names and return values, and the truth where the original kept silent."""

from __future__ import annotations

import inspect
import os
import resource
import threading

import pytest
import torch
from zs_offload_aio import AioError, ShortRead, aio_handle
from zs_offload_aio.handle import aio_read, aio_write, deepspeed_memcpy, gds_handle

NEEDS = {"torch"}

METHODS = {
    "get_block_size": [],
    "get_queue_depth": [],
    "get_single_submit": [],
    "get_overlap_events": [],
    "get_intra_op_parallelism": [],
    "get_alignment": [],
    "read": ["buffer", "filename", "validate", "file_offset"],
    "write": ["buffer", "filename", "validate", "file_offset"],
    "sync_pread": ["buffer", "filename", "file_offset"],
    "sync_pwrite": ["buffer", "filename", "file_offset"],
    "async_pread": ["buffer", "filename", "file_offset"],
    "async_pwrite": ["buffer", "filename", "file_offset"],
    "free_cpu_locked_tensor": ["tensor"],
    "is_pinned": ["buffer"],
    "wait": [],
}


@pytest.fixture
def handle(backend, monkeypatch):
    monkeypatch.setenv("ZS_AIO_BACKEND", backend)
    return aio_handle(block_size=4096, queue_depth=2)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "swap.tensor.swp")


def numbers(numel, dtype=torch.float32):
    return torch.arange(numel, dtype=torch.int64).to(dtype)


def test_every_method_is_there():
    for name, parameters in METHODS.items():
        found = [p for p in inspect.signature(getattr(aio_handle, name)).parameters if p != "self"]
        assert found[: len(parameters)] == parameters, name
    for name in ("pread", "pwrite"):
        found = list(inspect.signature(getattr(aio_handle, name)).parameters.values())[1:6]
        assert [p.name for p in found] == ["buffer", "filename", "validate", "asynchronous", "file_offset"]
    defaults = [p.default for p in inspect.signature(aio_handle).parameters.values()]
    assert defaults == [1 << 20, 128, False, False, 1]


def test_what_was_asked_for_is_told():
    handle = aio_handle(1000, 3, True, True, 2)
    assert (handle.get_block_size(), handle.get_queue_depth(), handle.get_intra_op_parallelism()) == (1000, 3, 2)
    assert handle.get_single_submit() is True and handle.get_overlap_events() is True
    assert handle.get_alignment() == 1024
    for wrong in ({"block_size": 0}, {"queue_depth": -1}, {"intra_op_parallelism": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            aio_handle(**wrong)


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 4096, 1024 * 1024 + 1000])
@pytest.mark.parametrize("pinned", [True, False])
def test_round_trip_with_an_unaligned_tail(handle, path, nbytes, pinned):
    if pinned:
        source, target = (handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)) for _ in range(2))
        target.zero_()
        source.copy_(torch.arange(nbytes, dtype=torch.int64).to(torch.uint8))
    else:
        source, target = numbers(nbytes, torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    assert handle.sync_pwrite(source, path) == 1
    assert os.path.getsize(path) == nbytes
    assert handle.sync_pread(target, path) == 1
    assert torch.equal(source, target)
    target.zero_()
    assert handle.write(source, path, True) == 0 and handle.read(target, path, True) == 0
    assert torch.equal(source, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.complex64])
def test_any_dtype(path, dtype):
    handle = aio_handle(intra_op_parallelism=3)  # 3 divides none of the sizes
    source = numbers(1001, dtype)
    target = handle.new_cpu_locked_tensor(1001, source)
    assert target.dtype == dtype and target.shape == (1001,)
    handle.sync_pwrite(source, path)
    handle.sync_pread(target, path)
    assert torch.equal(source, target)


def test_asynchronous_and_how_many_completed(handle, path):
    assert handle.wait() == 0
    sources = [torch.full((5000,), float(i)) for i in range(5)]
    for i, source in enumerate(sources):
        assert handle.async_pwrite(source, f"{path}{i}") == 0
    assert handle.wait() == 5 and handle.wait() == 0
    targets = [torch.zeros(5000) for _ in range(5)]
    for i, target in enumerate(targets):
        assert handle.pread(target, f"{path}{i}", i % 2 == 0, **{"async": True}) == 0
    assert handle.pread(torch.zeros(1), f"{path}0", False, False) == 6  # waits for all, as the original does
    assert all(torch.equal(a, b) for a, b in zip(sources, targets, strict=True))
    assert handle.wait() == 0
    with pytest.raises(TypeError, match="unexpected keyword"):
        handle.pread(targets[0], f"{path}0", False, asinc=True)


def test_offsets(handle, path):
    whole = numbers(10_000, torch.int32)
    handle.sync_pwrite(whole, path)
    part = torch.zeros(100, dtype=torch.int32)
    handle.sync_pread(part, path, 4 * 777)
    assert torch.equal(part, whole[777:877])
    handle.sync_pwrite(torch.full((3,), -1, dtype=torch.int32), path, file_offset=4 * 10_000)
    assert os.path.getsize(path) == 4 * 10_003
    back = torch.zeros(10_003, dtype=torch.int32)
    handle.read(back, path, True)
    assert torch.equal(back[:10_000], whole) and back[10_000:].tolist() == [-1] * 3


def test_an_open_file_by_its_descriptor(handle, path):
    with open(path, "w+b") as file:
        assert handle.async_pwrite(numbers(1000, torch.uint8), file.fileno(), 5) == 0
        assert handle.wait() == 1
        assert file.read() == bytes(5) + numbers(1000, torch.uint8).numpy().tobytes() if _NUMPY else True
        number = file.fileno()
    with pytest.raises(OSError):
        handle.async_pwrite(torch.zeros(1), number)


try:
    torch.zeros(1).numpy()
    _NUMPY = True
except RuntimeError:
    _NUMPY = False


def test_failures_are_raised_and_the_handle_goes_on(handle, path, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        handle.sync_pread(torch.zeros(4), path)
    assert caught.value.filename == path
    with pytest.raises(IsADirectoryError):
        handle.async_pwrite(torch.zeros(4), str(tmp_path))
    handle.sync_pwrite(torch.zeros(1000), path)
    handle.async_pread(torch.zeros(1000), path)
    handle.async_pread(torch.zeros(1001), path)  # 4 bytes beyond the end
    handle.async_pread(torch.zeros(10), path)
    with pytest.raises(ShortRead) as caught:
        handle.wait()
    assert caught.value.filename == path and caught.value.nbytes == 4004
    assert caught.value.__notes__ == ["2 of 3 operations completed"]
    assert handle.wait() == 0
    assert handle.sync_pread(torch.zeros(1000), path) == 1


def test_a_full_disk_is_raised(handle, path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(AioError, match="File too large"):
            handle.sync_pwrite(torch.zeros(1 << 20), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_memory_that_is_not_in_one_run(handle, path):
    square = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64)
    handle.sync_pwrite(square.t(), path)  # written as the tensor reads
    target = torch.zeros(64, 64)
    handle.sync_pread(target, path)
    assert torch.equal(target, square.t())
    pinned = handle.new_cpu_locked_tensor(64 * 64, square).view(64, 64)
    pinned.zero_()
    for wrong in (pinned.t(), target.t(), target[:, ::2], torch.zeros(1).expand(5)):
        with pytest.raises(TypeError):
            handle.sync_pread(wrong, path)
    assert not pinned.any()
    assert handle.wait() == 0


def test_validate_finds_what_the_file_does_not_have(handle, path, monkeypatch):
    handle.sync_pwrite(torch.ones(2000), path)

    class Ticket:
        def wait(self, timeout_s):
            return 8000

    monkeypatch.setattr(handle._engine, "read", lambda *args: Ticket())
    with pytest.raises(AioError, match="validation failed") as caught:
        handle.pread(torch.zeros(2000), path, True)
    assert caught.value.filename == path


def test_locked_memory(handle):
    tensor = handle.new_cpu_locked_tensor(10_000, torch.empty(0, dtype=torch.float16))
    assert tensor.data_ptr() % 4096 == 0
    assert handle.is_pinned(tensor) and handle.is_pinned(tensor[5000:]) and not handle.is_pinned(torch.zeros(10))
    assert handle.free_cpu_locked_tensor(tensor) is True
    assert handle.free_cpu_locked_tensor(tensor) is False and not handle.is_pinned(tensor)
    tensor.fill_(3)  # the memory stays for as long as the tensor does
    assert handle._pool.stats()["in_use_blocks"] == 1
    del tensor
    assert handle._pool.stats()["in_use_blocks"] == 0
    assert handle.new_cpu_locked_tensor(0, torch.zeros(1)).numel() == 0
    with pytest.raises(ValueError):
        handle.new_cpu_locked_tensor(-1, torch.zeros(1))
    with pytest.raises(TypeError):
        handle.new_cpu_locked_tensor(1, b"no tensor")


def test_wait_from_two_threads_counts_each_once(handle, path):
    handle.sync_pwrite(torch.zeros(50_000), path)
    counts: list[int] = []
    for _ in range(20):
        handle.async_pread(torch.zeros(50_000), path)
    threads = [threading.Thread(target=lambda: counts.append(handle.wait())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(counts) == 20


def test_module_functions(path):
    source, target = numbers(999, torch.int16), torch.zeros(999, dtype=torch.int16)
    assert aio_write(source, path, 1 << 20, 8, False, True, True) == 0
    assert aio_read(target, path, 1 << 20, 8, False, True, True) == 0
    assert torch.equal(source, target)
    target.zero_()
    assert deepspeed_memcpy(target, source) == 0
    assert torch.equal(source, target)
    with pytest.raises(ValueError, match="cannot copy"):
        deepspeed_memcpy(target[:1], source)
    with pytest.raises(NotImplementedError, match="aio_handle"):
        gds_handle(1 << 20, 8)
