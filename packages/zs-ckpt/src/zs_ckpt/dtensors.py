"""Tensors that torch has spread over ranks (DTensor: FSDP2, tensor parallelism): which box this rank holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from zs_comm import ConfigError

from .boxes import Box, whole
from .shardable import Piece, TensorSpec


def is_dtensor(tensor: Any) -> bool:
    """Without an import of torch.distributed.tensor, which costs time and is there if the object is."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    part = tensor.detach()
    return part.to_local() if is_dtensor(part) else part  # type: ignore[attr-defined]


def piece_of(
    name: str, tensor: Tensor, data: Tensor, *, rank: int = 0, world: int = 1, spec: TensorSpec | None = None
) -> Piece | None:
    """The piece `data`, this rank's part of `tensor`; None where it has none.

    A plain tensor is the same on all `world` ranks. Raises ConfigError for a sum that is not done yet (Partial) and for
    placements whose part is no box.
    """
    spec = spec or TensorSpec(name, tuple(tensor.shape), tensor.dtype)
    if not is_dtensor(tensor):
        return Piece(spec, whole(spec.shape), data, rank, world)
    box, replica, replicas = _held(name, tensor)
    if data.numel() == 0 and tensor.numel() > 0:
        return None
    return Piece(spec, box, data, replica, replicas)


def _held(name: str, tensor: Any) -> tuple[Box, int, int]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    place = mesh.get_coordinate()
    if place is None:
        return tuple((0, 0) for _ in tensor.shape), 0, 1
    for placement in placements:
        if not (placement.is_shard() or placement.is_replicate() or type(placement).__name__ == "_StridedShard"):
            raise ConfigError(f"{name!r} has the placement {placement}: reduce it before it is saved")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(shape) != tuple(tensor.to_local().shape):
        raise ConfigError(f"{name!r}: its part on this rank is no box of the whole (placements {placements})")
    box = tuple((start, start + size) for start, size in zip(offset, shape, strict=True))
    replica, replicas = 0, 1
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            replica, replicas = replica * mesh.size(dim) + place[dim], replicas * mesh.size(dim)
    return box, replica, replicas
