"""The model that DeepSpeed trained for the checkpoints in this folder, and its data: for `make.py` and for the tests.

Odd sizes (so that shards are padded), a tied weight, a frozen parameter, a buffer, two groups of parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, DIM, SEEN, NEXT, RANKS = 13, 6, 3, 5, 2  # SEEN steps before the save, NEXT losses after it
CASES = [f"zero{stage}_{dtype}" for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]
UNIVERSAL = ["universal_fp32", "universal_bf16"]
FROZEN, TIED = "scale", ("out.weight", "embed.weight")
CLIENT_STATE = {"epoch": 2, "note": "mid-run", "sampler": {"seed": 7, "order": [3, 1, 2]}, "best": torch.arange(3.0)}


class Tiny(nn.Module):
    """forward(ids: (batch, sequence), targets) -> loss."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.up, self.norm, self.down = nn.Linear(DIM, 9), nn.LayerNorm(9), nn.Linear(9, DIM)
        self.out = nn.Linear(DIM, VOCAB, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, DIM), requires_grad=False)
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, 5)[:1].clone())

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden * self.scale + self.down(torch.tanh(self.norm(self.up(hidden)) + self.shift.to(hidden.dtype)))
        return F.cross_entropy(self.out(hidden).float().flatten(0, 1), targets.flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices decay, the rest does not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def group_names() -> list[list[str]]:
    """The parameters' names, group by group."""
    model = Tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups(model)]


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:  # (2, 7) and (2, 7)
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(VOCAB, (2, 8), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def config(stage: int, dtype: str) -> dict[str, Any]:
    """What DeepSpeed was given. Clipping is off by name: absent, DeepSpeed 0.19 clips at 1."""
    adam = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    warmup = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 6, "warmup_type": "linear"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
        # off: stage 3 would add a bias after rounding the product, and torch's own linear rounds once
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupLR", "params": warmup},
    }
