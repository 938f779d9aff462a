"""Optimizer moments in 8 bits, 256 of them sharing a scale.

After Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (ICLR 2022): a block-wise scale keeps an outlier's
damage to its own block, and codes that are dense near zero keep the small values, which are most of them. Here

    scale   the power of two below the block's largest magnitude: one byte, fp32's own exponent
    code    the top of the fp32 number itself, exponent and 3 bits of mantissa, counted down from the scale
              signed     1 + 7 bits: 15 octaves below the scale; what is smaller becomes zero
              unsigned   8 bits: 31 octaves; what is smaller becomes the least value that is not zero,
                         because a second moment of 0 divides an update by nothing but eps
    stored  codes (numel,), then one scale for each 256 elements begun: `encoded_nbytes(numel)` bytes

To nearest the relative error is at most 1/16 within those octaves (1/32 of the root of a second moment). With a `seed`
the rounding is stochastic, to one of the two neighbours and unbiased: at beta2 = 0.999 one step changes a second moment
by less than half a code, which rounding to nearest would never let through. What was decoded survives another encoding
bit for bit, with any seed. The result depends on values and seed alone, not on threads or on cuts at multiples of 256.

A NaN or an infinity makes its whole block NaN, so that it is found.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

GROUP = 256  # elements that share a scale
_CHUNK = 1 << 16  # elements worked on at a time: the scratch, 1 MiB, stays in a core's cache
_SHIFT = 20  # bits of an fp32 below a code's last
_OCTAVE = 8  # codes
_MAGNITUDE = 0x7FFFFFFF
_NOT_FINITE = 255  # the exponent of infinities and NaN

Kind: TypeAlias = Literal["signed", "unsigned"]
_TOP: dict[str, int] = {"signed": 127, "unsigned": 255}  # the largest code


def encoded_nbytes(numel: int) -> int:
    """Bytes of `numel` elements with their scales."""
    return numel + -(-numel // GROUP)


def encode(values: Tensor, kind: str, *, out: Tensor | None = None, seed: int | None = None) -> Tensor:
    """`values` `(numel,)` fp32 in 8 bits, `(encoded_nbytes(numel),)` uint8; in `out` where it is given.

    `kind`: "signed", or "unsigned" for what is never negative (the sign is dropped). `seed`: of stochastic rounding,
    the step's number for example; None rounds to nearest. Raises `ValueError` for other shapes, dtypes and kinds.
    """
    _check("values", values, torch.float32, values.numel(), kind)
    numel = values.numel()
    if out is None:
        out = torch.empty(encoded_nbytes(numel), dtype=torch.uint8, device=values.device)
    _check("out", out, torch.uint8, encoded_nbytes(numel), kind)
    with torch.no_grad():
        for low, high, padded in _chunks(numel):
            bits = _whole(values[low:high], padded).view(torch.int32).view(-1, GROUP)
            codes, scales = _encode(bits, kind, seed)
            out[low:high].copy_(codes.view(-1)[: high - low])
            first = numel + low // GROUP
            out[first : first + scales.numel()].copy_(scales.view(-1))
    return out


def decode(data: Tensor, numel: int, kind: str, *, out: Tensor | None = None) -> Tensor:
    """What `encode` kept of `numel` elements, `(numel,)` fp32; in `out` where it is given."""
    _check("data", data, torch.uint8, encoded_nbytes(numel), kind)
    if out is None:
        out = torch.empty(numel, dtype=torch.float32, device=data.device)
    _check("out", out, torch.float32, numel, kind)
    with torch.no_grad():
        for low, high, padded in _chunks(numel):
            codes = _whole(data[low:high], padded).view(-1, GROUP).to(torch.int32)
            first = numel + low // GROUP
            scales = data[first : first + codes.shape[0]].to(torch.int32).view(-1, 1)
            decoded = _decode(codes, scales, kind).view(torch.float32)
            lost = scales.view(-1) == _NOT_FINITE
            if bool(lost.any()):
                decoded[lost] = float("nan")
            out[low:high].copy_(decoded.view(-1)[: high - low])
    return out


def _encode(bits: Tensor, kind: str, seed: int | None) -> tuple[Tensor, Tensor]:
    """fp32 as int32 `(rows, 256)` -> codes `(rows, 256)` and exponents `(rows, 1)`, int32."""
    magnitude = bits & _MAGNITUDE
    largest = magnitude.amax(1, keepdim=True)
    # of the largest rounded up, so that no rounding ends above the last code; but a finite block stays one
    exponent = ((largest + ((1 << _SHIFT) - 1)) >> 23).clamp_(max=_NOT_FINITE - 1).maximum(largest >> 23)
    codes = torch.add(magnitude, 1 << (_SHIFT - 1)) if seed is None else _dither(magnitude, seed).add_(magnitude)
    codes.bitwise_right_shift_(_SHIFT)
    codes.sub_(_offset(exponent, kind)).clamp_(0, _TOP[kind])
    if kind == "signed":
        return codes.bitwise_or_((bits >> 24).bitwise_and_(0x80)), exponent
    least = (1 - _offset(exponent, kind)).clamp_(min=1)  # of a block near fp32's own end, the code of its least value
    return torch.maximum(codes, magnitude.clamp_(max=1).mul_(least), out=codes), exponent


def _decode(codes: Tensor, exponent: Tensor, kind: str) -> Tensor:
    """The inverse, int32; `codes` is written over."""
    sign = None
    if kind == "signed":
        sign = (codes & 0x80).bitwise_left_shift_(24)
        codes.bitwise_and_(0x7F)
    some = codes.clamp(max=1)  # code 0 is zero whatever the scale
    codes.add_(_offset(exponent, kind)).mul_(some).bitwise_left_shift_(_SHIFT)
    return codes if sign is None else codes.bitwise_or_(sign)


def _offset(exponent: Tensor, kind: str) -> Tensor:
    """What lies between a code and the top bits of its number: the last octave of codes is the scale's own."""
    return exponent * _OCTAVE - (_TOP[kind] + 1 - _OCTAVE)


def _dither(magnitude: Tensor, seed: int) -> Tensor:
    """Uniform in [0, 2**20), from the seed, the place in the block and the number itself: cuts do not matter."""
    mixed = magnitude * -1640531535  # 0x9E3779B1, wrapping
    place = torch.arange(GROUP, dtype=torch.int64, device=magnitude.device)
    start = (seed + 1) * 0x85EBCA77 & 0xFFFFFFFF
    mixed.bitwise_xor_(((place + 1) * 0x27D4EB2F + start).to(torch.int32))  # wraps
    mixed.bitwise_xor_(mixed >> 15)
    mixed.mul_(-1028477379)  # 0xC2B2AE3D
    mixed.bitwise_xor_(mixed >> 13)
    return mixed.mul_(668265263).bitwise_right_shift_(32 - _SHIFT).bitwise_and_((1 << _SHIFT) - 1)


def _chunks(numel: int) -> list[tuple[int, int, int]]:
    """(first, past the last, elements of whole groups) of each chunk."""
    ends = [(low, min(low + _CHUNK, numel)) for low in range(0, numel, _CHUNK)]
    return [(low, high, -(-(high - low) // GROUP) * GROUP) for low, high in ends]


def _whole(part: Tensor, numel: int) -> Tensor:
    return part if part.numel() == numel else torch.nn.functional.pad(part, (0, numel - part.numel()))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, kind: str) -> None:
    if kind not in _TOP:
        raise ValueError(f"kind {kind!r}: one of {list(_TOP)}")
    if tensor.dtype != dtype or tensor.shape != (numel,) or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, {dtype}, of shape ({numel},): {tensor.dtype}, {tensor.shape}")
