"""`--zs-arrays=numpy|torch|nothing`: the array library of this environment; elsewhere these tests mean nothing."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zs-arrays", choices=["numpy", "torch", "nothing"], required=True)


@pytest.fixture
def arrays(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--zs-arrays"))
