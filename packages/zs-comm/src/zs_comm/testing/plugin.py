"""The pytest plugin: the fixture `ranks`, which is `run_ranks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def ranks() -> Callable[..., Any]:
    """`zs_comm.testing.run_ranks`, imported on first use: collecting tests needs no torch."""
    from zs_comm.testing.ranks import run_ranks

    return run_ranks
