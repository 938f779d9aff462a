"""`--zs-update` rewrites what these tests compare with."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zs-update", action="store_true", help="rewrite tests/repo/public_api.txt")


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--zs-update"))
