"""Groups: the ranks that communicate along one mesh axis."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .errors import CommError, ConfigError
from .observe import Observers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .work import Work

GroupLike: TypeAlias = "Group | ProcessGroup | DeviceMesh | None"

DEFAULT_TIMEOUT_S = 120.0


class Call(NamedTuple):
    """One collective as this rank made it; the last three of them go into error messages."""

    op: str
    label: str
    nbytes: int
    axis: str
    seq: int

    def __str__(self) -> str:
        label = f" '{self.label}'" if self.label else ""
        return f"{self.op}{label} {self.nbytes:,} bytes on {self.axis} #{self.seq}"


CHANNELS = 2
CHANNEL_SEQS = 0x4000  # sequence numbers of one channel; tags hold 15 bits


class Hub:
    """What all groups made from one world share: who watches, and what this rank called last."""

    def __init__(self) -> None:
        self.observers = Observers()
        self.last_calls: deque[Call] = deque(maxlen=3)


class Group:
    """Ranks that communicate along one mesh axis.

    Attributes:
        axis: the axis' name: "world", "dp", "shard", "replicate", "tp", ...
        members: the global ranks, in group order.
        rank: this process's position in ``members``.
        size: how many members there are. At size 1 every collective is the identity and nothing is initialised.
        process_group: torch's group; None at size 1.
        timeout_s: the bound of every wait, in seconds.
        checked: while True a fingerprint travels with each collective, and ranks that make different calls
            get :class:`~zs_comm.RankDisagreement`. It must change at the same place on all ranks.
    """

    def __init__(
        self,
        axis: str,
        *,
        members: tuple[int, ...] = (0,),
        rank: int = 0,
        process_group: ProcessGroup | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        hub: Hub | None = None,
        channel: int = 0,
    ) -> None:
        if not 0 <= rank < len(members):
            raise ConfigError(f"axis {axis}: rank {rank} is not a position in members {members}")
        if timeout_s <= 0:
            raise ConfigError(f"axis {axis}: timeout_s is {timeout_s}; it must be positive")
        if len(members) > 1 and process_group is None:
            raise ConfigError(f"axis {axis}: {len(members)} members need a process group")
        self.axis = axis
        self.members = members
        self.rank = rank
        self.size = len(members)
        self.process_group = process_group if self.size > 1 else None
        self.timeout_s = timeout_s
        self.checked = False
        self.hub = hub or Hub()
        self.channel_index = channel
        # in the order of issue, and keeping the buffers of works that nobody holds until they completed
        self.in_flight: dict[int, Work] = {}
        self.seq = 0  # of the next collective; equal on all members as long as they make the same calls
        self.failed: CommError | None = None  # a timeout closes gloo's connections: after one the group is of no use
        self._cpu_backend: Any = None

    @classmethod
    def single(cls, axis: str = "dp", *, hub: Hub | None = None) -> Group:
        """The group of this process alone; needs no ``init_process_group``."""
        return cls(axis, hub=hub)

    def channel(self, index: int) -> Group:
        """A second road between the same members: calls are ordered within each, and not between them.

        For a stream of collectives whose place among others may differ from rank to rank (reductions that wait for a
        gradient, beside gathers that follow the model). Every member makes the same channels in the same order; on a
        device backend that means communicators of their own.

        Raises:
            ConfigError: ``index`` is not 0 or 1.
        """
        if not 0 <= index < CHANNELS:
            raise ConfigError(f"axis {self.axis}: channel {index} is not one of 0 ... {CHANNELS - 1}")
        process_group = self.process_group
        if process_group is not None and index and torch.cuda.is_available():
            import torch.distributed as dist

            process_group = dist.new_group(list(self.members), use_local_synchronization=True)
        return Group(
            self.axis,
            members=self.members,
            rank=self.rank,
            process_group=process_group,
            timeout_s=self.timeout_s,
            hub=self.hub,
            channel=index,
        )

    @property
    def observers(self) -> Observers:
        """The observers, shared by all groups made from one world."""
        return self.hub.observers

    @property
    def peers(self) -> list[int]:
        """The other positions, the next one first: the order to send in, so that no rank is everyone's first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    @property
    def cpu_backend(self) -> Any:
        """The backend that carries CPU tensors; its ``send`` and ``recv`` cost half of the dispatched ones.

        Raises:
            ConfigError: the process group has no CPU backend.
        """
        if self._cpu_backend is None:
            group: Any = self.process_group
            try:
                self._cpu_backend = group._get_backend(torch.device("cpu"))
            except RuntimeError as error:
                raise ConfigError(
                    f"axis {self.axis}: the process group has no backend for CPU tensors; "
                    "initialise it with backend='cpu:gloo,cuda:nccl'"
                ) from error
        return self._cpu_backend

    @property
    def has_cpu(self) -> bool:
        """True when CPU tensors can travel in this group (always, at size 1)."""
        if self.process_group is None:
            return True
        try:
            return self.cpu_backend is not None
        except ConfigError:
            return False

    def next_seq(self, count: int = 1) -> int:
        """Reserve ``count`` sequence numbers in a row; the first is returned. Channels count in ranges of their own."""
        if self.seq % CHANNEL_SEQS + count > CHANNEL_SEQS:
            self.seq += -self.seq % CHANNEL_SEQS
        seq = self.seq
        self.seq += count
        return self.channel_index * CHANNEL_SEQS + seq % CHANNEL_SEQS

    def drain(self) -> None:
        """Wait for every asynchronous collective that was issued and not waited for; their results are dropped."""
        for work in list(self.in_flight.values()):
            work.wait()

    def __repr__(self) -> str:
        return f"Group({self.axis!r}, rank {self.rank} of {self.size}, members {self.members})"


def as_group(
    obj: GroupLike = None, axis: str = "dp", *, timeout_s: float | None = None, hub: Hub | None = None
) -> Group:
    """A :class:`Group` from whatever names a set of ranks.

    Args:
        obj: a Group (returned as it is), a ``ProcessGroup``, a 1-d ``DeviceMesh``, or None: the whole world if
            torch.distributed is initialised, otherwise this process alone.
        axis: the axis' name, where ``obj`` has none.
        timeout_s: the bound of every wait in a new group (default 120).
        hub: share observers and call history with the groups that have this hub.

    Raises:
        ConfigError: ``obj`` is none of these, has more dimensions than one, or this process is not a member.
    """
    if isinstance(obj, Group):
        return obj
    bound = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
    if obj is None:
        if not (dist.is_available() and dist.is_initialized()):
            return Group(axis, timeout_s=bound, hub=hub)
        return _from_process_group(dist.group.WORLD, axis, bound, hub)
    if isinstance(obj, ProcessGroup):
        return _from_process_group(obj, axis, bound, hub)
    if obj == dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError(f"axis {axis}: this process is not a member of the process group")
    if hasattr(obj, "mesh_dim_names") and hasattr(obj, "get_group"):
        if obj.ndim != 1:
            raise ConfigError(
                f"axis {axis}: the DeviceMesh has {obj.ndim} dimensions {obj.mesh_dim_names or tuple(obj.shape)}; "
                "give a 1-d one, such as device_mesh['dp']"
            )
        name = obj.mesh_dim_names[0] if obj.mesh_dim_names else axis
        return _from_process_group(obj.get_group(), name, bound, hub)
    raise ConfigError(f"axis {axis}: expected a Group, ProcessGroup, DeviceMesh or None, not {type(obj).__name__}")


def _from_process_group(process_group: Any, axis: str, timeout_s: float, hub: Hub | None) -> Group:
    members = tuple(dist.get_process_group_ranks(process_group))
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ConfigError(f"axis {axis}: this process is not a member of the process group {members}")
    return Group(axis, members=members, rank=rank, process_group=process_group, timeout_s=timeout_s, hub=hub)
