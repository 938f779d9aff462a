"""A rank's data file: safetensors can read it, and every extent has its checksum."""

import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load
from zs_ckpt import TensorSpec
from zs_ckpt.boxes import numel, whole
from zs_ckpt.dtypes import dtype_name, dtype_of, safetensors_name
from zs_ckpt.files import FileWriter
from zs_ckpt.shardfile import Part, checksums, entry_name, extent_nbytes, extent_seed, lay_out
from zs_ckpt.staging import _stream, write_parts
from zs_comm import ConfigError
from zs_comm.views import bytes_of

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128,
]  # fmt: skip


def random(dtype, shape):
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def part(name, tensor, box=None, rank=None, shape=None):
    shape = tuple(tensor.shape) if shape is None else shape
    return Part(TensorSpec(name, shape, tensor.dtype), whole(shape) if box is None else box, tensor, rank)


def file_of(parts):
    layout = lay_out(parts, {"format": "pt"})
    return layout.header + b"".join(bytes(bytes_of(one.data)) for one in layout.parts), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(dtype):
    assert dtype_of(dtype_name(dtype)) is dtype
    for shape in ((), (0, 3), (7,), (3, 5)):
        tensor = random(dtype, shape)
        raw, _ = file_of([part("a", torch.ones(3, dtype=torch.uint8)), part("x", tensor), part("z", tensor)])
        found = load(raw)["x"]
        if safetensors_name(dtype) is None:  # stored as bytes
            found = found.view(dtype).reshape(shape) if tensor.numel() else tensor
        assert found.dtype == dtype and found.shape == tensor.shape
        assert bytes(bytes_of(found.contiguous())) == bytes(bytes_of(tensor))


def test_entries_are_aligned_and_named_by_box(tmp_path):
    x = torch.arange(12, dtype=torch.int16)
    parts = [
        part("b", torch.ones(3, dtype=torch.bool)),
        part("x", x, ((1, 3), (0, 6)), shape=(4, 6)),
        part("x", torch.ones(2, dtype=torch.float64), rank=3),
        part("w", torch.ones(5)),
    ]
    raw, layout = file_of(parts)
    (tmp_path / "f.safetensors").write_bytes(raw)
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert set(file.keys()) == {"b", "x@1:3,0:6", "rank3/x", "w"}
        assert torch.equal(file.get_tensor("x@1:3,0:6"), x.reshape(2, 6))
    assert len(layout.header) % 64 == 0 and layout.nbytes == len(raw)
    for one, offset in zip(layout.parts, layout.offsets, strict=True):
        assert offset % one.spec.dtype.itemsize == 0
    assert layout.file.header_crc == zlib.crc32(raw[: len(layout.header)])


def test_what_cannot_be_laid_out():
    x = torch.ones(4)
    with pytest.raises(ConfigError, match="twice"):
        lay_out([part("x", x), part("x", x)], {})
    with pytest.raises(ConfigError, match="elements"):
        lay_out([Part(TensorSpec("x", (5,), torch.float32), ((0, 5),), x)], {})
    with pytest.raises(ConfigError, match="elements"):
        lay_out([Part(TensorSpec("x", (4,), torch.float64), ((0, 4),), x)], {})


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 524288, 524289, 1 << 22, (1 << 29) + 1, 1 << 33])
def test_extents(nbytes):
    step = extent_nbytes(nbytes)
    assert step % 4096 == 0 and 4096 <= step <= 4 << 20
    assert nbytes // step <= max(128, nbytes >> 22)


def test_checksums_are_bound_to_name_and_place():
    raw = memoryview(bytearray(10000))
    first, second, third = (checksums(entry, raw) for entry in ("x", "y", "x@0:1"))
    assert len({first, second, third}) == 3 and len(first) == 3 * 8
    assert first[:8] != first[8:16]  # the same bytes, at another place
    assert int(first[:8], 16) == zlib.crc32(raw[:4096], zlib.crc32(b"x:0"))
    assert extent_seed("x", 0) == zlib.crc32(b"x:0")
    assert entry_name(TensorSpec("x", (4, 6), torch.int8), ((0, 1), (0, 6))) == "x@0:1,0:6"
    assert entry_name(TensorSpec("x", (), torch.int8), (), 2) == "rank2/x"


def test_a_stream_through_buffers_gives_the_same_file(tmp_path, monkeypatch):
    """What parts on a device take: here of tensors in host memory, with buffers that are smaller than they."""
    parts = [part(f"x{n}", torch.randn(n, 1000)) for n in (0, 1, 7, 300)] + [part("b", torch.ones(9, dtype=torch.int8))]
    layout = lay_out(parts, {})
    one = write_parts(str(tmp_path / "one"), layout, FileWriter())
    monkeypatch.setattr("zs_ckpt.staging._BUFFER_NBYTES", 1 << 16)
    crcs = {}
    streamed = b"".join(bytes(view) for view in _stream(layout, crcs, lambda nbytes: None))
    assert streamed == (tmp_path / "one").read_bytes()
    assert [crcs[index] for index in range(len(parts))] == one
    assert [len(word) for word in one] == [8 * -(-p.nbytes // extent_nbytes(p.nbytes)) for p in layout.parts]
    assert numel(parts[3].box) == 300_000 and json.loads(layout.header[8:])["x7"]["shape"] == [7, 1000]
