"""Small models with one difficulty each: a `Case` is a model, its losses and its optimizer.

The data depends on (step, micro-step, rank) only, so that every way of training sees the same. `zoo_runs` trains them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

WIDTH, VOCAB, LENGTH = 16, 29, 6

Named = dict[str, Tensor]
Make = Callable[[Named], torch.optim.Optimizer]


class Micro(NamedTuple):
    """Which data: the same for every way of training."""

    step: int
    micro: int
    rank: int
    world: int
    dtype: torch.dtype

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self.step * 64 + self.micro) * 64 + self.rank)

    def tokens(self) -> tuple[Tensor, Tensor]:  # (2, LENGTH) each
        ids = torch.randint(VOCAB, (2, LENGTH + 1), generator=self.generator())
        return ids[:, :-1], ids[:, 1:]

    def vectors(self, width: int = WIDTH) -> tuple[Tensor, Tensor]:  # (4, width), (4, 3)
        source = self.generator()
        return torch.randn(4, width, generator=source).to(self.dtype), torch.randn(4, 3, generator=source)

    def images(self) -> tuple[Tensor, Tensor]:  # (4, 3, 6, 6), (4,)
        source = self.generator()
        return torch.randn(4, 3, 6, 6, generator=source).to(self.dtype), torch.randint(5, (4,), generator=source)


@dataclass(frozen=True)
class Case:
    """One model and how it is trained. `losses` yields those of one micro-step; each gets a backward of its own."""

    name: str
    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module, Micro], Iterator[Tensor]]
    optimizer: Make = field(default=lambda named: torch.optim.AdamW(list(named.values()), lr=3e-3, weight_decay=0.1))
    backwards: int = 1  # how often a parameter may get a gradient in one micro-step
    ddp: dict[str, Any] | None = field(default_factory=dict)  # DDP's options; None: DDP cannot run it, see `Averaging`

    def __repr__(self) -> str:
        return self.name


# -- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The unit of every model here."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Branching(Block):
    """A block with a part that runs on demand."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.detour = nn.Linear(width, width)

    def forward(self, x: Tensor, detour: bool = False) -> Tensor:
        x = super().forward(x)
        return x + self.detour(x) if detour else x


class Attention(Block):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return super().forward(x + self.out(y.transpose(1, 2).flatten(2)))


class Gpt(nn.Module):
    def __init__(self, *, tied: bool = False, recompute: str = "") -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.recompute = recompute
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant") if self.recompute else block(x)
        return self.head(self.norm(x))


class Cnn(nn.Module):
    """BatchNorm: running statistics are local to a rank, and counted.

    No bias below a BatchNorm: its gradient is 0 plus rounding, which Adam's division makes as large as any other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU()),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Chosen(nn.Module):
    """Runs the blocks it is told to, in that order: twice, never, in some steps or on some ranks."""

    def __init__(self, blocks: int = 3, *, reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        if self.reentrant:
            x = x.requires_grad_()  # else a reentrant checkpoint gives no gradients
        for index in path:
            x = checkpoint(self.blocks[index], x, use_reentrant=True) if self.reentrant else self.blocks[index](x)
        return self.head(x)


class Detours(nn.Module):
    """All ranks enter the same blocks; a rank may use parameters there that another one does not."""

    def __init__(self, blocks: int = 2, *, recompute: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branching() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)
        self.recompute = recompute  # blocks at a time; 0: none

    def forward(self, x: Tensor, detours: Sequence[bool]) -> Tensor:
        steps = list(zip(self.blocks, detours, strict=True))
        if not self.recompute:
            return self.head(self.run(x, steps))
        for first in range(0, len(steps), self.recompute):
            x = checkpoint(self.run, x, steps[first : first + self.recompute], use_reentrant=False)
        return self.head(x)

    @staticmethod
    def run(x: Tensor, steps: Sequence[tuple[nn.Module, bool]]) -> Tensor:
        for block, detour in steps:
            x = block(x, detour)
        return x


class Towers(nn.Module):
    """Two towers: the inputs of their first blocks need no gradient, also in the middle of the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Detours(4), Detours(4)

    def forward(self, x: Tensor, detours: Sequence[bool]) -> Tensor:
        return self.left(x, detours[:4]) + self.right(x, detours[4:])


class Nested(nn.Module):
    """Blocks inside of blocks: the outer ones have parameters of their own, used before and after those inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Outer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, detours: Sequence[bool]) -> Tensor:
        for block, detour in zip(self.blocks, detours, strict=True):
            x = block(x, detour)
        return self.head(x)


class Outer(Branching):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.inside = nn.ModuleList(Branching() for _ in range(2))

    def forward(self, x: Tensor, detour: bool = False) -> Tensor:
        for block, on in zip(self.inside, (detour, not detour), strict=True):
            x = block(x, on)
        return super().forward(x, detour)


class PartlyFrozen(Chosen):
    """A frozen block below a trainable one, one above it, one frozen in part, and a frozen bias at the top."""

    def __init__(self) -> None:
        super().__init__(blocks=5)
        for module in (self.blocks[0], self.blocks[2], self.blocks[3].up):
            module.requires_grad_(False)
        self.head.bias.requires_grad_(False)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = Block(), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.left(y), self.right(y)


@dataclass
class Record:
    state: Tensor
    extra: Any = None


class Pair(NamedTuple):
    state: Tensor
    extra: Any = None


class Custom:
    """Known to torch's pytree only."""

    def __init__(self, state: Tensor, extra: Any) -> None:
        self.state, self.extra = state, extra


pytree.register_pytree_node(Custom, lambda node: ([node.state, node.extra], None), lambda parts, _: Custom(*parts))


Wrap = Callable[[Tensor, Any], Any]
Unwrap = Callable[[Any], Tensor]
STRUCTURES: dict[str, tuple[Wrap, Unwrap]] = {
    "dict": (lambda y, extra: {"extra": extra, "state": y}, lambda out: out["state"]),
    "tuple": (lambda y, extra: (extra, y), lambda out: out[1]),
    "dataclass": (Record, lambda out: out.state),
    "named tuple": (Pair, lambda out: out.state),
    "node": (Custom, lambda out: out.state),
}


class Wrapping(Block):
    """Takes its tensor out of one structure and gives it back in the next."""

    def __init__(self, unwrap: Unwrap, wrap: Wrap) -> None:
        super().__init__()
        self.unwrap, self.wrap = unwrap, wrap

    def forward(self, x: Any) -> Any:
        y = super().forward(self.unwrap(x))
        return self.wrap(y, [None, y.detach(), "text"])


class Structured(nn.Module):
    """Every block gives its output inside of something else, and so does the model."""

    def __init__(self) -> None:
        super().__init__()
        wraps, unwraps = zip(*STRUCTURES.values(), strict=True)
        pairs = zip((unwraps[-1], *unwraps), wraps, strict=False)
        self.blocks = nn.ModuleDict({name: Wrapping(*pair) for name, pair in zip(STRUCTURES, pairs, strict=True)})
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Custom:
        y: Any = Custom(x, None)
        for block in self.blocks.values():
            y = block(y)
        return Custom(self.head(y.state), {"all": y})


class Primes(nn.Module):
    """No parameter count divides by anything, and one parameter has no dim at all."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.lone = nn.Parameter(torch.tensor([0.5]))
        self.blocks = nn.ModuleList([nn.Linear(7, 13), nn.Linear(13, 11, bias=False), nn.Linear(11, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale
        return x + self.lone


# -- losses ----------------------------------------------------------------------------------------------------------


def _next_token(model: nn.Module, at: Micro) -> Iterator[Tensor]:
    ids, wanted = at.tokens()
    yield F.cross_entropy(model(ids).float().flatten(0, 1), wanted.flatten())


def _image_class(model: nn.Module, at: Micro) -> Iterator[Tensor]:
    images, wanted = at.images()
    yield F.cross_entropy(model(images).float(), wanted)


def _along(path: Callable[[Micro], Sequence[int]], model: nn.Module, at: Micro) -> Iterator[Tensor]:
    x, y = at.vectors()
    yield F.mse_loss(model(x, path(at)).float(), y)


def _two_backwards(model: nn.Module, at: Micro) -> Iterator[Tensor]:
    yield from _along(lambda at: (0, 1), model, at)
    yield 0.5 * next(_along(lambda at: (1, 2), model, at._replace(micro=at.micro + 32)))


def _summed(model: nn.Module, at: Micro) -> Iterator[Tensor]:
    first, second = _two_backwards(model, at)
    yield first + second


def _two_heads(model: nn.Module, at: Micro) -> Iterator[Tensor]:
    x, y = at.vectors()
    left, right = model(x)
    yield F.mse_loss(left.float(), y)  # its backward keeps the graph, see `_loop`
    yield F.l1_loss(right.float(), y)


def _structured(model: nn.Module, at: Micro) -> Iterator[Tensor]:
    x, y = at.vectors()
    yield F.mse_loss(model(x).state.float(), y)


def _plain_vectors(width: int, model: nn.Module, at: Micro) -> Iterator[Tensor]:
    x, y = at.vectors(width)
    yield F.mse_loss(model(x).float(), y)


# -- the cases -------------------------------------------------------------------------------------------------------


_UNUSED = {"find_unused_parameters": True}
_SYNC_BUFFERS = ("forward_sync_buffers", "broadcast_buffers")  # by which name this torch has it
_OWN_BUFFERS = {next(name for name in _SYNC_BUFFERS if name in signature(DistributedDataParallel).parameters): False}


def _groups(named: Named) -> torch.optim.Optimizer:
    decayed = [param for param in named.values() if param.dim() > 1]
    others = [param for param in named.values() if param.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0, "lr": 1e-2}], lr=2e-3)


def _adamw(named: Named, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(named.values()), lr=3e-3, weight_decay=0.1, **options)


def _sgd(named: Named) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(named.values()), lr=0.03, momentum=0.9, weight_decay=0.01)


def _adagrad(named: Named) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(list(named.values()), lr=0.01, weight_decay=0.01)


def _chosen(name: str, path: Callable[[Micro], Sequence[int]], **options: Any) -> Case:
    return Case(name, Chosen, partial(_along, path), **options)


def _detours(
    name: str, detours: Callable[[Micro], Sequence[bool]], make: Callable[[], nn.Module] = Detours, **options: Any
) -> Case:
    return Case(name, make, partial(_along, detours), **{"ddp": _UNUSED, **options})


def _mixed(count: int) -> Callable[[Micro], Sequence[bool]]:
    """Other detours on each rank and in each step; at the first step none at the end of the last rank's model."""
    return lambda at: [(at.step + at.micro + 2 * at.rank + index + at.world) % 3 == 0 for index in range(count)]


def _primes(name: str, optimizer: Make) -> Case:
    return Case(name, Primes, partial(_plain_vectors, 7), optimizer)


CASES = [
    Case("gpt", Gpt, _next_token),
    Case("tied embeddings", partial(Gpt, tied=True), _next_token),
    Case("cnn with batch norm", Cnn, _image_class, ddp=_OWN_BUFFERS),
    _chosen("a module used twice", lambda at: (0, 1, 0, 0, 2)),
    _chosen("parameters never used", lambda at: (0, 2), ddp=_UNUSED),
    _chosen(
        "parameters used in some steps", lambda at: (0, 1, 2) if at.step > 4 and at.step % 3 else (2, 0), ddp=_UNUSED
    ),
    _detours("parameters used on one rank only", lambda at: (at.rank == 0, at.rank != 0)),
    _detours("parameters used on one rank in turn", lambda at: (at.rank == at.step % (at.world + 1), True)),
    _detours("many parameters used on some ranks", _mixed(7), partial(Detours, 7)),
    _detours("many parameters, recomputed in pairs", _mixed(7), partial(Detours, 7, recompute=2)),
    _detours("many parameters in two towers", _mixed(8), Towers),
    _detours("many parameters, blocks in blocks", _mixed(3), Nested),
    Case("frozen parameters", PartlyFrozen, partial(_along, lambda at: range(5))),
    _chosen("two parameter groups", lambda at: (0, 1, 2), optimizer=_groups),
    Case("two losses summed", Chosen, _summed),
    Case("two forwards and backwards", Chosen, _two_backwards, backwards=2, ddp=None),
    Case("two backwards of one forward", TwoHeads, _two_heads, backwards=2, ddp=None),
    Case("checkpoint, reentrant", partial(Gpt, recompute="reentrant"), _next_token),
    Case("checkpoint, not reentrant", partial(Gpt, recompute="saved tensors"), _next_token),
    Case(  # a backward of its own for each use
        "checkpoint, reentrant, a module used thrice",
        partial(Chosen, reentrant=True),
        partial(_along, lambda at: (0, 1, 0, 0, 2)),
        backwards=3,
        ddp=None,
    ),
    Case("outputs in a dict, tuple, dataclass, named tuple, node", Structured, _structured),
    _primes("primes", _adamw),
]
OPTIMIZERS = [
    _primes("sgd with momentum", _sgd),
    _primes("adagrad", _adagrad),
    _primes("fused adamw", partial(_adamw, fused=True)),
    _primes("foreach adamw, amsgrad", partial(_adamw, foreach=True, amsgrad=True)),
]
BY_NAME = {case.name: case for case in [*CASES, *OPTIMIZERS]}
