"""This rank's part of a flat's parameters on its way from files to where a unit can run."""

from __future__ import annotations

import abc
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .tiers.slots import settle

if TYPE_CHECKING:
    from zs_comm import Group

    from .block_store import Ticket
    from .plan import FlatPlan
    from .tiers.home import FlatHome


class ParamState(Enum):
    """Where the values of a flat are, and what that costs this rank."""

    RELEASED = "released"  # the shard only: numel / slices elements
    READING = "reading"  # as GATHERING: from files, on their way to this rank
    GATHERING = "gathering"  # shard and whole; the values are on their way
    WHOLE = "whole"  # shard and whole (stage 3), or whole alone (stages 0-2)
    OFFLOADED = "offloaded"  # nothing on the device, by `offload_states`


class FlatReading(abc.ABC):
    """What `Flat` does where its parameters are in files."""

    plan: FlatPlan
    home: FlatHome | None
    group: Group
    state: ParamState
    held_numel: int
    whole: Tensor
    shard: Tensor
    pin_parameters: bool

    def __init__(self, *, apart: bool) -> None:
        self.apart = apart  # the parameters' device has memory of its own
        self._reads: list[Ticket] = []
        self._landing: Tensor | None = None  # (held_numel,) host memory, on the way from files to a device
        self._overdue: list[Ticket] = []  # given up on, and still on their way to the memory of `whole`

    @abc.abstractmethod
    def own_slice(self) -> Tensor: ...

    def read_ahead(self) -> None:
        """Starts reading this rank's part where it is in files; a `gather` has to follow."""
        if self.state is not ParamState.RELEASED or self.home is None or not self.home.parameters_away:
            return
        if self.group.size > 1:
            self.shard = self.whole.new_empty(self.held_numel)
        else:
            settle(self._overdue)
            self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.itemsize)
        self.state = ParamState.READING
        target = self._read_to()
        if self.apart:
            pinned = self.pin_parameters and self.whole.device.type == "cuda"
            target = self._landing = torch.empty(self.held_numel, dtype=self.plan.dtype, pin_memory=pinned)
        self._reads = self.home.start_reading(target)

    def _read_to(self) -> Tensor:
        return self.shard if self.group.size > 1 else self.own_slice()

    def _finish_reading(self) -> None:
        """Ends in RELEASED: the part that was read is in `shard`, or in `whole`."""
        failure: Exception | None = None
        for ticket in self._reads:
            try:
                ticket.wait()
            except (OSError, TimeoutError) as error:
                failure = failure or error
        self._overdue += [ticket for ticket in self._reads if not ticket.done and self.group.size == 1]
        landing, self._landing = self._landing, None
        self._reads, self.state = [], ParamState.RELEASED
        if failure is not None:
            self.drop_values()
            raise failure
        if landing is not None:
            self._read_to().copy_(landing)

    def drop_values(self) -> None:
        if all(ticket.done for ticket in self._overdue):  # the memory may go when nothing is on its way to it
            self.whole.untyped_storage().resize_(0)
        if self.home is not None and self.home.parameters_away:
            self.shard = self.whole.new_empty(0)
