"""Models that never stand whole: built under Init, or from the meta device."""

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import ConfigError
from zs_comm.memory import StorageMeter
from zs_comm.testing import run_ranks


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gain = nn.Parameter(torch.full((width,), 0.5))
        self.register_buffer("steps", torch.zeros(1))
        for param in self.parameters():  # by shape, children included
            if param.dim() > 1:
                nn.init.xavier_uniform_(param)

    def reset_parameters(self):
        nn.init.constant_(self.gain, 0.5)
        self.steps.zero_()

    def forward(self, x):
        return x + self.gain * self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """A parent that initialises its children again, ties a weight and reads what it built."""

    def __init__(self, width=24, blocks=6):
        super().__init__()
        self.tok = nn.Embedding(13, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 13, bias=False)
        self.apply(self.again)
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                block.down.weight.div_((2 * index + 2) ** 0.5)
            self.blocks[0].up.weight.data[0] = self.blocks[5].up.weight[1] + self.tok.weight.mean()
        self.head.weight = self.tok.weight
        self.mean = self.head.weight.detach().mean().item()

    def again(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()

    def forward(self, ids):
        x = self.tok(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(model, optimizer):
    ids = torch.arange(12).view(3, 4) % 13
    losses = []
    for _ in range(3):
        loss = model(ids).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def as_if_built_whole(group, live_numel, dtype):
    torch.manual_seed(3)
    whole = Net()
    after = torch.rand(1).item()
    torch.manual_seed(3 + group.rank * (live_numel > 0))  # values are rank 0's whatever the others' streams give
    with zs_zero.Init(mesh=group, live_numel=live_numel, dtype=dtype):
        model = Net()
    stream = torch.rand(1).item() == after or group.rank > 0
    released = type(model.tok.weight).__name__ if group.size > 1 else "ReleasedParameter"
    names = [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    with zs_zero.gathered(model.blocks[2]):
        readable = torch.equal(model.blocks[2].up.weight, whole.blocks[2].up.weight)
    reference = zs_zero.shard(whole, torch.optim.AdamW(whole.parameters()), stage=3, mesh=group, dtype=dtype)
    optimizer = zs_zero.shard(model, torch.optim.AdamW(model.parameters()), stage=3, mesh=group,
                              dtype=dtype if group.size == 1 else None)  # fmt: skip
    start = zs_zero.full_state_dict(model, masters=True), zs_zero.full_state_dict(whole, masters=True)
    equal = [torch.equal(start[0][key], start[1][key]) for key in start[1]]
    losses = train(model, optimizer) == train(whole, reference)
    return stream, released, names, readable, all(equal), losses, model.head.weight is model.tok.weight


@pytest.mark.parametrize("world", [1, 2, 3])
def test_init_gives_the_bits_of_a_whole_construction(world):
    for live_numel, dtype in ((0, None), (3000, torch.bfloat16), (10**6, None)):
        for result in run_ranks(as_if_built_whole, world, live_numel, dtype):
            assert result == (True, "ReleasedParameter", True, True, True, True, True)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(4))

    def forward(self, x):
        for linear in self.linears:
            x = linear(x)
        return x


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(16))
        self.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def peak(group, how):
    unit = 4 * 128 * 128 * 4
    with StorageMeter() as meter:
        if how == "init":
            with zs_zero.Init(mesh=group, live_numel=128 * 128):
                model = Deep()
        else:
            with torch.device("meta"):
                model = Deep()
        zs_zero.shard(model, stage=3, mesh=group, device="cpu")
    shards = 16 * unit // group.size
    return (meter.peak_nbytes - meter.start_nbytes - shards) / unit, (
        meter.now_nbytes - meter.start_nbytes - shards
    ) / unit


@pytest.mark.parametrize("how", ["init", "meta"])
def test_peak_while_building_is_about_a_unit_above_the_shards(how):
    for above, left in run_ranks(peak, 2, how):
        assert above <= 1.55  # a unit's flat buffer, and parameters on their way into it
        assert left <= 0.1


def from_meta(group):
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    client = torch.optim.AdamW(model.parameters())
    torch.manual_seed(5)
    optimizer = zs_zero.shard(model, client, stage=3, mesh=group, device="cpu")
    state = zs_zero.full_state_dict(model)
    x = torch.randn(4, 6)
    model(x).sum().backward()
    optimizer.step()
    moved = not torch.equal(zs_zero.full_state_dict(model)["0.weight"], state["0.weight"])
    return [torch.equal(state[key], value) for key, value in plain.state_dict().items()], moved


@pytest.mark.parametrize("world", [1, 2])
def test_meta_models_are_materialised_by_reset_parameters(world):
    for equal, moved in run_ranks(from_meta, world):
        assert all(equal) and moved


class NoReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))


def test_meta_without_reset_parameters_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(NoReset())
    with pytest.raises(ConfigError, match=r"'0' \(NoReset\) is on the meta device and has no reset_parameters"):
        zs_zero.shard(model, stage=0, device="cpu")


def existing_module(group):
    torch.manual_seed(0)
    model = Block(8)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    zs_zero.Init(model, mesh=group)
    held = sum(p.untyped_storage().nbytes() if type(p) is nn.Parameter else 0 for p in model.parameters())
    zs_zero.shard(model, stage=3, mesh=group)
    state = zs_zero.full_state_dict(model)
    return held, all(torch.equal(state[key], expected[key]) for key in expected)


def test_init_takes_an_existing_module():
    assert run_ranks(existing_module, 2) == [(0, True)] * 2


def configured(group, config):
    with zs_zero.Init(mesh=group, config_dict_or_path=config):
        model = nn.Linear(8, 8)
    released = type(model.weight) is not nn.Parameter
    zs_zero.shard(model, stage=3, mesh=group)
    return released, str(model.weight.dtype)


def test_init_reads_stage_and_dtype_from_a_configuration():
    assert (
        run_ranks(configured, 2, {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}})
        == [(True, "torch.bfloat16")] * 2
    )
    assert run_ranks(configured, 2, {"zero_optimization": {"stage": 2}}) == [(False, "torch.float32")] * 2


def test_init_with_a_missing_file_names_it():
    with pytest.raises(Exception, match="no-such.json"):
        zs_zero.Init(config_dict_or_path="no-such.json")
