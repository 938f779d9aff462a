"""The random streams of every rank: torch (CPU and this rank's device), Python's `random`, numpy where it is in use."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from zs_comm import Group, as_group

from .boxes import whole
from .shardable import PROTOCOL, Piece, TensorSpec

_log = logging.getLogger("zs_ckpt")


class RandomState:
    """A Shardable of this process's random streams, to be saved beside a model: `{"model": ..., "rng": RandomState()}`.

    As many ranks as saved get their own streams back. Another number of ranks cannot: each derives new ones from
    (seed, step, rank), and the log says so.

    Args:
        step: what the new streams are derived from besides the seed: they differ from those of another step.
        group: the ranks that save; default: all.
    """

    PROTOCOL = PROTOCOL

    def __init__(self, *, step: int = 0, group: Group | None = None) -> None:
        self._step = step
        self._group = as_group(None, "world") if group is None else group
        self._read: dict[str, Tensor] = {}

    def pieces(self) -> Iterator[Piece]:
        for name, state in _states().items():
            yield Piece(TensorSpec(name, tuple(state.shape), state.dtype), whole(state.shape), state, scope="rank")

    def objects(self) -> Mapping[str, Any]:
        return {"world": self._group.size, "seed": torch.initial_seed(), "step": self._step}

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        self._read = {}
        if objects.get("world") != self._group.size:
            return
        for name, state in _states().items():
            if name in saved and tuple(saved[name].shape) == tuple(state.shape):
                self._read[name] = torch.empty_like(state)
                spec = TensorSpec(name, tuple(state.shape), state.dtype)
                yield Piece(spec, whole(state.shape), self._read[name], scope="rank")

    def finish(self, objects: Mapping[str, Any]) -> None:
        if self._read:
            _set(self._read)
            return
        seed = derived_seed(objects.get("seed", 0), objects.get("step", 0), self._group.rank)
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := _numpy()) is not None:
            numpy.random.seed(seed % 2**32)
        if self._group.rank == 0:
            _log.warning(
                "the checkpoint has the random streams of %s ranks, and there are %d: each rank's are derived anew "
                "from seed %s, step %s and its number",
                objects.get("world"), self._group.size, objects.get("seed"), objects.get("step"),
            )  # fmt: skip


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Whatever is drawn inside, the streams stand afterwards where they stood before."""
    before = _states()
    try:
        yield
    finally:
        _set(before)


def derived_seed(seed: int, step: int, rank: int) -> int:
    """63 bits that differ for each (seed, step, rank)."""
    digest = hashlib.blake2b(f"{seed},{step},{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _numpy() -> Any:
    """numpy, where somebody has imported it."""
    return sys.modules.get("numpy")


def _states() -> dict[str, Tensor]:
    """Each stream as a tensor of one size whatever its state."""
    version, words, gauss = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words, *_bits(gauss)], dtype=torch.int64),
    }
    if (numpy := _numpy()) is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        if kind == "MT19937":
            state = [*map(int, keys), int(position), *_bits(cached if has_gauss else None)]
            found["numpy"] = torch.tensor(state, dtype=torch.int64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set(states: Mapping[str, Tensor]) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        version, *words = states["python"].tolist()
        random.setstate((version, tuple(words[:-2]), _float(words[-2:])))
    if "numpy" in states:
        *keys, position, has, bits = states["numpy"].tolist()
        cached = _float([has, bits])
        _numpy().random.set_state(("MT19937", keys, position, int(has), 0.0 if cached is None else cached))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _bits(value: float | None) -> tuple[int, int]:
    """A float or None as two integers."""
    return (0, 0) if value is None else (1, struct.unpack("<q", struct.pack("<d", value))[0])


def _float(bits: list[int]) -> float | None:
    return float(struct.unpack("<d", struct.pack("<q", bits[1]))[0]) if bits[0] else None
