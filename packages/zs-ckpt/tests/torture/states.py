"""States of a few MB whose every bit follows from the step: what is loaded says which save it is of, or is torn."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

_POOL = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), dtype=torch.int32, generator=torch.Generator().manual_seed(7))


class Torn(AssertionError):
    """What was loaded is the state of no one step."""


def shapes(long: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Of the state; the short one has the same names and about a quarter of the bytes of the long one's 3 MB."""
    rows = 1024 if long else 256
    return {
        "embed": ((rows, 512), torch.float32),
        "layers.0.weight": ((rows // 4, 513), torch.float32),
        "layers.0.bias": ((rows + 3,), torch.bfloat16),
        "layers.1.weight": ((3, rows // 4 + 1, 77), torch.float16),
        "counts": ((77,), torch.int8),
        "mask": ((rows,), torch.bool),
        "steps": ((), torch.int64),
        "nothing": ((0, 3), torch.float32),
    }


def bits(name: str, shape: tuple[int, ...], dtype: torch.dtype, step: int) -> Tensor:
    """The tensor of this step: any bits, of which no two steps share a word."""
    nbytes = prod(shape) * dtype.itemsize
    start = sum(name.encode()) * 101 % 4096
    words = _POOL[start : start + (nbytes + 3) // 4]
    words = words ^ (step * 2654435761 % 2**31)
    raw = words.view(torch.uint8)[:nbytes].clone()
    if dtype is torch.bool:
        raw = raw & 1
    return raw.view(dtype).reshape(shape)


def expected(step: int, long: bool) -> dict[str, Tensor]:
    return {name: bits(name, *spec, step) for name, spec in shapes(long).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check(step: int, found: Mapping[str, Tensor]) -> None:
    """Raises `Torn` unless `found` is the state of `step`, bit for bit, long or short."""
    long = len(found.get("embed", ())) == 1024
    wanted = expected(step, long)
    if sorted(found) != sorted(wanted):
        raise Torn(f"step {step}: {sorted(set(found) ^ set(wanted))} are missing or unexpected")
    different = [name for name in wanted if not same_bits(found[name], wanted[name])]
    if different:
        raise Torn(f"step {step}: {', '.join(different)} have other bits")
