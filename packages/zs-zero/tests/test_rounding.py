"""fp32 to bf16 by chance or in two parts: what comes out, checked against arithmetic that shares nothing with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zs_zero.rounding import join, split, stochastically

STEP = 2.0**-7  # between bf16 numbers from 1 to 2


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def all_of_a_binade() -> Tensor:
    """Every fp32 number from 1 to 2, and from -2 to -1."""
    up = (torch.arange(1 << 23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    return torch.cat([up, -up])


# -- two parts ---------------------------------------------------------------------------------------------------------


def test_two_parts_are_nearest_and_lose_nothing() -> None:
    for values in all_of_a_binade().split(1 << 20):
        weight, rest = split(values)
        assert torch.equal(join(weight, rest), values)
        tied = (bits(values) & 0xFFFF) == 0x8000
        assert torch.equal(weight[~tied], values[~tied].bfloat16())
        assert (weight[tied].float().abs() > values[tied].abs()).all() and (rest[tied] == -(1 << 15)).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-38, 3.4e38, float("inf"), -float("inf")])
def test_two_parts_at_the_ends(value: float) -> None:
    values = torch.tensor([value, 1.0])
    weight, rest = split(values)
    assert torch.equal(bits(weight), bits(values.bfloat16())) and torch.equal(bits(join(weight, rest)), bits(values))


@pytest.mark.parametrize("digits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -(1 << 22)])
def test_what_is_no_number_stays_none(digits: int) -> None:
    weight, rest = split(torch.tensor([digits], dtype=torch.int32).view(torch.float32))
    assert weight.isnan().all() and join(weight, rest).isnan().all()


# -- by chance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("part", [2.0**-16, 0.1, 0.5, 0.9])
def test_the_mean_is_right(part: float, sign: float) -> None:
    n = 1 << 18
    rounded = stochastically(torch.full((n,), sign * (1.0 + part * STEP)), key="a mean").double()
    assert set((rounded * sign).tolist()) <= {1.0, 1.0 + STEP}, "one of the two neighbours"
    up = ((rounded * sign - 1.0) / STEP).mean().item()
    assert abs(up - part) < 5 * (part * (1 - part) / n) ** 0.5


def test_what_bf16_holds_stays() -> None:
    held = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = stochastically(held.float(), key="all of bf16")
    numbers = ~held.isnan()
    assert torch.equal(bits(rounded)[numbers], bits(held)[numbers])
    assert rounded[~numbers].isnan().all()
    ones = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN, whatever its digits
    assert stochastically(ones, key="nan").isnan().all()


@given(st.integers(0, 600_000), st.integers(0, 300_000))
def test_it_does_not_depend_on_the_cut(start: int, length: int) -> None:
    n = 600_000
    values = torch.linspace(-2.0, 2.0, n)
    stop = min(n, start + length)
    part = stochastically(values[start:stop], key="cut", start=start)
    assert torch.equal(part, stochastically(values, key="cut")[start:stop])


def test_keys_and_neighbours_are_independent() -> None:
    values = torch.full((1 << 18,), 1.0 + 0.5 * STEP)
    first, other = (((stochastically(values, key=key).double() - 1) / STEP - 0.5).numpy() for key in ("1/w", "2/w"))
    assert abs((first * other).mean()) < 5 * 0.25 / values.numel() ** 0.5
    for lag in (1, 2, 16, 256, 4096):
        assert abs((first[lag:] * first[:-lag]).mean()) < 5 * 0.25 / values.numel() ** 0.5
    runs = first[: 1 << 17].reshape(-1, 8).sum(1) + 4  # ups among 8 in a row: binomial
    counts = np.bincount(runs.astype(int), minlength=9)
    expected = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 256 * len(runs)
    assert ((counts - expected) ** 2 / expected).sum() < 36  # chi square, 8 degrees of freedom: 2e-5
