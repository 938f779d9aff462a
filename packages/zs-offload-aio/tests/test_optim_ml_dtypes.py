"""Arrays of bfloat16, which numpy has from ml_dtypes and does not show by the buffer protocol."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from zs_offload_aio import optim

NEEDS = {"numpy", "ml_dtypes"}


def test_arrays_of_ml_dtypes() -> None:
    param, grad = np.ones(5, np.float32), np.ones(5, ml_dtypes.bfloat16)
    out = np.zeros(5, ml_dtypes.bfloat16)
    optim.sgd(param, grad, step=1, lr=0.5, out=out)
    assert (out.astype(np.float32) == 0.5).all()
    with pytest.raises(ValueError, match="grad must be contiguous"):
        optim.sgd(param, np.ones(10, ml_dtypes.bfloat16)[::2], step=1, lr=0.5)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be contiguous and writable"):
        optim.sgd(param, grad, step=1, lr=0.5, out=out)
