"""What is kept in which dtype, against the same training written out by hand: bitwise, at each stage and world."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import ConfigError, Group, Mesh, exchange
from zs_comm.testing import run_ranks
from zs_zero import shard

sys.path.insert(0, str(Path(__file__).parent))

from kept_runs import B16, F32, How, Net, Run, Training, by_hand, differences, loss_of, make, train, varied

KEPT = {
    "fp32 masters": How(),
    "fp32 masters, bf16 states": How(state=B16),
    "bf16 masters and states": How(master=B16),
    "bf16 masters, fp32 states": How(master=B16, state=F32),
    "bf16 masters, gradients added in fp32": How(master=B16, accum=F32),
    "by chance": How(update="stochastic_rounding"),
    "by chance, fp32 states": How(update="stochastic_rounding", state=F32),
    "compensated": How(update="kahan"),
    "compensated, fp32 states": How(update="kahan", state=F32, accum=F32),
}


def check(results: list[list[str]]) -> None:
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(results) for line in found]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", KEPT)
def test_one_rank(name: str) -> None:
    for how in (KEPT[name], varied(KEPT[name], micros=3)):
        check([differences(f"stage {stage}", train(None, how, stage=stage), by_hand(how, world=1, stage=0))
               for stage in (0, 3)])  # fmt: skip


def at_each_stage(group: Group, how: How) -> list[str]:
    lines = []
    for stages in ((0, 1), (2, 3)):
        wanted = by_hand(how, world=group.size, stage=stages[0])
        for stage in stages:
            found = train(group, how, stage=stage)
            found.losses = wanted.losses if group.rank else found.losses  # rank 0's were written down
            lines += differences(f"stage {stage}", found, wanted)
    return lines


@pytest.mark.parametrize("name", KEPT)
def test_two_ranks(name: str) -> None:
    check(run_ranks(at_each_stage, 2, varied(KEPT[name], micros=2, steps=5)))


def test_three_ranks() -> None:
    check(run_ranks(at_each_stage, 3, varied(KEPT["compensated"], steps=4)))


@pytest.mark.parametrize(
    ("dtype", "wire", "accum"),
    [(B16, wire, accum) for wire in (F32, torch.float16, None) for accum in (F32, None)]
    + [(F32, wire, accum) for wire in (B16, None) for accum in (B16, None)],
)
def test_dtypes_of_gradients(dtype: torch.dtype, wire: torch.dtype | None, accum: torch.dtype | None) -> None:
    how = How(dtype=dtype, wire=wire, accum=accum, micros=3, steps=2)
    check(run_ranks(at_each_stage, 2, how))


@pytest.mark.parametrize("accum", [F32, B16])
def test_local_gradients_are_added_in_their_dtype_too(accum: torch.dtype) -> None:
    check(run_ranks(at_each_stage, 2, How(accum=accum, micros=3, steps=2, local=True)))


def test_adding_up_in_fp32_matters() -> None:
    exact, kept, rounded = (train(None, How(dtype=d, accum=a, micros=32, steps=1)).params for d, a in
                            ((F32, F32), (B16, F32), (B16, B16)))  # fmt: skip
    assert not torch.equal(kept["first.weight"], rounded["first.weight"]) and exact.keys() == kept.keys()


def plainly(model: nn.Module, client: torch.optim.Optimizer, how: How, start: int, stop: int) -> None:
    for step in range(start, stop):
        for micro in range(how.micros):
            loss_of(model, how, step, micro, 0).backward()
        client.step()
        client.zero_grad()


def test_plain_is_what_torch_does_before_and_after() -> None:
    """No masters, states in bf16: torch's own training of a bf16 model, and it can go on with it."""
    how, model = How(master=B16, micros=2), make().bfloat16()
    plainly(model, how.optimizer(model.parameters()), how, 0, 8)
    training = Training(None, how, stage=0)
    training.steps(0, 4)
    training.optimizer.close()
    plainly(training.model, training.optimizer.inner, how, 4, 8)
    found = training.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_ignored_parameters_and_optimizers_of_ones_own() -> None:
    """Parameters that are left alone get one update a step, in their own dtype; so do all of an unknown class."""

    class Counting(torch.optim.AdamW):
        calls = 0

        def step(self, closure: object = None) -> None:
            self.calls += 1
            super().step()

    results = []
    for make_optimizer, calls in ((torch.optim.AdamW, 0), (Counting, 4)):
        how = How(update="stochastic_rounding", optimizer=lambda p, kind=make_optimizer: kind(p, lr=2e-3))
        training = Training(None, how, stage=0, ignore=["sometimes"])
        training.model.sometimes.bfloat16()
        training.steps(0, 4)
        counted = training.optimizer.inner.state[training.model.sometimes.weight]["step"].item()
        assert counted == 3, "step 1 does not use it"
        assert getattr(training.optimizer.inner, "calls", 0) == calls
        results.append(Run(model=dict(zs_zero.full_state_dict(training.model)), losses=training.losses))
    assert not differences("called once", *results)


def mesh_of_two_axes(group: Group, how: How) -> list[str]:
    mesh = Mesh.build(world=group, replicate=2)
    runs = [train(mesh, how, stage=stage) for stage in (1, 2, 3)]
    found = [
        f"stage {stage}: {line}"
        for stage, run in ((2, runs[1]), (3, runs[2]))
        for line in differences("", run, runs[0])
    ]
    checks = exchange(runs[0].params["first.weight"].numpy().tobytes(), group)
    return found + ([] if len(set(checks)) == 1 else ["replicas differ"])


@pytest.mark.parametrize("name", ["by chance", "compensated"])
def test_replicate_by_shard(name: str) -> None:
    check(run_ranks(mesh_of_two_axes, 4, varied(KEPT[name], steps=3)))


def norms(group: Group, how: How) -> list[float]:
    found = []
    for stage in (0, 1, 2, 3):
        training = Training(group, how, stage=stage)
        training.micro(0, 0)
        grads = [training.optimizer.full_grad(param) for param in training.model.parameters()]
        wanted = torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt().item()
        found.append(float(training.optimizer.clip_grad_norm_(wanted / 2)))
        assert abs(found[-1] - wanted) < 1e-6 * wanted, "summed in fp32, whatever the gradients are in"
        grads = [training.optimizer.full_grad(param) for param in training.model.parameters()]
        clipped = torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt().item()
        assert abs(clipped - wanted / 2) < 4e-3 * wanted
    return found


@pytest.mark.parametrize("how", [How(master=B16), How(update="kahan", accum=F32)])
def test_norms(how: How) -> None:
    first, second = run_ranks(norms, 2, how)
    assert first == second and len(set(first)) == 1


# -- drift -------------------------------------------------------------------------------------------------------------


class OneWeight(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self) -> torch.Tensor:
        return -self.weight.float().sum()


@pytest.mark.parametrize(
    ("update", "moved", "within"),
    [("plain", 0.0, 0.0), ("stochastic_rounding", 0.05, 0.002), ("kahan", 0.05, 1e-5)],
)
def test_small_updates(update: str, moved: float, within: float) -> None:
    """500 updates by 1e-4, of which bf16 cannot add a single one to 1."""
    model = OneWeight(4096)
    client = torch.optim.SGD(model.parameters(), lr=1e-4)
    optimizer = shard(model, client, stage=0, dtype=B16, master_dtype=B16, bf16_update=update)
    for _ in range(500):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(optimizer.full_param(model.weight).double().mean().item() - 1.0 - moved) <= within
    assert optimizer.inner is client and not client.state[model.weight], "SGD without momentum keeps no states"


def fitted(update: str, **options: torch.dtype) -> float:
    """Mean loss of the last steps of a fit with a small learning rate."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 16)
    wanted = torch.tanh(inputs @ torch.randn(16, 16)) * 2
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    client = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    optimizer = shard(model, client, stage=0, dtype=B16, bf16_update=update, **options)
    losses = []
    for _ in range(300):
        loss = (model(inputs.bfloat16()).float() - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_the_loss_that_plain_bf16_does_not_reach() -> None:
    masters, plain = fitted("plain"), fitted("plain", master_dtype=B16)
    chance, kahan = (fitted(update, state_dtype=F32) for update in ("stochastic_rounding", "kahan"))
    assert plain > 1.15 * masters, (masters, plain)
    assert abs(kahan / masters - 1) < 0.01, (masters, kahan)
    assert abs(chance / masters - 1) < 0.04, (masters, chance)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "nbytes"),
    [
        (How(), 2 + 4 + 8),
        (How(state=B16), 2 + 4 + 4),
        (How(update="kahan", state=F32), 2 + 2 + 8),
        (How(update="kahan"), 2 + 2 + 4),
        (How(update="stochastic_rounding"), 2 + 4),
        (How(master=B16), 2 + 4),
    ],
)
def test_bytes_between_steps(how: How, nbytes: int) -> None:
    model = nn.Linear(64, 64, bias=False)
    optimizer = shard(model, how.optimizer(model.parameters()), stage=0, **how.options)
    model(torch.ones(1, 64, dtype=B16)).sum().backward()
    optimizer.step()
    flat = optimizer._runtime.flats[0]
    tensors = [
        flat.whole,
        flat.master,
        flat.rest,
        flat.grad,
        model.weight.grad,
        *optimizer.state[optimizer._owned[0][0]].values(),
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)}
    assert sum(storage.nbytes() for storage in storages.values()) // 64**2 == nbytes


# -- buffers -----------------------------------------------------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("count", torch.tensor(3))
        self.same = self.table  # one tensor in two places
        self.register_buffer("hidden", torch.ones(2, dtype=torch.float64), persistent=False)


@pytest.mark.parametrize("dtype", [None, B16, torch.float16, F32])
def test_buffers(dtype: torch.dtype | None) -> None:
    model = WithBuffers()
    shard(model, torch.optim.SGD(model.parameters()), stage=0, dtype=B16, buffer_dtype=dtype)
    found = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert found == {
        "table": dtype or F32,
        "norm.running_mean": dtype or F32,
        "norm.running_var": dtype or F32,
        "norm.num_batches_tracked": torch.int64,
        "count": torch.int64,
        "hidden": dtype or torch.float64,
    }
    assert model.table.tolist() == [0, 1, 2, 3] and model.same is model.table


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"master_dtype": torch.float16}, "master_dtype=torch.float16: fp16 loses unscaled gradients"),
        ({"dtype": torch.float16, "master_dtype": torch.float16, "loss_scale": 8.0}, "fp16 loses unscaled gradients"),
        ({"dtype": torch.float16, "master_dtype": B16}, "the masters of torch.float16 parameters are fp32"),
        ({"state_dtype": torch.float16}, "state_dtype is torch.float32 or torch.bfloat16: fp16 cannot hold"),
        ({"grad_accum_dtype": torch.int8}, "grad_accum_dtype is torch.float32, torch.bfloat16 or torch.float16 (got"),
        ({"buffer_dtype": torch.int8}, "buffer_dtype is torch.float32"),
        ({"bf16_update": "kahn"}, "bf16_update is one of plain, stochastic_rounding, kahan (got 'kahn')"),
        ({"bf16_update": "kahan", "master_dtype": F32}, "trains without masters, and master_dtype=torch.float32"),
        ({"bf16_update": "kahan", "dtype": F32}, "the model has no bf16 parameters to train"),
    ],
)
def test_refused(options: dict[str, object], text: str) -> None:
    model = Net()
    with pytest.raises(ConfigError) as raised:
        shard(model, torch.optim.SGD(model.parameters()), stage=0, **({"dtype": B16} | options))
    assert text in str(raised.value)
    assert model.scale.dtype == F32, "nothing was changed"


def test_closures_need_the_parameters_themselves() -> None:
    model = OneWeight(4)
    optimizer = shard(model, torch.optim.SGD(model.parameters()), stage=0, dtype=B16, bf16_update="kahan")
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: model())
