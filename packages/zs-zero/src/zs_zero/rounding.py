"""From fp32 to bf16 without losing small updates: by chance, or with the rest kept. Pure functions.

The chance is a hash of (key, index of the element), not a stream: an element's bits do not depend on which rank holds
it, how a parameter is cut, nor on the device. So the stages agree bit for bit, and a resumed run repeats itself.
"""

import struct
from hashlib import blake2b

import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements hashed at a time: 1 MiB of int32 stays in a cache
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # C. Wellons, "Prospecting for hash functions", 2018: lowbias32


def rounding_key(seed: int, updates: int, name: str, state: str) -> str:
    """Of the random numbers by which one update rounds one state of a parameter ("": its value)."""
    return f"{seed}\0{updates}\0{name}\0{state}"


def stochastically(values: Tensor, *, key: str, start: int = 0) -> Tensor:
    """(n,) fp32 to bf16: up with the probability of the part that is cut off, else down. NaN and infinity stay.

    Args:
        values: elements `start` to `start + n` of the tensor that `key` names.
        key: of the random numbers; another step or tensor takes another one.
    """
    out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    low, stop = start, start + values.numel()
    while low < stop:
        block = low // _BLOCK
        high = min((block + 1) * _BLOCK, stop)
        part = values[low - start : high - start]
        noise = _noise(f"{key}\0{block}", low - block * _BLOCK, high - block * _BLOCK, values.device)
        # the 16 low bits are the part that bf16 has no room for; of sign and magnitude, so the same for both signs
        noise.add_(part.view(torch.int32)).bitwise_and_(-(1 << 16))
        out[low - start : high - start] = torch.where(part.isfinite(), noise.view(torch.float32), part)
        low = high
    return out


def _noise(key: str, low: int, high: int, device: torch.device) -> Tensor:
    """Uniform in [0, 2**16), int32, for the indices from `low` to `high` (below 2**31)."""
    first, second = struct.unpack("<ii", blake2b(key.encode(), digest_size=8).digest())
    x = torch.arange(low, high, dtype=torch.int32, device=device)
    for word in (first, second):
        x.bitwise_xor_(word)
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)  # `>>` fills up with the sign
        x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 values as the nearest bf16 numbers (ties go away from 0) and int16 rests; nothing is lost.

    The rest counts in units of the last of fp32's digits. So it is Kahan's compensation without an error of its own, in
    no more memory than one in bf16 (Kalamkar et al., "Optimizing Deep Learning Recommender Systems Training on CPU
    Cluster Architectures", 2020, section 7: split SGD).
    """
    digits = values.view(torch.int32)
    weight = (digits + (1 << 15)).bitwise_right_shift_(16)
    rest = (digits - (weight << 16)).to(torch.int16)
    return torch.where(values.isnan(), values.bfloat16(), weight.to(torch.int16).view(torch.bfloat16)), rest


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """The fp32 values that `split` was given."""
    return weight.float().view(torch.int32).add_(rest).view(torch.float32)
