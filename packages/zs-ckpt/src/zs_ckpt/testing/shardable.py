"""What every `Shardable` does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from zs_comm import Group, as_group, barrier, exchange

from zs_ckpt.boxes import numel
from zs_ckpt.gathering import check_piece
from zs_ckpt.jsonvalues import encode
from zs_ckpt.loading import load, read
from zs_ckpt.plan import AnyPiece
from zs_ckpt.saving import save
from zs_ckpt.shardable import PROTOCOL, Shardable, is_lazy

from ._expect import expect


def check_shardable(make: Callable[[], Any], group: Group | None = None) -> None:
    """Run every check on what `make` gives; every rank of the group calls it.

    Args:
        make: gives an object with state, or its Shardable: each time a new one, with other values than the last (and
            the same on all ranks where they are shared), so that a load that does nothing is found out.

    Raises:
        AssertionError: something is not as the Protocol says.
    """
    world = as_group(group, "world")
    first, second = make(), make()
    _check_pieces(_shardable(first))
    folder = tempfile.mkdtemp(prefix="zs-ckpt-check-").encode() if world.rank == 0 else b""
    path = exchange(folder, world, label="check_shardable")[0].decode()
    try:
        save(path, {"it": first}, tag="one", group=world)
        load(path, {"it": second}, tag="one", group=world)
        _check_same(_shardable(first), _shardable(second))
        save(path, {"it": second}, tag="two", group=world)
        _check_files(path)
    finally:
        barrier(world, label="check_shardable")
        if world.rank == 0:
            import shutil

            shutil.rmtree(path, ignore_errors=True)


def _shardable(made: Any) -> Shardable:
    one = made.__zs_shardable__() if hasattr(made, "__zs_shardable__") else made
    expect(isinstance(one, Shardable), f"{type(one).__name__} has not every method of Shardable")
    expect(one.PROTOCOL == PROTOCOL, f"PROTOCOL is {one.PROTOCOL}, not {PROTOCOL}")
    return one  # type: ignore[no-any-return]


def _check_pieces(one: Shardable) -> None:
    seen: set[tuple[str, Any, str]] = set()
    for piece in one.pieces():
        check_piece(piece)
        spec, key = piece.spec, _key(piece)
        expect(key not in seen, f"{spec.name}: the box {piece.box} is given twice")
        seen.add(key)
        inside = len(piece.box) == len(spec.shape) and all(
            0 <= start <= stop <= size for (start, stop), size in zip(piece.box, spec.shape, strict=True)
        )
        expect(inside, f"{spec.name}: the box {piece.box} is not inside {spec.shape}")
        data = _data(piece)
        expect(data.numel() == numel(piece.box), f"{spec.name}: {data.numel()} elements for {piece.box}")
        expect(data.dtype == spec.dtype, f"{spec.name}: data of {data.dtype}, and the spec says {spec.dtype}")
    encode(dict(one.objects()))
    again = [_key(piece) for piece in one.pieces()]
    expect(set(again) == seen and len(again) == len(seen), "a second call of `pieces` gives others")


def _check_same(first: Shardable, second: Shardable) -> None:
    """What was loaded is what was saved, bit by bit."""
    expect(encode(dict(first.objects())) == encode(dict(second.objects())), "`objects` differ after the load")
    loaded = {_key(piece): piece for piece in second.pieces()}
    for piece in first.pieces():
        expect(_key(piece) in loaded, f"{piece.spec.name}: the box {piece.box} is gone after the load")
        same = torch.equal(_bits(_data(piece)), _bits(_data(loaded[_key(piece)])))
        expect(same, f"{piece.spec.name}: the box {piece.box} has other values after the load")


def _check_files(path: str) -> None:
    """Saved again, what was loaded gives the same tensors."""
    one, two = read(path, tag="one"), read(path, tag="two")
    expect(list(one) == list(two), f"other tensors are saved after a load: {set(one) ^ set(two)}")
    for name, value in one.items():
        expect(torch.equal(_bits(value), _bits(two[name])), f"{name} is saved with other values after a load")


def _data(piece: AnyPiece) -> torch.Tensor:
    if not is_lazy(piece):
        return piece.data
    values = torch.empty(numel(piece.box), dtype=piece.spec.dtype)
    piece.source.load(0, values)
    return values


def _key(piece: AnyPiece) -> tuple[str, Any, str]:
    return piece.spec.name, piece.box, piece.scope


def _bits(value: torch.Tensor) -> torch.Tensor:
    flat = value.detach().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
