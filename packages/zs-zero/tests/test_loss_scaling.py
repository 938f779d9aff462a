"""A scaled loss in the step of every stage: exact where nothing overflows, nothing changed where something does."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zs_comm import CollectiveLog, ConfigError, Group, Mesh, RankDisagreement, ZsError
from zs_comm.testing import run_ranks
from zs_zero import DynamicLossScale, LossScale, LossScaleError, StaticLossScale

sys.path.insert(0, str(Path(__file__).parent))

from test_checkpoint_state import fill, given_by, stored

STAGES = (0, 1, 2, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(5, 17), nn.Linear(17, 3), nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.to(self.first.weight.dtype)).tanh()) * self.gain


def data(rank: int, step: int, micro: int = 0) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1000 * rank + 10 * step + micro))


def build(
    group: Group | None, stage: int, scale: LossScale | float | None, **options: Any
) -> tuple[Net, zs_zero.ZeroOptimizer]:
    model = Net()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    return model, zs_zero.shard(model, client, stage=stage, mesh=group, loss_scale=scale, **options)


def window(model: nn.Module, zero: zs_zero.ZeroOptimizer, rank: int, step: int, *, bad: bool = False) -> float:
    """Two backwards, the last of them through an infinite input where `bad`; the sum of the losses."""
    total = 0.0
    for micro in range(2):
        x = data(rank, step, micro)
        if bad and micro:
            x[0, 0] = torch.inf
        loss = model(x).float().square().mean()
        zero.scale(loss / 2).backward()
        total += loss.item()
    return total


def state_of(zero: zs_zero.ZeroOptimizer) -> dict[str, Tensor]:
    """Masters, parameters and states of this rank, by value."""
    state = {f"param {n}": zero.full_param(p) for n, p in zero.model.named_parameters()}
    state |= {f"value {n}": v.clone() for n, v in zs_zero.full_state_dict(zero.model).items()}
    for name, param in zero.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            value = zero.full_state(param, key)
            if value is not None:
                state[f"{key} {name}"] = value.clone()
    return state


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [*(a.keys() ^ b.keys()), *(name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name]))]


# -- exact ------------------------------------------------------------------------------------------------------------


def trained(group: Group | None, stage: int, scale: LossScale | None, **how: Any) -> tuple[list[Any], Any]:
    model, zero = build(group, stage, scale)
    rank, seen, scales = group.rank if group else 0, [], []
    for step in range(9):
        loss = window(model, zero, rank, step)
        grads = [None if (g := zero.full_grad(p)) is None else g.clone() for p in model.parameters()]
        if how.get("own_clip"):
            norm = zero.clip_grad_norm_(0.3)
            zero.step()
        else:
            zero.step(max_norm=0.3)
            norm = zero.norm
        zero.zero_grad()
        seen.append((loss, float(norm), grads))
        scales.append(zero.loss_scale)
    return seen, (state_of(zero), scales)


def scaled_and_not(group: Group | None, stage: int) -> list[str]:
    """In fp32 a power of two changes nothing, whatever the step: so what differs was scaled and unscaled unequally."""
    plain, (end, _) = trained(group, stage, None)
    lines = []
    for own_clip in (False, True):
        scale = DynamicLossScale(initial=4, window=2, hysteresis=1)
        run, (own_end, scales) = trained(group, stage, scale, own_clip=own_clip)
        if len(set(scales)) < 4:
            lines.append(f"the scale did not grow: {scales}")
        for step, (got, wanted) in enumerate(zip(run, plain, strict=True)):
            if got[:2] != wanted[:2]:
                lines.append(f"step {step}: loss and norm {got[:2]} != {wanted[:2]}")
            for a, b in zip(got[2], wanted[2], strict=True):
                if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
                    lines.append(f"step {step}: full_grad")
        lines += [f"own_clip={own_clip}: {name}" for name in different(own_end, end)]
    return lines


@pytest.mark.parametrize("stage", STAGES)
def test_a_power_of_two_changes_no_bit_also_when_it_grows(stage: int) -> None:
    assert scaled_and_not(None, stage) == []


@pytest.mark.parametrize("stage", STAGES)
def test_nor_at_two_ranks(stage: int) -> None:
    assert run_ranks(scaled_and_not, 2, stage) == [[], []]


def written_gradients(group: Group | None, stage: int) -> list[str]:
    """`set_full_grad` is in the units of the loss."""
    runs = []
    for scale in (None, StaticLossScale(64.0)):
        model, zero = build(group, stage, scale)
        window(model, zero, group.rank if group else 0, 0)
        zero.set_full_grad(model.first.weight, torch.full((17, 5), 0.25))
        zero.set_full_grad(model.unused.weight, torch.full((2, 2), 0.5))
        norm = float(zero.grad_norm())
        zero.step()
        runs.append((norm, state_of(zero)))
    return [] if runs[0][0] == runs[1][0] and not different(runs[0][1], runs[1][1]) else [f"{runs}"]


@pytest.mark.parametrize("stage", STAGES)
def test_written_gradients(stage: int) -> None:
    assert written_gradients(None, stage) == []
    assert run_ranks(written_gradients, 2, stage) == [[], []]


def test_a_loss_scaled_before_the_scale_changed() -> None:
    """Its gradients get the scale of the window that they are in."""
    runs = []
    for scale in (None, DynamicLossScale(initial=2, window=1, hysteresis=1)):
        model, zero = build(None, 2, scale)
        late = zero.scale(model.gain * 3.0)  # made in the first window, used in the fourth
        for step in range(4):
            window(model, zero, 0, step)
            if step == 3:
                with torch.no_grad():
                    late.backward()
            zero.step()
            zero.zero_grad()
        runs.append(state_of(zero))
        assert scale is None or scale.value >= 8.0
    assert different(*runs) == []


def test_a_scale_that_is_no_power_of_two() -> None:
    runs = []
    for scale in (None, 1000.0):
        model, zero = build(None, 1, scale)
        for step in range(5):
            window(model, zero, 0, step)
            zero.step(max_norm=0.3)
            zero.zero_grad()
        runs.append(state_of(zero))
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=2e-5, atol=2e-6)


# -- overflow ---------------------------------------------------------------------------------------------------------


def skipped(group: Group, stage: int, dtype: torch.dtype, mesh: tuple[int, int] | None) -> list[str]:
    """One rank alone overflows in step 3 of 6."""
    where: Any = group if mesh is None else Mesh.build(world=group, replicate=mesh[0])
    model, zero = build(where, stage, DynamicLossScale(initial=256, window=50, hysteresis=1), dtype=dtype)
    lines = []
    for step in range(6):
        before = state_of(zero) if step == 3 else {}
        window(model, zero, group.rank, step, bad=step == 3 and group.rank == group.size - 1)
        zero.step(max_norm=1.0)
        if zero.overflow != (step == 3):
            lines.append(f"step {step}: overflow is {zero.overflow}")
        if step == 3:
            lines += [f"changed by a skipped step: {name}" for name in different(before, state_of(zero))]
            lines += [] if zero.loss_scale == 128.0 else [f"the scale is {zero.loss_scale}"]
            lines += [] if not torch.isfinite(zero.norm) else [f"the norm is {zero.norm}"]
            if any(zero.full_grad(p) is not None for p in model.parameters()):
                lines.append("a skipped step left gradients")
    steps = zero.full_state(model.gain, "step")
    lines += [] if steps is not None and float(steps) == 5 else [f"{steps} updates, 5 expected"]
    return lines


def skipped_in_both(group: Group, stage: int) -> list[str]:
    return skipped(group, stage, torch.float16, None) + skipped(group, stage, torch.float32, None)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_on_one_rank_skips_on_all(stage: int) -> None:
    assert run_ranks(skipped_in_both, 2, stage) == [[], []]


@pytest.mark.parametrize("stage", [1, 3])
def test_an_overflow_in_replicate_by_shard(stage: int) -> None:
    assert run_ranks(skipped, 4, stage, torch.float16, (2, 2)) == [[]] * 4


def test_fewer_bits_do_not_see_it_otherwise() -> None:
    """Without a loss scale every step is taken, as torch takes it; with 1.0 it is only skipped."""
    for scale, taken in ((None, True), (1.0, False)):
        model, zero = build(None, 1, scale, dtype=torch.bfloat16)
        window(model, zero, 0, 0, bad=True)
        zero.step()
        zero.zero_grad()
        assert zero.overflow is not taken
        assert bool(torch.isfinite(zero.full_param(model.first.weight)).all()) is not taken
        assert zero.loss_scale == 1.0
        assert not zero.dynamic_loss_scale


def other_axis(group: Group) -> tuple[bool, float, bool]:
    mesh = Mesh.build(world=group, tp=2)
    model, zero = build(mesh, 2, DynamicLossScale(initial=8, hysteresis=1))
    before = zero.full_param(model.gain)
    window(model, zero, group.rank, 0, bad=group.rank == 1)
    zero.step()
    return zero.overflow, zero.loss_scale, torch.equal(before, zero.full_param(model.gain))


def test_an_overflow_along_another_axis_of_the_model() -> None:
    assert run_ranks(other_axis, 2) == [(True, 4.0, True)] * 2


def ignored_overflows(group: Group, stage: int) -> tuple[bool, bool]:
    """`gain` is whole and each rank's own; its gradient alone overflows, on rank 1."""
    model, zero = build(group, stage, 8.0, ignore=["gain"])
    kept = model.gain.detach().clone()
    window(model, zero, group.rank, 0)
    if group.rank == 1 and model.gain.grad is not None:
        model.gain.grad.fill_(torch.nan)
    zero.step()
    return zero.overflow, torch.equal(model.gain, kept)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_overflow_of_an_ignored_parameter(stage: int) -> None:
    assert run_ranks(ignored_overflows, 2, stage) == [(True, True)] * 2


def test_ignored_parameters_are_unscaled() -> None:
    ends = []
    for scale in (None, 32.0):
        model = Net()
        client = torch.optim.SGD(model.parameters(), lr=0.1)
        zero = zs_zero.shard(model, client, stage=1, ignore=["gain"], loss_scale=scale)
        window(model, zero, 0, 0)
        zero.step()
        ends.append(model.gain.detach().clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], Net().gain)


def at_minimum(group: Group, stage: int) -> list[str]:
    scale = DynamicLossScale(initial=1, hysteresis=1, raise_at_minimum=True)
    model, zero = build(group, stage, scale)
    before, lines = state_of(zero), []
    window(model, zero, group.rank, 0, bad=group.rank == 0)
    try:
        zero.step()
    except LossScaleError:
        lines += [f"changed: {name}" for name in different(before, state_of(zero))]
    else:
        lines.append("nothing was raised")
    window(model, zero, group.rank, 1)  # and it goes on
    zero.step()
    return lines + ([] if different(before, state_of(zero)) and not zero.overflow else ["the next step was not taken"])


@pytest.mark.parametrize("stage", [0, 2])
def test_an_error_at_the_minimum_is_one_on_all_ranks(stage: int) -> None:
    assert run_ranks(at_minimum, 2, stage) == [[], []]


def test_a_scale_stuck_at_its_minimum_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model, zero = build(None, 1, DynamicLossScale(initial=2, hysteresis=1))
    with caplog.at_level("INFO", "zs_zero"):
        for step in range(10):
            window(model, zero, 0, step, bad=True)
            zero.step()
    assert [record.levelname for record in caplog.records] == ["INFO"] + ["WARNING"] * 4  # the 1st, 2nd, 4th, 8th
    assert "from 2 to 1" in caplog.messages[0]
    assert "skipped in a row: 8" in caplog.messages[-1]


# -- half precision ---------------------------------------------------------------------------------------------------


def means_of_large(group: Group, stage: int, mesh: tuple[int, int] | None) -> list[Any]:
    """Gradients of 40000, whose sums overflow fp16 and whose mean does not."""
    where: Any = group if mesh is None else Mesh.build(world=group, replicate=mesh[0])
    found: list[Any] = []
    for options in ({}, {"prescale": True}, {"predivide_factor": 2.0}):
        model = nn.Linear(8, 1, bias=False)
        client = torch.optim.SGD(model.parameters(), lr=1.0)
        zero = zs_zero.shard(model, client, stage=stage, mesh=where, dtype=torch.float16, loss_scale=1.0, **options)
        model(torch.full((1, 8), 40000.0, dtype=torch.float16)).sum().backward()
        grad = zero.full_grad(model.weight)
        zero.step()
        found += [zero.overflow] if grad is None or zero.overflow else grad.unique().tolist()
    return found


@pytest.mark.parametrize(("stage", "world", "mesh"), [(0, 3, None), (1, 2, None), (3, 4, (2, 2)), (1, 4, (2, 2))])
def test_a_sum_does_not_overflow_where_the_mean_does_not(stage: int, world: int, mesh: tuple[int, int] | None) -> None:
    mean = 40000.0 if world != 3 else pytest.approx(40000.0, rel=1e-3)
    assert run_ranks(means_of_large, world, stage, mesh) == [[mean] * 3] * world


def test_small_gradients_live_through_fp16_only_scaled() -> None:
    found = {}
    for scale in (1.0, 2.0**12):
        model = nn.Linear(4, 1, bias=False)
        client = torch.optim.SGD(model.parameters(), lr=1.0)
        zero = zs_zero.shard(model, client, stage=0, dtype=torch.float16, loss_scale=scale)
        zero.scale((model.weight * 0.5).sum().float() * 1e-8).backward()
        grad = zero.full_grad(model.weight)
        found[scale] = 0.0 if grad is None else grad.max().item()
    assert found[1.0] == 0.0
    assert found[2.0**12] == pytest.approx(5e-9, rel=2e-3)


def test_the_scaled_loss_of_a_16_bit_one_is_finite() -> None:
    model, zero = build(None, 0, DynamicLossScale(), dtype=torch.float16)
    scaled = zero.scale(model(data(0, 0)).square().mean())
    assert scaled.dtype == torch.float32
    assert scaled.item() > 65504 / 2**15


# -- who calls what ---------------------------------------------------------------------------------------------------


def unscaled(group: Group | None, stage: int) -> list[str]:
    model, zero = build(group, stage, DynamicLossScale(initial=8))
    before, lines = state_of(zero), []
    rank = group.rank if group else 0
    zero.scale(model(data(rank, 0)).square().mean()).backward()  # a good one first
    for call in (lambda: model(data(rank, 1)).square().mean().backward(), zero.step, zero.grad_norm):
        try:
            call()
            lines.append(f"{call} raised nothing")
        except (ConfigError, ZsError) as error:
            if "scale" not in str(error) and "abort_step" not in str(error):
                lines.append(f"{error}")
    zero.abort_step()
    lines += [f"changed: {name}" for name in different(before, state_of(zero))]
    window(model, zero, rank, 1)
    zero.step()
    return lines + ([] if different(before, state_of(zero)) else ["no step after abort_step()"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_was_not_scaled_raises(stage: int) -> None:
    assert unscaled(None, stage) == []
    assert run_ranks(unscaled, 2, stage) == [[], []]


def test_a_scale_of_one_asks_for_nothing() -> None:
    model, zero = build(None, 2, 1.0)
    loss = model(data(0, 0)).square().mean()
    assert zero.scale(loss) is loss
    loss.backward()
    zero.step()
    assert not zero.overflow


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_().to(self.first.weight.dtype)
        hidden: Any = checkpoint(lambda value: self.first(value).tanh(), x, use_reentrant=True)
        return self.second(hidden) * self.gain


def nested(group: Group | None, stage: int) -> list[str]:
    ends = []
    for kind in (Net, Checkpointed):
        model = kind()
        client = torch.optim.SGD(model.parameters(), lr=0.1)
        zero = zs_zero.shard(model, client, stage=stage, mesh=group, loss_scale=16.0)
        for step in range(3):
            window(model, zero, group.rank if group else 0, step)
            zero.step()
            zero.zero_grad()
        ends.append(state_of(zero))
    return different(*ends)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_backward_inside_a_backward(stage: int) -> None:
    assert nested(None, stage) == []
    assert run_ranks(nested, 2, stage) == [[], []]


def test_several_outputs_and_a_tensor_that_is_no_scalar() -> None:
    ends = []
    for scale in (None, 8.0):
        model, zero = build(None, 2, scale)
        out = zero.scale(model(data(0, 0)))
        out.backward(torch.full_like(out, 0.125), retain_graph=True)
        out.backward(torch.full_like(out, 0.25))
        zero.step()
        ends.append(state_of(zero))
    assert different(*ends) == []


def test_two_models_do_not_share_a_scale() -> None:
    scale = DynamicLossScale()
    with pytest.raises(ConfigError, match="no parameters"):
        zs_zero.shard(nn.ReLU(), None, loss_scale=scale)  # which leaves it free
    _, zero = build(None, 1, scale)
    with pytest.raises(ConfigError, match=r"another model.*close\(\)"):
        build(None, 1, scale)
    build(None, 1, copy.deepcopy(scale))
    zero.close()
    _, again = build(None, 1, scale)
    assert scale.owner is not None and again.loss_scale == 2.0**16


def test_a_closure_takes_no_scale() -> None:
    _, zero = build(None, 0, 8.0)
    with pytest.raises(ConfigError, match="closure"):
        zero.step(lambda: None)


def disagreement(group: Group) -> str:
    try:
        build(group, 1, float(2 + group.rank))
    except RankDisagreement as error:
        return str(error)
    return ""


def test_ranks_that_come_with_different_scales() -> None:
    assert all("StaticLossScale(3)" in text for text in run_ranks(disagreement, 2))


# -- resuming ---------------------------------------------------------------------------------------------------------


def saved(group: Group, stage: int, dtype: torch.dtype, scale: LossScale) -> tuple[Any, Any, Any]:
    """Three windows and a half; what follows, and what a checkpoint would hold of it."""
    model, zero = build(group, stage, scale, dtype=dtype)
    for step in range(3):
        window(model, zero, group.rank, step, bad=step == 1)
        zero.step()
        zero.zero_grad()
    zero.scale(model(data(group.rank, 3)).float().square().mean() / 2).backward()
    parts = given_by(zero.__zs_shardable__()), given_by(model.__zs_shardable__())
    return parts, *finished(group, model, zero)


def finished(group: Group, model: Net, zero: zs_zero.ZeroOptimizer) -> tuple[list[Any], Any]:
    zero.scale(model(data(group.rank, 3, 1)).float().square().mean() / 2).backward()
    seen = []
    for step in range(4, 9):
        zero.step(max_norm=1.0)
        seen.append((float(zero.norm), zero.loss_scale))
        zero.zero_grad()
        window(model, zero, group.rank, step)
    zero.step()
    return seen, state_of(zero)


def resumed(
    group: Group, stage: int, dtype: torch.dtype, scale: LossScale, optimizer: Any, model_state: Any
) -> tuple[list[Any], Any]:
    model, zero = build(group, stage, scale, dtype=dtype)
    fill(model.__zs_shardable__(), model_state, group)
    fill(zero.__zs_shardable__(), optimizer, group)
    return finished(group, model, zero)


def fresh(initial: float = 64.0) -> DynamicLossScale:
    return DynamicLossScale(initial=initial, window=2, hysteresis=1)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_resume_inside_a_window_is_exact(stage: int, world: int) -> None:
    ranks = run_ranks(saved, world, stage, torch.float16, fresh())
    optimizer, model = (stored([one[0][i] for one in ranks]) for i in (0, 1))
    again = run_ranks(resumed, world, stage, torch.float16, fresh(2.0), optimizer, model)
    for rank in range(world):
        assert again[rank][0] == ranks[rank][1]
        assert different(again[rank][1], ranks[rank][2]) == []
    assert len({scale for _, scale in again[0][0]}) > 1, "the scale did not grow after the resume"


@pytest.mark.parametrize("world", [1, 2])
def test_an_open_window_gets_the_scale_of_who_loads_it(world: int) -> None:
    """In fp32 the scales are exact: a window saved at scale 32 goes on unscaled, or at another, with the same bits."""
    stage = 2
    ranks = run_ranks(saved, world, stage, torch.float32, StaticLossScale(32.0))
    optimizer, model = (stored([one[0][i] for one in ranks]) for i in (0, 1))
    for scale in (StaticLossScale(1.0), StaticLossScale(4.0), StaticLossScale(2.0**20)):
        again = run_ranks(resumed, world, stage, torch.float32, scale, optimizer, model)
        for rank in range(world):
            assert [norm for norm, _ in again[rank][0]] == [norm for norm, _ in ranks[rank][1]]
            assert different(again[rank][1], ranks[rank][2]) == []


def test_the_optimizers_own_state_dict() -> None:
    model, zero = build(None, 1, fresh(), dtype=torch.float16)
    for step in range(4):
        window(model, zero, 0, step, bad=step == 1)
        zero.step()
        zero.zero_grad()
    state, weights = copy.deepcopy(zero.state_dict()), zs_zero.full_state_dict(model)
    other, other_zero = build(None, 1, fresh(2.0), dtype=torch.float16)
    zs_zero.load_full_state_dict(other, weights)
    other_zero.load_state_dict(state)
    assert other_zero.loss_scale == zero.loss_scale == 32.0
    assert other_zero.state_dict()["loss_scale"] == state["loss_scale"]


def built_sharded(group: Group) -> tuple[torch.dtype, bool]:
    with zs_zero.Init(config_dict_or_path={"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, mesh=group):
        model = Net()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zero = zs_zero.shard(model, client, stage=3, mesh=group, loss_scale=DynamicLossScale(initial=8))
    window(model, zero, group.rank, 0)
    zero.step()
    return zs_zero.full_state_dict(model)["gain"].dtype, zero.overflow


def test_a_model_built_sharded_for_fp16() -> None:
    assert run_ranks(built_sharded, 2) == [(torch.float16, False)] * 2


# -- autocast and casts -----------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor, extra: dict[str, Any] | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.norm(x).square().mean()


def ids(rank: int, step: int) -> Tensor:
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(10 * step + rank))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_autocast_is_torchs(stage: int, dtype: torch.dtype) -> None:
    plain = Deep()
    optimizer, scaler = torch.optim.AdamW(plain.parameters(), lr=1e-2), 2.0**8
    model = Deep()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zero = zs_zero.shard(model, client, stage=stage, autocast=dtype, loss_scale=scaler)
    for step in range(4):
        with torch.autocast("cpu", dtype):
            loss = plain(ids(0, step))
        (loss * scaler).backward()
        for param in plain.parameters():
            if param.grad is not None:
                param.grad /= scaler
        optimizer.step()
        optimizer.zero_grad()
        ours = model(ids(0, step))
        assert torch.equal(ours, loss)
        zero.scale(ours).backward()
        zero.step()
        zero.zero_grad()
    assert all(torch.equal(zero.full_param(p), q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert not torch.is_autocast_enabled("cpu")
    zero.close()
    assert model(ids(0, 9)).dtype == torch.float32


def autocast_stages(group: Group) -> list[str]:
    ends = []
    for stage in STAGES:
        model = Deep()
        client = torch.optim.AdamW(model.parameters(), lr=1e-2)
        zero = zs_zero.shard(
            model, client, stage=stage, mesh=group, units=(nn.Linear,), autocast=torch.float16, loss_scale=64.0
        )
        for step in range(4):
            zero.scale(model(ids(group.rank, step))).backward()
            zero.step()
            zero.zero_grad()
        ends.append({name: zero.full_param(p) for name, p in model.named_parameters()})
    return [f"stage {stage}: {name}" for stage in STAGES[1:] for name in different(ends[0], ends[stage])]


def test_autocast_is_the_same_at_every_stage() -> None:
    assert run_ranks(autocast_stages, 2) == [[], []]


def test_autocast_ends_where_a_forward_raises() -> None:
    model = Deep()
    zero = zs_zero.shard(model, None, stage=0, autocast=torch.bfloat16)
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]))
    assert not torch.is_autocast_enabled("cpu")
    model(ids(0, 0))
    assert not torch.is_autocast_enabled("cpu")
    zero.close()


def wire(group: Group, stage: int) -> tuple[int, int, list[float]]:
    """Bytes of reductions with fp32 gradients, with those of `nn.Linear` in bf16, and how far the ends are apart."""
    sent, ends = [], []
    for chosen in (None, {nn.Linear: torch.bfloat16}):
        model = Deep()
        client = torch.optim.SGD(model.parameters(), lr=0.1)
        zero = zs_zero.shard(model, client, stage=stage, mesh=group, autocast=torch.bfloat16, reduce_dtype_of=chosen)
        log = CollectiveLog()
        for step in range(6):
            if step == 5:  # calls are compared between the ranks no more
                group.observers.add(log)
            model(ids(group.rank, step)).backward()
            zero.step()
            zero.zero_grad()
        group.observers.remove(log)
        op = "all_reduce" if stage == 0 else "reduce_scatter"
        sent.append(sum(count.nbytes for (name, _), count in log.counts.items() if name == op))
        ends.append([zero.full_param(p) for p in model.parameters()])
    apart = [float((a - b).abs().max()) for a, b in zip(*ends, strict=True)]
    return sent[0], sent[1], apart


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_gradients_of_chosen_modules_travel_in_their_dtype(stage: int) -> None:
    linear = 3 * (16 * 16 + 16)
    for full, mixed, apart in run_ranks(wire, 2, stage):
        saved = full - mixed
        assert 0.9 * 2 * linear <= saved <= 1.5 * 2 * linear, (full, mixed)  # two bytes less for each, padding aside
        assert 0 < max(apart) < 1e-2


def test_inputs_are_cast() -> None:
    seen: list[Any] = []

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor, *, more: dict[str, Any], flag: bool) -> Tensor:
            seen.extend([x.dtype, more["a"][0].dtype, more["b"].dtype, flag])
            return x * self.weight

    model = Reads()
    zs_zero.shard(model, None, stage=0, dtype=torch.float16, cast_inputs=torch.float16)
    out = model(
        torch.ones(2),
        more={"a": [torch.ones(1, dtype=torch.float64)], "b": torch.ones(1, dtype=torch.int64)},
        flag=True,
    )
    assert seen == [torch.float16, torch.float16, torch.int64, True]
    assert out.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"autocast": torch.float32}, "autocast is torch.bfloat16 or torch.float16"),
        ({"cast_inputs": torch.int8}, r"cast_inputs is .*got torch.int8"),
        ({"reduce_dtype_of": {nn.Linear: torch.int8}}, r"reduce_dtype_of\[Linear\]"),
        ({"loss_scale": -2.0}, "loss_scale is a finite number above 0"),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        zs_zero.shard(Net(), None, stage=0, **options)
