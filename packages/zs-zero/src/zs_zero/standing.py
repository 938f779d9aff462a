"""This rank's gradients that were not reduced yet.

They stand in `param.grad`, where autograd adds them in the parameters' dtype; or, where they are to be added in another
one (`Kept.accum`), in a buffer of that dtype, into which a hook moves each as it comes.
"""

import torch
from torch import Tensor

from .flat import Flat


class Standing:
    """Those of one flat. A gradient is given in its parameter's shape."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.buffer: Tensor | None = None  # (padded_numel,) in `flat.kept.accum`
        self.inside: set[int] = set()  # parameters in `buffer`

    def indices(self) -> set[int]:
        """The parameters that have one."""
        return {index for index, param in enumerate(self.flat.params) if param.grad is not None} | self.inside

    def keep(self, index: int) -> None:
        """Adds `param.grad` to what is in the buffer, and takes it away."""
        param = self.flat.params[index]
        if param.grad is not None:
            self._add(index, param.grad)
            param.grad = None

    def get(self, index: int) -> Tensor | None:
        if index not in self.inside:
            return self.flat.params[index].grad
        self.keep(index)
        return self.view(index)

    def put(self, index: int, grad: Tensor) -> None:
        """Makes `grad` (of any shape) what `get` gives."""
        param = self.flat.params[index]
        self.inside.discard(index)
        param.grad = None
        if self.flat.kept.accumulates:
            self._add(index, grad)
        else:
            param.grad = grad.view(param.shape)

    def with_new(self, index: int, grad: Tensor) -> Tensor:
        """What stood here and `grad`, added; it stands here no more."""
        if index not in self.inside:
            return grad
        total = self._add(index, grad).clone()
        self.inside.discard(index)
        return total

    def clear(self) -> None:
        self.buffer = None
        self.inside.clear()

    def view(self, index: int) -> Tensor:
        """A parameter's place in the buffer."""
        if self.buffer is None:
            raise RuntimeError(f"{self.flat.name}: no gradients are kept")
        entry = self.flat.plan.entries[index]
        return self.buffer[entry.offset : entry.stop].view(entry.spec.shape)

    def _add(self, index: int, grad: Tensor) -> Tensor:
        flat, grad = self.flat, grad.detach()
        if self.buffer is None:
            self.buffer = torch.zeros(flat.plan.padded_numel, dtype=flat.kept.accum, device=flat.whole.device)
        place = self.view(index)
        dense = (grad.to_dense() if grad.layout != torch.strided else grad).view(place.shape)
        if index in self.inside:
            place.add_(dense)
        else:
            place.copy_(dense)
            self.inside.add(index)
        return place
