"""Torch tensors as arguments of `optim`: what is taken and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zs_offload_aio import optim

NEEDS = {"torch"}


def step(param: torch.Tensor, grad: torch.Tensor | None = None, out: torch.Tensor | None = None) -> None:
    optim.sgd(param, torch.ones_like(param) if grad is None else grad, step=1, lr=0.5, out=out)


def test_tensors_of_any_shape_and_their_version() -> None:
    param = torch.ones(3, 4, requires_grad=True)
    out = torch.zeros(12, dtype=torch.float16)
    square = (param * param).sum()
    step(param, torch.ones(12, dtype=torch.bfloat16), out=out)
    assert bool((param == 0.5).all()) and bool((out == 0.5).all())
    assert out._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_inference_tensors_have_no_version_and_work() -> None:
    with torch.inference_mode():
        param = torch.ones(3)
    step(param)
    assert bool((param == 0.5).all())


def test_a_slice_of_a_tensor() -> None:
    memory = torch.ones(100)
    step(memory[7:50])
    assert bool((memory[7:50] == 0.5).all()) and memory.sum() == 57 + 43 * 0.5


def test_what_has_no_elements_here_is_refused() -> None:
    with FakeTensorMode():
        fake = torch.ones(3)
    released = torch.ones(3)
    released.untyped_storage().resize_(0)
    cases: list[tuple[torch.Tensor, type[Exception], str]] = [
        (torch.ones(3, device="meta"), TypeError, "param is on meta"),
        (torch.ones(3).double(), TypeError, "param is float64"),
        (torch.ones(3).half(), TypeError, "param is float16: float32 or bfloat16"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "param is complex64"),
        (torch.ones(3, 3)[:, 0], ValueError, "param must be contiguous"),
        (torch.ones(3)._neg_view(), TypeError, "param is a lazy negative"),
        (released, ValueError, "memory of this tensor was released"),
        (fake, TypeError, "param"),
    ]
    for tensor, error, match in cases:
        with pytest.raises(error, match=match):
            step(tensor, torch.ones(3))
    with pytest.raises(TypeError, match="grad has the layout torch.sparse_coo"):
        step(torch.ones(3), torch.ones(3).to_sparse())
