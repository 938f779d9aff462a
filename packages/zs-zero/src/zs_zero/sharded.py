"""What is common to optimizers whose state is spread over ranks."""

import abc
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from zs_comm import Group, ZsError


class ShardedOptimizer(torch.optim.Optimizer, abc.ABC):
    """What an engine, a checkpoint or a pipeline needs to know of an optimizer whose state is spread over ranks."""

    stage: int
    group: Group

    @abc.abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally and communicate nothing."""

    @abc.abstractmethod
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients to a global 2-norm of at most `max_norm`; returns the norm before (0-dim fp32)."""

    @abc.abstractmethod
    def abort_step(self) -> None:
        """Drops this window's gradients: parameters, states and counters are as before it."""


class TornError(ZsError, RuntimeError):
    """The client's optimizer raised half-way: its state is neither the old nor the new one."""
