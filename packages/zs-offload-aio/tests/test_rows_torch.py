"""Rows 14 and 16-18 with torch's tensors: strides, broadcasts, views of larger storages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zs_offload_aio import Engine

NEEDS = {"torch"}


@pytest.mark.row(16)
def test_strides(engine: Engine, tmp_path: Path) -> None:
    """A TypeError; nothing is written and nothing is read."""
    grid = torch.arange(64).reshape(8, 8)
    views = [grid.T, grid[:, ::2], grid[:, 1:3], torch.tensor(7).expand(8, 8), grid.as_strided((4, 4), (1, 1))]
    with engine.open(tmp_path / "file", "x") as file:
        for view in views:
            for transfer in (file.read, file.write):
                with pytest.raises(TypeError):
                    transfer(view)
        assert file.size == 0
        assert torch.equal(grid, torch.arange(64).reshape(8, 8))


@pytest.mark.row(14)
def test_tensors_of_no_or_one_element(engine: Engine, tmp_path: Path) -> None:
    with engine.open(tmp_path / "file", "x") as file:
        for empty in (torch.empty(0), torch.empty(3, 0, 2, dtype=torch.bfloat16)):
            assert file.write(empty).wait() == file.read(empty).wait() == 0
        scalar, back = torch.tensor(3, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)
        assert file.write(scalar).wait() == file.read(back).wait() == 1
        assert back == 3 and file.size == 1


@pytest.mark.row(16)
@pytest.mark.row(18)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.bool, torch.complex64])
def test_view_of_a_larger_storage(engine: Engine, tmp_path: Path, dtype: torch.dtype) -> None:
    """The whole storage is what some engines move; here it is the view's bytes."""
    source = torch.arange(1000).remainder(7).to(dtype)
    whole = torch.ones(5000, dtype=dtype)
    with engine.open(tmp_path / "file", "x") as file:
        assert file.write(source[100:400]).wait() == 300 * source.element_size()
        assert file.read(whole[1001:1301]).wait() == file.size
    assert torch.equal(whole[1001:1301], source[100:400])
    assert torch.equal(whole[:1001], torch.ones(1001, dtype=dtype))
    assert torch.equal(whole[1301:], torch.ones(3699, dtype=dtype))


@pytest.mark.row(17)
def test_read_into_what_torch_protects(engine: Engine, tmp_path: Path) -> None:
    """Conjugate and negative views share memory with other values: no bytes of theirs can be moved."""
    values = torch.zeros(8, dtype=torch.complex64)
    with engine.open(tmp_path / "file", "x") as file:
        file.write(bytes([9]) * 64).wait()
        for view in (values.conj(), values.imag, torch.empty(8, device="meta"), torch.zeros(8).to_sparse()):
            with pytest.raises(TypeError):
                file.read(view)
    assert not values.real.any()
