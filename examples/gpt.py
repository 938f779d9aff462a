"""A small GPT in plain torch: an embedding, a stack of blocks, a head.

Nothing here knows about ranks or sharding. The model is cut where a reader would cut it, and the same parts
(`GPT.parts`) are what ZeRO gathers and reduces together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128  # tokens that a position can look back on
    vocab: int = 256
    init_std: float = 0.05  # of all matrices; wide models want less


class Embed(nn.Module):
    """Token plus position embedding: (batch, tokens) -> (batch, tokens, width)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer, each with a residual: (batch, tokens, width) -> the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, width / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Head(nn.Module):
    """Final norm and projection: (batch, tokens, width) -> logits (batch, tokens, vocab)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class GPT(nn.Module):
    """`model(ids)` gives logits (batch, tokens, vocab), `model(ids, targets)` the mean cross-entropy in fp32."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.init_std)

    def parts(self) -> list[nn.Module]:
        """The modules that cover every parameter once, in the order they run."""
        return [self.embed, *self.blocks, self.head]

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: Tensor,  # (tokens,)
    length: int,
    *,
    context: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Continue `prompt` by `length` tokens; temperature 0 always takes the likeliest one.

    `model` maps ids (1, tokens) to logits (1, tokens, vocab). It runs once per token, so when it is sharded every
    rank has to call this; the same seed on every rank draws the same tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = prompt
    for _ in range(length):
        logits = model(ids[None, -context:])[0, -1].float().cpu()
        if temperature > 0:
            token = torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator)
        else:
            token = logits.argmax(dim=0, keepdim=True)
        ids = torch.cat([ids, token.to(ids.device)])
    return ids
