"""What happens around the plain loop: several backwards, graphs of gradients, switches of mode, exceptions."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import zs_zero
from torch import nn
from zs_comm import ConfigError, ZsError
from zs_comm.testing import run_ranks

Pair = namedtuple("Pair", "first second")


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width=16, blocks=3):
        super().__init__()
        self.tok = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 11)

    def forward(self, ids):
        x = self.tok(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(step, rank):
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def build(group, stage, **options):
    torch.manual_seed(0)
    model = Net()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, zs_zero.shard(model, client, stage=stage, mesh=group, **options)


def whole(model):
    return zs_zero.full_state_dict(model)


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


# -- several forwards and backwards ---------------------------------------------------------------
def variants(group, stage):
    """The same gradient by different roads: one backward of a sum; retained and repeated; through no_sync."""
    results = {}

    def train(name, go):
        model, optimizer = build(group, stage)
        for step in range(3):
            go(model, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
        results[name] = whole(model)

    def sum_of_two(model, optimizer, step):
        (loss_of(model, batch(step, group.rank)) + loss_of(model, batch(step + 50, group.rank))).backward()

    def retained(model, optimizer, step):
        loss = loss_of(model, batch(step, group.rank))
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()

    def once(model, optimizer, step):
        loss_of(model, batch(step, group.rank)).backward()

    def without_sync(model, optimizer, step):
        with optimizer.no_sync():
            loss_of(model, batch(step, group.rank)).backward()
        loss_of(model, batch(step + 50, group.rank)).backward()

    def two_forwards_first(model, optimizer, step):
        one, other = loss_of(model, batch(step, group.rank)), loss_of(model, batch(step + 50, group.rank))
        one.backward()
        other.backward()

    def only_without_sync(model, optimizer, step):
        with optimizer.no_sync():
            loss_of(model, batch(step, group.rank)).backward()

    for go in (sum_of_two, retained, once, without_sync, two_forwards_first, only_without_sync):
        train(go.__name__, go)
    return results


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_several_forwards_and_backwards(stage):
    for results in run_ranks(variants, 2, stage):
        assert same(results["once"], results["only_without_sync"])
        for one, other, bound in (
            ("once", "retained", 1e-6),
            ("sum_of_two", "without_sync", 2e-4),
            ("sum_of_two", "two_forwards_first", 2e-4),
        ):
            for key in results[one]:  # AdamW divides by the root of tiny second moments: order of sums shows
                torch.testing.assert_close(results[one][key], results[other][key], rtol=0, atol=bound)


class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def gradient_penalty(group, stage):
    torch.manual_seed(0)
    model = Smooth()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = zs_zero.shard(model, client, stage=stage, mesh=group) if stage >= 0 else client
    losses = []
    for step in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).requires_grad_()
        out = model(x).square().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        loss = out + slope.square().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).requires_grad_()
        out = model(x).square().mean()
        out.backward(create_graph=True)  # p.grad itself carries a graph
        losses.append(x.grad.square().sum().item())
        optimizer.step()
        optimizer.zero_grad()
    state = whole(model) if stage >= 0 else {key: value.clone() for key, value in model.state_dict().items()}
    return losses, state


def reference_and_stages(group):
    return [gradient_penalty(group, stage) for stage in (-1, 0, 1, 2, 3)]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("world", [1, 2])
def test_losses_with_a_graph_of_gradients(world):
    for reference, *stages in run_ranks(reference_and_stages, world):  # the same data on both ranks: the mean is exact
        for losses, state in stages:
            assert losses == reference[0]
            assert same(state, reference[1])


# -- structures ---------------------------------------------------------------
@dataclass
class Output:
    main: torch.Tensor
    extra: dict


class Branch(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, *args, **kwargs):
        x = (args[0] if args else kwargs["batch"])["x"][0]
        p, q = self.a(x), self.b(x)
        return {
            "tuple": lambda: (p, [q]),
            "dict": lambda: {"p": p, "q": {"deep": q}},
            "named": lambda: Pair(p, q),
            "dataclass": lambda: Output(p, {"q": q}),
        }[self.kind]()


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Branch(kind) for kind in ("tuple", "dict", "named", "dataclass"))

    def forward(self, batch):
        t, d, n = (part(batch) for part in self.parts[:3])
        o = self.parts[3](batch=batch)
        return {"out": t[0] * t[1][0] + d["p"] * d["q"]["deep"] + n.first * n.second + o.main * o.extra["q"]}


def structured(group, stage):
    torch.manual_seed(0)
    model = Structured()
    client = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = zs_zero.shard(model, client, stage=stage, mesh=group, units=[Branch]) if stage >= 0 else client
    losses = []
    for step in range(3):
        data = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()
        loss = model({"x": (data, "text", 7)})["out"].square().mean()
        loss.backward()
        losses.append((loss.item(), data.grad.sum().item()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def all_structured(group):
    return [structured(group, stage) for stage in (-1, 0, 1, 2, 3)]


@pytest.mark.parametrize("world", [1, 2])
def test_nested_inputs_and_outputs(world):
    for reference, *stages in run_ranks(all_structured, world):
        assert all(losses == reference for losses in stages)


class Sidecar(nn.Module):
    """Keeps part of its loss in an attribute: no output leads to it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.gate = nn.Linear(6, 6)

    def forward(self, x):
        self.aux = self.gate(x).square().mean()
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        self.kept = self.inner(x)


class WithSilent(nn.Module):
    def __init__(self):
        super().__init__()
        self.silent, self.layer = Silent(), nn.Linear(6, 6)

    def forward(self, x):
        self.silent(x)
        return self.layer(x)


def side_losses(group):
    results = []
    for stage in (-1, 2, 3):
        torch.manual_seed(0)
        model, other = Sidecar(), WithSilent()
        params = [*model.parameters(), *other.parameters()]
        for module, extra, choice in ((model, lambda m: m.aux, None), (other, lambda m: m.silent.kept.sum(), [Silent])):
            client = torch.optim.SGD(module.parameters(), lr=0.1)
            optimizer = zs_zero.shard(module, client, stage=stage, mesh=group, units=choice) if stage >= 0 else client
            for step in range(3):
                x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
                loss = module(x).square().mean() + extra(module)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                results.append((stage, loss.item()))
        del params
    return results


def test_losses_kept_on_the_side():
    for results in run_ranks(side_losses, 2):
        by_stage = {stage: [loss for s, loss in results if s == stage] for stage in (-1, 2, 3)}
        assert by_stage[2] == by_stage[-1] and by_stage[3] == by_stage[-1]


# -- modes ---------------------------------------------------------------
def evaluate_and_generate(group, stage):
    model, optimizer = build(group, stage)
    outputs = []
    for step in range(3):
        loss_of(model, batch(step, group.rank)).backward()
        model.eval()
        with torch.no_grad():
            outputs.append(loss_of(model, batch(99, 0)).item())
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long)
            for _ in range(4):
                ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
            outputs.append(ids.tolist())
        model.train()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def test_training_evaluation_and_generation_interleave():
    results = [run_ranks(evaluate_and_generate, 2, stage) for stage in (0, 1, 2, 3)]
    assert all(result == results[0] for result in results)
    assert results[0][0] == results[0][1]


def only_evaluate(group, stage):
    torch.manual_seed(0)
    model = Net()
    expected = loss_of(model, batch(0, 0)).item()
    optimizer = zs_zero.shard(model, stage=stage, mesh=group)
    with torch.no_grad():
        found = loss_of(model, batch(0, 0)).item()
    with pytest.raises(ConfigError, match="given none"):
        optimizer.step()
    return expected == found


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_without_optimizer_evaluates(world):
    for stage in (0, 3):
        assert run_ranks(only_evaluate, world, stage) == [True] * world


def plain_again(group):
    model, optimizer = build(group, 3)
    loss_of(model, batch(0, group.rank)).backward()
    optimizer.step()
    expected = whole(model)
    optimizer.close()
    optimizer.close()
    return same(model.state_dict(), expected) and type(model.head.weight) is nn.Parameter


def test_close_makes_an_ordinary_model():
    assert run_ranks(plain_again, 2) == [True, True]


# -- exceptions ---------------------------------------------------------------
class Stop(Exception):
    pass


def stopped(where, group, stage):
    """An exception at `where`, then `abort_step()`, then on: as if the window had not been."""
    model, optimizer = build(group, stage)
    reference, plain = build(group, stage)
    for step in range(3):
        for m, o in ((model, optimizer), (reference, plain)):
            loss_of(m, batch(step, group.rank)).backward()
            o.step()
            o.zero_grad()
    before = whole(model), {k: [s[k] for s in optimizer.inner.state.values()] for k in ("exp_avg", "step")}
    before = before[0], {k: [t.clone() for t in v] for k, v in before[1].items()}

    def boom(*_):
        raise Stop

    loss_of(model, batch(7, group.rank)).backward()  # an earlier micro-step of the window
    if where == "forward":
        handle = model.blocks[1].up.register_forward_hook(boom)
    elif where == "backward":
        handle = model.blocks[1].up.weight.register_hook(boom)
    else:
        handle = optimizer.inner.register_step_pre_hook(boom)
    with pytest.raises(Stop):
        loss_of(model, batch(8, group.rank)).backward()
        optimizer.step()
    handle.remove()
    if where == "backward" and stage >= 2 and group.size > 1:
        with pytest.raises(ZsError, match="abort_step"):
            optimizer.step()
    if where == "optimizer":
        optimizer.torn = False  # the hook ran before any update: the test knows
    optimizer.abort_step()
    after = whole(model), {k: [s[k] for s in optimizer.inner.state.values()] for k in ("exp_avg", "step")}
    unchanged = same(before[0], after[0]) and all(
        torch.equal(a, b) for k in before[1] for a, b in zip(before[1][k], after[1][k], strict=True)
    )
    gone = all(p.grad is None for p in model.parameters())
    for step in range(3, 5):
        for m, o in ((model, optimizer), (reference, plain)):
            loss_of(m, batch(step, group.rank)).backward()
            o.step()
            o.zero_grad()
    return unchanged, gone, same(whole(model), whole(reference))


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("world", [1, 2])
def test_abort_step_leaves_everything_as_before(where, world):
    for stage in (0, 1, 2, 3):
        assert run_ranks(stopped_at, world, where, stage) == [(True, True, True)] * world


def stopped_at(group, where, stage):
    return stopped(where, group, stage)


class Breaks(torch.optim.AdamW):
    broken = False

    def step(self, closure=None):
        super().step(closure)
        if self.broken:
            raise Stop("half-way")


def torn(group, stage):
    torch.manual_seed(0)
    model = Net()
    client = Breaks(model.parameters(), lr=1e-2)
    optimizer = zs_zero.shard(model, client, stage=stage, mesh=group, allow_untested_optimizer=True)
    loss_of(model, batch(0, group.rank)).backward()
    optimizer.step()
    saved, state = whole(model), optimizer.state_dict()
    client.broken = group.rank == group.size - 1
    loss_of(model, batch(1, group.rank)).backward()
    texts = []
    for _ in range(2):
        try:
            optimizer.step()
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    for call in (optimizer.zero_grad, optimizer.grad_norm, optimizer.abort_step):
        with pytest.raises(zs_zero.TornError, match="checkpoint"):
            call()
    client.broken = False
    optimizer.load_state_dict(state)
    optimizer.abort_step()
    zs_zero.load_full_state_dict(model, saved)
    restored = same(whole(model), saved)
    loss_of(model, batch(1, group.rank)).backward()
    optimizer.step()
    return texts, restored


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_that_fails_half_way_tears_the_optimizer_on_every_rank(stage):
    first, last = run_ranks(torn, 2, stage)
    assert "RankDisagreement" in first[0][0] and "rank 1" in first[0][0] and "half-way" in first[0][0]
    assert last[0][0] == "Stop: half-way"
    assert all(texts[1].startswith("TornError") for texts, _ in (first, last))
    assert first[1] and last[1]


def stepping_the_client(group):
    model, optimizer = build(group, 2)
    loss_of(model, batch(0, group.rank)).backward()
    with pytest.raises(ZsError, match="zs_zero.shard returned"):
        optimizer.inner.step()
    optimizer.step()


def test_stepping_the_clients_optimizer_is_refused():
    run_ranks(stepping_the_client, 2)
