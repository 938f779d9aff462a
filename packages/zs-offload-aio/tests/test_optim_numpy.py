"""numpy arrays as arguments of `optim`."""

from __future__ import annotations

import numpy as np
import pytest
from zs_offload_aio import optim

NEEDS = {"numpy"}


def test_arrays_of_numpy() -> None:
    param, out = np.ones((3, 4), np.float32), np.zeros(12, np.float16)
    optim.sgd(param, np.ones(12, np.float16), step=1, lr=0.5, out=out)
    assert (param == 0.5).all()
    assert (out == 0.5).all()
    assert optim.sum_of_squares(param) == (3.0, True)


def test_arrays_that_do_not_fit_are_refused() -> None:
    good, frozen = np.ones(4, np.float32), np.ones(4, np.float32)
    frozen.flags.writeable = False
    for param, error, match in [
        (frozen, ValueError, "param must be contiguous and writable"),
        (np.ones(8, np.float32)[::2], ValueError, "param must be contiguous"),
        (np.ones((2, 2), np.float32).T, ValueError, "param must be contiguous"),
        (np.ones(4, np.float64), TypeError, "param has elements of format 'd'"),
        (np.ones(4, ">f4"), TypeError, "param has elements of format '>f'"),
    ]:
        with pytest.raises(error, match=match):
            optim.sgd(param, good, step=1, lr=0.5)
