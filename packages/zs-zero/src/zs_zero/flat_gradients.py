"""The reduced gradients of one flat in a window: beside the parameters, in host memory, or in files.

What they are to be multiplied by (unscaling, clipping) is done to them at once; or, where they wait in a dtype of fewer
digits or away, it is kept in `factors` and done by the step as it reads them: the same products in the same order.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .flat_pieces import HeldPiece
from .norm import norms_of

if TYPE_CHECKING:
    from .plan import FlatPlan
    from .precision import Kept
    from .tiers.home import FlatHome


class FlatGradients(abc.ABC):
    """What `Flat` does with gradients. `grad`: (held_numel,), or None where they stand elsewhere or nowhere."""

    name: str
    plan: FlatPlan
    kept: Kept
    params: list[nn.Parameter]
    home: FlatHome | None
    held_numel: int
    whole: Tensor
    pin_states: bool

    def __init__(self, *, grad_dtype: torch.dtype, state_device: torch.device | None) -> None:
        self.grad_dtype = grad_dtype
        self.state_device = state_device  # of masters and reduced gradients; None: the parameters'
        self.grad: Tensor | None = None
        self.grad_away = False  # it is in files
        self.deferred = False  # what gradients are multiplied by is done to them in the step, not before
        self.factors: list[float] = []  # that, in order
        self.gradient_changes = 0  # how often `set_reduced` was called: an early update knows by it what it saw
        self.gradient_failure: OSError | None = None  # of a file, in the middle of a backward
        self.norms: dict[int, Tensor] = {}  # of gradients that are away: 2-norms of held pieces, by position
        self.used: set[int] = set()  # parameters that got a gradient in this window, on any rank

    @abc.abstractmethod
    def held_pieces(self) -> tuple[HeldPiece, ...]: ...

    def beside(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros where masters and reduced gradients are; page-locked where a device copies from and to them."""
        pinned = self.pin_states and self.state_device is not None and self.whole.device.type == "cuda"
        return torch.zeros(numel, dtype=dtype, device=self.state_device or self.whole.device, pin_memory=pinned)

    def gradient(self, held: HeldPiece) -> Tensor:
        """The reduced gradient of a held piece, 1-d, or as autograd made it: one rank leaves fp32 ones there."""
        grad = self.raw_gradient(held)
        return scaled(grad, self.factors, self.kept.grad) if self.factors else grad

    def raw_gradient(self, held: HeldPiece) -> Tensor:
        """As `gradient`, before it is multiplied by `factors`."""
        if held.gathered is not None:
            return held.gathered
        if self.grad is not None:
            return self.grad[held.low : held.high]
        if self.grad_away and self.home is not None:
            return self.home.gradient(held.low, held.high)
        grad = held.param.grad
        if grad is None:
            raise RuntimeError(f"{self.name}: a parameter counted as used has no gradient")
        return grad if grad.numel() == held.piece.numel else grad.reshape(-1)[held.piece.start : held.piece.stop]

    @property
    def has_reduced(self) -> bool:
        """Whether `reduced` gives something."""
        return self.grad is not None or self.grad_away

    def reduced(self) -> Tensor | None:
        """(held_numel,): what was reduced in this window, by its factors; a copy where it has any, or is in files."""
        grad = self.home.gradient(0, self.held_numel) if self.grad_away and self.home is not None else self.grad
        return grad if grad is None or not self.factors else scaled(grad, self.factors, self.kept.grad)

    def take_reduced(self, result: Tensor, *, only: Iterable[int] | None = None) -> None:
        """Adds the reduced gradients `result` (held_numel,) of one backward to those of the window.

        `only`: on one rank, the parameters that it has gradients of; the others are left as they are.
        What goes wrong with files is kept in `gradient_failure`: one rank cannot stop alone in a backward.
        """
        try:
            self._take_reduced(result, only)
        except OSError as error:  # TimeoutError too
            self.gradient_failure = self.gradient_failure or error

    def _take_reduced(self, result: Tensor, only: Iterable[int] | None) -> None:
        before, exact = self.reduced(), False
        chosen = None if only is None else set(only)
        if before is not None and chosen is not None and not chosen:
            return  # nothing of this flat
        if before is None:
            total = result.to(self.state_device, self.grad_dtype)
        else:
            total, entries = before, self.plan.entries
            parts = [slice(None)] if chosen is None else [slice(entries[i].offset, entries[i].stop) for i in chosen]
            for at in parts:
                part = total[at].add_(result[at].to(total.device))
                if part.dtype != self.kept.accum:  # torch adds micro-steps in their own dtype: its digits are left
                    part.copy_(part.to(self.kept.accum))
            # what was clipped and got nothing now has digits that files do not keep
            exact = chosen is not None and bool(self.factors) and not self.used <= chosen
            self.factors = []
        self.set_reduced(total, exact=exact)

    def set_reduced(self, grad: Tensor, *, exact: bool = False) -> None:
        """Makes `grad` (held_numel,) the window's reduced gradients, where they belong.

        `exact`: they have more digits than files keep, and stay in memory.
        """
        self.gradient_changes += 1
        if self.home is None or not self.home.gradients_away or (exact and grad.dtype != self.grad_dtype):
            self.grad, self.grad_away, self.norms = grad.to(self.state_device), False, {}
            return
        grad = grad.to("cpu", self.grad_dtype)
        self.norms = dict(enumerate(norms_of([grad[held.low : held.high] for held in self.held_pieces()])))
        self.home.put_gradient(grad)
        self.grad, self.grad_away = None, True

    def drop_gradients(self) -> None:
        """Forgets the window."""
        self.gradient_failure = None
        self.grad, self.grad_away, self.used = None, False, set()
        self.factors, self.norms = [], {}
        for param in self.params:
            param.grad = None

    def settle_factors(self) -> None:
        """Does what is deferred to gradients that stand where autograd adds to them."""
        if self.factors and self.leaves_gradients:
            self.collect()

    def collect(self) -> None:
        """Brings gradients that stand where autograd put them into `grad`, with all digits that they may get."""
        total = self.beside(self.held_numel, self.kept.grad)
        for held in self.held_pieces():
            if held.param.grad is not None:
                total[held.low : held.high] = self.gradient(held).reshape(-1)
        for param in self.params:
            param.grad = None
        self.grad, self.factors = total, []
        self.gradient_changes += 1

    def multiply_gradients(self, factor: float) -> None:
        """All of the window's, now or in the step."""
        if self.deferred:
            if self.has_reduced or any(param.grad is not None for param in self.params):  # else what comes is not meant
                self.factors.append(factor)
        elif self.grad is not None:
            self.grad.mul_(factor)
        else:
            for param in self.params:
                if param.grad is not None:
                    param.grad.mul_(factor)

    @property
    def leaves_gradients(self) -> bool:
        """Whether gradients may stay where autograd put them, on one rank."""
        if self.state_device is not None or (self.home is not None and self.home.gradients_away):
            return False
        return not self.has_reduced and self.kept.accum == self.grad_dtype == self.plan.dtype


def scaled(grad: Tensor, factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """`grad` (n,) in `dtype`, times each factor in turn: `grad` itself where nothing changes it."""
    grad = grad.reshape(-1)
    if not factors:
        return grad.to(dtype)
    result = grad.to(dtype, copy=True)
    for factor in factors:
        result.mul_(factor)
    return result
