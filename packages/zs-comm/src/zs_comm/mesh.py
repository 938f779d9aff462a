"""Named mesh axes: how the ranks of a world are arranged.

    rank = ((((pp * replicate + r) * shard + s) * sp + p) * tp + t)      outermost axis first

Ranks of one ``tp`` group are neighbours, those of one ``pp`` group are far apart, because that is how much they talk.
The axis ``dp`` is ``replicate`` x ``shard``; expert parallelism (``ep``) divides ``shard``: its groups are neighbours
inside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .errors import ConfigError, ZsError
from .group import Group, as_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "replicate", "shard", "sp", "tp")  # outermost first


class Mesh:
    """The ranks of a world arranged along named axes; :meth:`build` makes one.

    Attributes:
        world: the group of all ranks.
        sizes: the size of each axis: pp, dp, replicate, shard, sp, tp, ep.
        coordinate: this process's position along each of them.
    """

    def __init__(
        self,
        world: Group,
        sizes: dict[str, int],
        coordinate: dict[str, int],
        groups: dict[str, Group],
        device_type: str,
    ) -> None:
        self.world = world
        self.sizes = sizes
        self.coordinate = coordinate
        self.device_type = device_type
        self._groups = groups
        self._device_mesh: DeviceMesh | None = None

    @classmethod
    def build(
        cls,
        *,
        world: Group | None = None,
        pp: int = 1,
        dp: int | None = None,
        tp: int = 1,
        sp: int = 1,
        ep: int = 1,
        replicate: int = 1,
        device_type: str | None = None,
    ) -> Mesh:
        """Arrange the ranks of ``world``; all ranks call it with the same sizes.

        Args:
            world: the group of all ranks; default torch.distributed's world, or this process alone.
            pp: pipeline stages.
            dp: data parallel ranks; default what the other axes leave.
            tp: tensor parallel ranks.
            sp: sequence parallel ranks.
            ep: expert parallel ranks, a divisor of ``dp / replicate``.
            replicate: copies inside ``dp``; ``dp / replicate`` ranks share one.
            device_type: of :attr:`device_mesh`; default "cuda" with a GPU, otherwise "cpu".

        Raises:
            ConfigError: the product is not the world; the message shows the equation.
        """
        world = world or as_group(None, "world")
        given = {"pp": pp, "dp": dp, "tp": tp, "sp": sp, "ep": ep, "replicate": replicate}
        for axis, size in given.items():
            if size is not None and size < 1:
                raise ConfigError(f"{axis} is {size}; it must be at least 1")
        sizes = _sizes(world.size, pp=pp, dp=dp, tp=tp, sp=sp, ep=ep, replicate=replicate)
        grid = torch.arange(world.size).view([sizes[axis] for axis in AXES])
        where = dict(zip(AXES, (grid == world.rank).nonzero()[0].tolist(), strict=True))
        groups = {axis: _axis_group(world, axis, grid.movedim(i, -1)) for i, axis in enumerate(AXES)}
        groups["dp"] = _dp_group(world, groups, grid)
        groups["ep"] = _axis_group(world, "ep", _split_last(grid.movedim(2, -1), ep))
        coordinate = where | {axis: groups[axis].rank for axis in ("dp", "ep")}
        device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(world, sizes, coordinate, groups, device_type)

    def group(self, axis: str) -> Group:
        """The group of this process along an axis: "pp", "dp", "replicate", "shard", "sp", "tp", "ep" or "world".

        Raises:
            ConfigError: there is no such axis.
        """
        if axis == "world":
            return self.world
        if axis not in self._groups:
            raise ConfigError(f"no axis {axis!r}; there are {', '.join([*self._groups, 'world'])}")
        return self._groups[axis]

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """torch's DeviceMesh over the same groups, axes of size 1 left out; None in a world of one process.

        It is made when it is first asked for, by all ranks: importing it costs a good part of a second.
        """
        if self.world.size == 1:
            return None
        if self._device_mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            axes = [axis for axis in AXES if self.sizes[axis] > 1]
            ranks = torch.tensor(self.world.members).view([self.sizes[axis] for axis in axes])
            groups: list[Any] = [self._groups[axis].process_group for axis in axes]
            self._device_mesh = DeviceMesh.from_group(
                groups if len(groups) > 1 else groups[0],
                self.device_type,
                mesh=ranks if len(groups) > 1 else None,
                mesh_dim_names=tuple(axes),
            )
        return self._device_mesh

    def __repr__(self) -> str:
        sizes = " x ".join(f"{axis} {self.sizes[axis]}" for axis in AXES if self.sizes[axis] > 1) or "one process"
        return f"Mesh({sizes})"


def _sizes(world: int, *, pp: int, dp: int | None, tp: int, sp: int, ep: int, replicate: int) -> dict[str, int]:
    others = {"pp": pp, "tp": tp, "sp": sp}
    rest = math.prod(others.values())
    if dp is None:
        if world % rest:
            shown = " * ".join(f"{axis}({size})" for axis, size in others.items() if size > 1)
            raise ConfigError(f"{shown} = {rest} does not divide world({world})")
        dp = world // rest
    elif rest * dp != world:
        shown = " * ".join(
            f"{axis}({size})"
            for axis, size in {"pp": pp, "dp": dp, "tp": tp, "sp": sp}.items()
            if size > 1 or axis == "dp"
        )
        raise ConfigError(f"{shown} = {rest * dp} != world({world})")
    if dp % replicate:
        raise ConfigError(f"replicate({replicate}) does not divide dp({dp})")
    shard = dp // replicate
    if shard % ep:
        raise ConfigError(f"ep({ep}) does not divide shard({shard}) = dp({dp}) / replicate({replicate})")
    return {"pp": pp, "dp": dp, "replicate": replicate, "shard": shard, "sp": sp, "tp": tp, "ep": ep}


def _split_last(grid: torch.Tensor, size: int) -> torch.Tensor:
    return grid.reshape(*grid.shape[:-1], -1, size)


def _dp_group(world: Group, groups: dict[str, Group], grid: torch.Tensor) -> Group:
    for axis, other in (("shard", "replicate"), ("replicate", "shard")):
        if groups[other].size == 1:
            same = groups[axis]
            return Group(
                "dp",
                members=same.members,
                rank=same.rank,
                process_group=same.process_group,
                timeout_s=same.timeout_s,
                hub=world.hub,
            )
    return _axis_group(world, "dp", grid.movedim((1, 2), (-2, -1)).flatten(-2))


def _axis_group(world: Group, axis: str, grid: torch.Tensor) -> Group:
    """The group of this process along the last dimension of ``grid``. torch wants every rank to make every group."""
    size = grid.shape[-1]
    if size == 1:
        return Group(axis, members=(world.members[world.rank],), timeout_s=world.timeout_s, hub=world.hub)
    if size == world.size:
        return Group(
            axis,
            members=world.members,
            rank=world.rank,
            process_group=world.process_group,
            timeout_s=world.timeout_s,
            hub=world.hub,
        )
    mine: Group | None = None
    for row in grid.reshape(-1, size).tolist():
        members = tuple(world.members[position] for position in row)
        process_group: Any = dist.new_group(list(members))
        if world.rank in row:
            mine = Group(
                axis,
                members=members,
                rank=row.index(world.rank),
                process_group=process_group,
                timeout_s=world.timeout_s,
                hub=world.hub,
            )
    if mine is None:
        raise ZsError(f"rank {world.rank} is in no group of axis {axis}: {grid.tolist()}")
    return mine
