"""`NvmeStore` keeps zs-zero's Protocol, on every backend; the package itself knows nothing of zs-zero."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
from zs_offload_aio import NvmeStore
from zs_zero.testing import check_block_store

NEEDS = {"torch", "zs_zero"}


@pytest.mark.parametrize("direct", [True, False])
def test_conformance(engine, direct, tmp_path):
    check_block_store(lambda: NvmeStore(tmp_path, engine=engine, direct=direct))
    assert engine.stats()["in_flight"] == 0
    assert list(tmp_path.iterdir()) == []


def test_entry_point():
    (found,) = entry_points(group="zs_zero.block_stores", name="aio")
    assert found.load() is NvmeStore
