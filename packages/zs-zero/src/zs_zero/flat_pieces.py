"""The pieces of parameters that a rank holds of a flat buffer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .plan import Piece


@dataclass(frozen=True)
class HeldPiece:
    """A piece this rank owns: `param.view(-1)[piece.start:piece.stop]` is `held[low:high]` of its flat."""

    param: nn.Parameter
    piece: Piece
    low: int
    high: int
    gathered: Tensor | None = None  # (numel,): the gradient of a parameter that this rank updates whole (`placement`)

    def cut(self, value: Any, like: Tensor) -> Any:
        """The part that belongs to this piece of a state of the whole parameter, shaped as `like`; a copy."""
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == self.param.numel():
            return value.reshape(-1)[self.piece.start : self.piece.stop].reshape(like.shape).clone()
        return value.clone() if isinstance(value, Tensor) else value


def is_element_wise(state: Any, piece: Tensor) -> bool:
    """Whether an optimizer's state has a floating-point number for each element of `piece`."""
    whole = isinstance(state, Tensor) and state.dim() > 0 and state.numel() == piece.numel()
    return whole and state.is_floating_point()


def hollow(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape whose values are elsewhere: not a number wherever it is read, and it cannot be written."""
    value: Any = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype).expand(shape)
