"""The small language model of the precision tests, its data and its losses.

It has what goes wrong: tied weights, a layer that runs on one rank only or on none, a frozen layer, and a loss that can
be made infinite on one rank in one micro-step. Data depends on (step, micro-step, rank) only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, LENGTH, BATCH = 13, 16, 5, 2


@dataclass(frozen=True)
class Micro:
    """Which micro-step on which rank."""

    step: int
    micro: int
    rank: int


class Block(nn.Module):
    """The unit of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.detour = nn.Linear(3 * WIDTH, 3 * WIDTH, bias=False)
        self.frozen = nn.Linear(3 * WIDTH, 3 * WIDTH).requires_grad_(False)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, detour: bool) -> Tensor:  # (batch, length, width)
        y = torch.tanh(self.up(self.norm(x)))
        if detour:
            y = y + self.detour(y)
        return x + self.down(y + torch.relu(self.frozen(y)))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block = Block()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, detour: bool) -> Tensor:  # (batch, length) -> (batch, length, vocab)
        return self.head(self.norm(self.block(self.embed(ids), detour)))


def takes_detour(at: Micro) -> bool:
    """Every third step on no rank, every third on rank 1 only, else on rank 0 only; in the odd micro-steps of all."""
    return at.step % 3 != 0 and (at.micro % 2 == 1 or at.rank == (1 if at.step % 3 == 1 else 0))


def loss_of(model: nn.Module, at: Micro, inject: frozenset[tuple[int, int, int]] = frozenset()) -> tuple[Tensor, float]:
    """What to run backward through (0-dim fp32), and the loss to record (the same, before a fault is put in)."""
    source = torch.Generator().manual_seed((at.step * 16 + at.micro) * 16 + at.rank)
    ids = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=source)
    logits = model(ids[:, :-1], takes_detour(at))
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    recorded = loss.item()
    return loss * float("inf") if (at.step, at.micro, at.rank) in inject else loss, recorded
