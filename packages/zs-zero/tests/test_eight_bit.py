"""Moments in 8 bits: the stated bounds, bytes that do not depend on cuts, and training that does not notice."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from zs_zero.tiers.eightbit import GROUP, decode, encode, encoded_nbytes

KINDS = ("signed", "unsigned")


def numbers(kind: str, numel: int, seed: int = 0, *, spread: float = 1.0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=source) * torch.exp(spread * torch.randn(numel, generator=source))
    return values if kind == "signed" else values * values


def block_max(values: Tensor) -> Tensor:
    """Of each element's block."""
    rows = torch.nn.functional.pad(values, (0, -values.numel() % GROUP)).view(-1, GROUP)
    return rows.abs().amax(1, keepdim=True).expand_as(rows).reshape(-1)[: values.numel()]


@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 1000, (1 << 16) + 3])
@pytest.mark.parametrize("kind", KINDS)
def test_size(kind: str, numel: int) -> None:
    values = numbers(kind, numel)
    data = encode(values, kind)
    assert data.dtype == torch.uint8 and data.shape == (encoded_nbytes(numel),)
    assert encoded_nbytes(numel) == numel + math.ceil(numel / 256)
    assert decode(data, numel, kind).shape == (numel,)


@pytest.mark.parametrize("seed", [None, 0, 12345])
@pytest.mark.parametrize("kind", KINDS)
def test_error_bounds(kind: str, seed: int | None) -> None:
    values = numbers(kind, 100_000)
    found = decode(encode(values, kind, seed=seed), values.numel(), kind)
    octaves = 15 if kind == "signed" else 31
    inside = values.abs() >= block_max(values) * 1.125 * 2.0**-octaves
    assert int(inside.sum()) > 99_000
    error = ((found - values).abs() / values.abs())[inside]
    assert float(error.max()) <= (1 / 16 if seed is None else 1 / 8)
    if seed is None:
        assert 0.02 < float(error.median()) < 0.035
    else:  # unbiased: the mean error is far below a code
        assert abs(float(((found - values) / values)[inside].mean())) < 2e-3
    assert bool((found.sign() == values.sign())[inside].all())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_below_the_last_octave(kind: str) -> None:
    values = torch.full((512,), 1e-30)
    values[0] = 1.0  # the scale of the first block; the second has a scale of its own
    found = decode(encode(values, kind), 512, kind)
    assert found[0] == 1.0
    assert torch.allclose(found[256:], values[256:], rtol=1 / 16)
    if kind == "signed":
        assert bool((found[1:256] == 0).all())
    else:
        assert bool((found[1:256] == found[1]).all()) and 0 < float(found[1]) < 2**-30


@pytest.mark.parametrize("seed", [None, 3])
def test_a_second_moment_that_is_not_zero_never_becomes_zero(seed: int | None) -> None:
    tiny = torch.tensor([1e-45, 1e-42, 1.4e-39, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 3e38])
    for largest in tiny.tolist():
        values = tiny[tiny <= largest].repeat(7)
        values = torch.cat([values, torch.zeros(11)])
        found = decode(encode(values, "unsigned", seed=seed), values.numel(), "unsigned")
        assert bool(((found > 0) == (values > 0)).all()), largest


def test_a_first_moment_at_the_ends_of_fp32() -> None:
    for value in (0.0, 1e-45, 1e-40, 2**-126, 2**-120, 3.4e38):
        values = torch.tensor([value, -value, 0.0])
        found = decode(encode(values, "signed"), 3, "signed")
        assert bool(torch.isfinite(found).all())
        if value >= 2**-126:
            assert torch.allclose(found, values, rtol=1 / 16, atol=0)
        assert found[0] == -found[1] and found[2] == 0


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_decoded_survives_another_encoding(kind: str, seed: int | None) -> None:
    values = numbers(kind, 70_001, spread=4.0)
    once = decode(encode(values, kind, seed=1), 70_001, kind)
    twice = decode(encode(once, kind, seed=seed), 70_001, kind)
    assert torch.equal(twice.view(torch.int32), once.view(torch.int32))


@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_cuts_at_whole_blocks_change_nothing(kind: str, seed: int | None) -> None:
    numel = (1 << 17) + 300
    values = numbers(kind, numel)
    whole = decode(encode(values, kind, seed=seed), numel, kind)
    borders = [0, 256, 1024, 1 << 16, (1 << 16) + 512, numel]
    parts = [decode(encode(values[a:b], kind, seed=seed), b - a, kind) for a, b in pairwise(borders)]
    assert torch.equal(torch.cat(parts), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(decode(encode(values, kind, seed=seed), numel, kind), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_these(kind: str) -> None:
    """The format lies in files that outlive a version of this package: it must not change unnoticed."""
    values = torch.tensor([0.0, 1.0, 1.125, 1.8, 0.5, 2.0**-14, 2.0**-20, -1.0 if kind == "signed" else 1.0])
    codes = {
        "signed": [0, 120, 121, 126, 112, 8, 0, 0xF8, 127],
        "unsigned": [0, 248, 249, 254, 240, 136, 88, 248, 127],
    }
    assert encode(values, kind).tolist() == codes[kind]
    assert encode(torch.tensor([1.97]), kind).tolist() == [codes[kind][1], 128], "rounded to 2: the scale is 2"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_makes_its_block_nan(kind: str, value: float) -> None:
    values = numbers(kind, 1000)
    clean = decode(encode(values, kind), 1000, kind)
    values[300] = value
    for seed in (None, 1):
        found = decode(encode(values, kind, seed=seed), 1000, kind)
        assert bool(torch.isnan(found[256:512]).all())
        assert bool(torch.isfinite(found[:256]).all() and torch.isfinite(found[512:]).all())
    assert torch.equal(decode(encode(values, kind), 1000, kind)[512:], clean[512:])


def test_stochastic_rounding_depends_on_the_seed_and_lets_small_changes_through() -> None:
    """beta2 = 0.999: to nearest a second moment never decays."""
    nearest, dithered = torch.ones(4096), torch.ones(4096)
    for step in range(1000):
        nearest = decode(encode(nearest * 0.999, "unsigned"), 4096, "unsigned")
        dithered = decode(encode(dithered * 0.999, "unsigned", seed=step), 4096, "unsigned")
    assert float(nearest.mean()) == 1.0
    assert abs(float(dithered.mean()) / 0.999**1000 - 1) < 0.1
    values = numbers("signed", 4096)
    assert not torch.equal(encode(values, "signed", seed=1), encode(values, "signed", seed=2))
    assert torch.equal(encode(values, "signed", seed=1), encode(values, "signed", seed=1))


def test_outputs_are_used_and_refused() -> None:
    values = numbers("signed", 600)
    out, back = torch.zeros(encoded_nbytes(600), dtype=torch.uint8), torch.zeros(600)
    assert encode(values, "signed", out=out) is out
    assert decode(out, 600, "signed", out=back) is back
    assert torch.equal(back, decode(encode(values, "signed"), 600, "signed"))
    with pytest.raises(ValueError, match="kind 'moments': one of"):
        encode(values, "moments")
    for bad in (values.double(), values.view(2, 300), torch.zeros(1200)[::2]):
        with pytest.raises(ValueError, match="values must be contiguous"):
            encode(bad, "signed")
    with pytest.raises(ValueError, match="out must be"):
        encode(values, "signed", out=out[1:])
    with pytest.raises(ValueError, match="data must be"):
        decode(out, 601, "signed")
    with pytest.raises(ValueError, match="out must be"):
        decode(out, 600, "signed", out=back[1:])


def train(bits: int, steps: int = 150) -> float:
    """The loss of a small network after Adam, its moments stored in `bits` between the steps."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.Tanh(), torch.nn.Linear(128, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    x = torch.randn(512, 32)
    y = teacher(x).detach()
    loss = torch.zeros(())
    for step in range(steps):
        batch = torch.randint(0, 512, (64,))
        loss = torch.nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bits == 8:
            for state in optimizer.state.values():
                for name, kind in (("exp_avg", "signed"), ("exp_avg_sq", "unsigned")):
                    flat = state[name].view(-1)
                    decode(encode(flat, kind, seed=step), flat.numel(), kind, out=flat)
    return float(torch.nn.functional.mse_loss(model(x), y).detach())


def test_adam_trains_as_in_fp32() -> None:
    start, full, eight = train(32, 1), train(32), train(8)
    assert full < start / 20
    assert eight < full * 1.15, f"from {start:.4f}: fp32 {full:.6f}, 8 bits {eight:.6f}"
