"""Rows 16-18 with numpy's arrays: strides, broadcasts, frozen arrays, slices of larger ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from zs_offload_aio import Engine

NEEDS = {"numpy"}


@pytest.mark.row(16)
def test_strides(engine: Engine, tmp_path: Path) -> None:
    """Transposed, strided, reversed, broadcast: a TypeError; nothing is written and nothing is read."""
    grid = np.arange(64, dtype=np.int32).reshape(8, 8)
    views = [grid.T, grid[:, ::2], grid[::-1], grid[:, 1:3], np.broadcast_to(np.int32(7), (8, 8))]
    with engine.open(tmp_path / "file", "x") as file:
        for view in views:
            for transfer in (file.read, file.write):
                with pytest.raises(TypeError):
                    transfer(view)
        assert file.size == 0
        assert np.array_equal(grid, np.arange(64, dtype=np.int32).reshape(8, 8))
        for view in (grid, grid[2:4], grid[:1], np.float64(1.5).reshape(1), np.zeros((0, 3)), grid[3:3, ::2]):
            assert file.write(view).wait() == view.nbytes


@pytest.mark.row(16)
@pytest.mark.parametrize(
    "dtype", ["?", "i1", "u2", "f2", ">f4", "f8", "c16", "M8[s]", "S5", [("a", "i4"), ("b", "f8")]]
)
def test_any_dtype(engine: Engine, tmp_path: Path, dtype: object) -> None:
    source = np.frombuffer(bytes(range(240)), dtype=np.uint8).copy()
    source = (source % 2 if dtype == "?" else source).view(dtype)
    back = np.zeros_like(source)
    with engine.open(tmp_path / "file", "x") as file:
        assert file.write(source).wait() == file.read(back).wait() == 240
    assert back.tobytes() == source.tobytes()


@pytest.mark.row(17)
def test_frozen_array(engine: Engine, tmp_path: Path) -> None:
    frozen = np.zeros(100, dtype=np.uint8)
    frozen.flags.writeable = False
    with engine.open(tmp_path / "file", "x") as file:
        assert file.write(frozen).wait() == 100
        with pytest.raises(TypeError):
            file.read(frozen)
    assert not frozen.any()


@pytest.mark.row(18)
def test_slice_of_a_larger_array(engine: Engine, tmp_path: Path) -> None:
    whole = np.full(10_000, 7, dtype=np.float32)
    with engine.open(tmp_path / "file", "x") as file:
        file.write(np.arange(3000, dtype=np.float32)).wait()
        assert file.read(whole[5001:8001]).wait() == 12_000
    assert (whole[:5001] == 7).all() and (whole[8001:] == 7).all()
    assert (whole[5001:8001] == np.arange(3000)).all()


@pytest.mark.row(16)
def test_arrays_of_objects_are_refused(engine: Engine, tmp_path: Path) -> None:
    """Their memory holds pointers: bytes of a file there would crash the interpreter."""
    objects = np.array([[], {}, "text"], dtype=object)
    fields = np.zeros(3, dtype=[("number", "i4"), ("thing", "O")])
    with engine.open(tmp_path / "file", "w") as file:
        file.write(bytes(4096)).wait()
        for array in (objects, fields):
            with pytest.raises(TypeError, match="Python objects"):
                file.read(array)
            with pytest.raises(TypeError, match="Python objects"):
                file.write(array)
    assert objects.tolist() == [[], {}, "text"]
