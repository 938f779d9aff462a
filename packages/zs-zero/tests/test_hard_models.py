"""Models that ask more of the hooks than a chain of blocks: each equals plain torch at stages 2 and 3."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import zs_zero
from torch import nn
from torch.utils.checkpoint import checkpoint
from zs_comm import ConfigError
from zs_comm.testing import run_ranks

WIDTH = 16


class Positions(nn.Module):
    """Returns a view of its own parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, WIDTH))

    def forward(self, length):
        return self.table[:length]


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.layer = Positions(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer(x + self.positions(x.shape[-2]))


class Keeps(nn.Module):
    """Computes a loss after its output and keeps it: its backward runs before the output's."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        out = self.layer(x)
        self.aux = (self.layer(x) * self.gain).square().mean()
        return out


class WithLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Keeps() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x + sum(block.aux for block in self.blocks)


class InPlace(nn.Module):
    """Changes in place what units return; a linear layer over three dims returns a view."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            y += x
            x = F.relu_(y)
        return x


class FrozenRoot(nn.Module):
    """The root's own bias trains and its weight, needed after the bias has its gradient, does not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x @ self.weight))
        return x @ self.weight + self.bias


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.layers = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), nn.ModuleList(
            nn.Linear(WIDTH, WIDTH) for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        hidden = torch.tanh(self.layers[0](x) @ self.weight.detach())
        return self.layers[1](hidden) @ self.weight.detach() + x @ self.weight


class TwiceInside(nn.Module):
    """A layer goes twice through a reentrant checkpoint inside one unit."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(checkpoint(self.inner, x, use_reentrant=True))
        return x


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList(TwiceInside() for _ in range(2))

    def forward(self, x):
        for unit in self.units:
            x = unit(x)
        return x


class Attends(nn.Module):
    """Attention uses its output projection's weight without calling it; two blocks share one attention."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.layer = attention, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.layer(self.attention(x, x, x, need_weights=False)[0])


class SharedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        own = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.blocks = nn.ModuleList([Attends(shared), Attends(own), Attends(shared)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Adapted(nn.Module):
    """Frozen blocks with small trainable adapters."""

    def __init__(self):
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)).requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(WIDTH, 2, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(2, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = torch.tanh(base(x) + up(down(x)))
        return x


MODELS = {
    model.__name__: (model, units)
    for model, units in (
        (Positioned, [Positions, nn.Linear]), (WithLosses, [Keeps]), (InPlace, [nn.Linear]), (FrozenRoot, [nn.Linear]),
        (Detached, [nn.Linear]), (Checkpointed, [TwiceInside]), (SharedAttention, None), (Adapted, None),
        (SharedAttention, [Attends, nn.Linear]),
    )
}  # fmt: skip


def build(name, group, stage):
    torch.manual_seed(0)
    kind, units = MODELS[name]
    model = kind()
    client = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, zs_zero.shard(model, client, stage=stage, mesh=group, units=units) if stage >= 0 else client


def train(name, group, stage):
    model, optimizer = build(name, group, stage)
    losses = []
    for step in range(6):
        x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            losses.append(model(x).square().mean().item())
        loss = model(x.requires_grad_(step % 2 == 0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = zs_zero.full_state_dict(model) if stage >= 0 else {k: v.clone() for k, v in model.state_dict().items()}
    return losses, state


def compare(group, name):
    """The same data on both ranks: the mean of two equal gradients is exact, so plain torch is the reference."""
    reference, state = train(name, group, -1)
    problems = []
    for stage in (0, 2, 3):
        losses, found = train(name, group, stage)
        if losses != reference:
            problems.append(f"stage {stage}: losses {losses} for {reference}")
        problems += [f"stage {stage}: {key}" for key in state if not torch.equal(found[key], state[key])]
    return problems


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_plain_torch(name):
    assert run_ranks(compare, 2, name) == [[], []]


def borrowed(group):
    model, optimizer = build("InPlace", group, 3)
    x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    with zs_zero.gathered(model):
        with zs_zero.gathered(model.layers[0]):
            inner = model.layers[0].weight.sum().item()
        outer = model.layers[0].weight.sum().item()  # still whole, also after a forward and a backward
        loss = model(x).square().mean()
        loss.backward()
        after = model.layers[0].weight.sum().item()
        with pytest.raises(ConfigError, match=r"step\(\) inside"):
            optimizer.step()
    released = type(model.layers[0].weight).__name__
    optimizer.step()
    return inner == outer == after, released


def test_gathered_holds_through_nested_blocks_forwards_and_backwards():
    assert run_ranks(borrowed, 2) == [(True, "ReleasedParameter")] * 2


def replaced_values(group, stage):
    model, optimizer = build("InPlace", group, stage)
    x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    value = torch.full((WIDTH, WIDTH), 0.125)
    if stage == 3:
        with zs_zero.gathered(model.layers[0]):
            model.layers[0].weight.data = value.clone()
    else:
        model.layers[0].weight.data = value.clone()
        model.layers[1].weight.data = model.layers[1].weight.data * 1.0
    model(x).square().mean().backward()
    optimizer.step()
    found = optimizer.full_param(model.layers[0].weight)
    return (found - value).abs().max().item(), torch.equal(found, zs_zero.full_state_dict(model)["layers.0.weight"])


def test_assigning_data_is_taken_over():
    for world, stage in ((1, 0), (2, 0), (2, 2), (2, 3)):
        for moved, published in run_ranks(replaced_values, world, stage):
            assert 0.005 < moved < 0.02 and published  # one step of AdamW from the value assigned


def converted(group):
    model, optimizer = build("InPlace", group, 2)
    model.bfloat16()
    model(torch.randn(2, 4, WIDTH, dtype=torch.bfloat16)).square().mean().backward()
    with pytest.raises(ConfigError, match=r"'layers.0.weight' was replaced by .* torch.bfloat16"):
        optimizer.step()


def test_converting_a_sharded_model_is_refused():
    run_ranks(converted, 2)


def closed_and_used_again(group, stage):
    """After close() the client's optimizer goes on alone, and with its state the model can be sharded again."""
    x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    model, optimizer = build("InPlace", group, stage)
    plain, reference = build("InPlace", group, -1)
    client = optimizer.inner
    for stepping in ("sharded", "client", "sharded again"):
        if stepping == "client":
            optimizer.close()
            with pytest.raises(ConfigError, match="closed"):
                optimizer.step()
        if stepping == "sharded again":
            optimizer = zs_zero.shard(model, client, stage=stage, mesh=group, units=[nn.Linear])
        for m, o in ((model, client if stepping == "client" else optimizer), (plain, reference)):
            m(x).square().mean().backward()
            o.step()
            o.zero_grad()
    state = zs_zero.full_state_dict(model)
    return [key for key, value in plain.state_dict().items() if not torch.equal(state[key], value)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_close_gives_the_optimizer_back(stage):
    assert run_ranks(closed_and_used_again, 2, stage) == [[], []]


def forgotten(group):
    model, optimizer = build("InPlace", group, 3)
    prompt = torch.randn(2, 4, WIDTH, requires_grad=True)  # a leaf that outlives every graph
    for _ in range(3):
        model(prompt).square().mean().backward()
        optimizer.step()
    hooks = len(prompt._backward_hooks or {})
    alive = weakref.ref(model)
    del model, optimizer
    gc.collect()
    return hooks, alive() is None


def test_nothing_is_left_behind():
    assert run_ranks(forgotten, 2) == [(0, True)] * 2


def copied(group):
    model, _ = build("InPlace", group, 2)
    other = copy.deepcopy(model)
    x = torch.ones(2, 4, WIDTH)
    before = model(x).sum().item()
    optimizer = zs_zero.shard(other, torch.optim.SGD(other.parameters(), lr=1.0), stage=2, mesh=group)
    other(x).square().mean().backward()
    optimizer.step()
    return model(x).sum().item() == before, other(x).sum().item() != before


def test_a_copy_of_a_model_is_a_model_of_its_own():
    assert run_ranks(copied, 2) == [(True, True)] * 2


def test_sparse_gradients_become_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    optimizer = zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=2)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert (model[0].weight != before).any(1).nonzero().flatten().tolist() == [1, 2]
