"""The marker `gpu`: deselected where there is no CUDA device."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=wanted)
        items[:] = [item for item in items if item not in set(wanted)]
