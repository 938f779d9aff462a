"""Any stage and world size to any other: the same values, the same open window, the same batches."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_ckpt
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm import Group, barrier
from zs_comm.testing import run_ranks

PLACES = list(itertools.product((1, 2, 3, 4), (0, 1, 2, 3)))  # (world, stage)


class Uneven(nn.Module):
    """Sizes that no world divides, a scalar, an empty parameter, tied and frozen ones, one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(7, 13)
        self.second = nn.Linear(13, 7, bias=False)
        self.third = nn.Linear(7, 13)
        self.third.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.randn(5, 3))
        self.frozen = nn.Parameter(torch.randn(3, 11), requires_grad=False)
        self.register_buffer("steps", torch.tensor([4, 5]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x.to(self.scale.dtype)).tanh()))
        return x * self.scale + self.frozen.sum() + self.empty.sum()


def sharded(group: Group, stage: int, bf16: bool, **more: Any) -> tuple[nn.Module, zs_zero.ZeroOptimizer]:
    model = Uneven()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if bf16:
        more["dtype"] = torch.bfloat16
    return model, zs_zero.shard(model, optimizer, stage=stage, mesh=group, **more)


def backward(model: nn.Module, group: Group, seed: int) -> None:
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(seed)).tensor_split(group.size)[group.rank]
    model(x).float().square().mean().backward()


def written(group: Group, folder: str, stage: int) -> dict[str, Tensor]:
    model, optimizer = sharded(group, stage, bf16=stage % 2 == 1)
    with torch.no_grad(), zs_zero.gathered(model):
        model.first.weight.add_(0.01 * (4 * group.size + stage))  # no two checkpoints are alike
    for step in range(2):
        backward(model, group, step)
        optimizer.step()
    model.steps.add_(group.size)
    zs_ckpt.save(folder, {"model": model, "optimizer": optimizer}, group=group)
    found = {f"model/{k}": v for k, v in zs_zero.full_state_dict(model, masters=True).items()}
    for name, param in model.named_parameters():
        if param.requires_grad:
            for key in ("exp_avg", "exp_avg_sq", "step"):
                value = optimizer.full_state(param, key)
                if value is not None and param.numel():
                    found[f"optimizer/{key}/{name}"] = value
    return found


def compared(group: Group, root: str, stage: int) -> list[str]:
    """Loads every checkpoint into one model, and compares this rank's parts with the whole."""
    wrong = []
    model, optimizer = sharded(group, stage, bf16=stage >= 2)
    state = {"model": model, "optimizer": optimizer}
    for world, saved_stage in PLACES:
        folder = f"{root}/{world}-{saved_stage}"
        if world % 2:
            backward(model, group, 7)  # a window that the load ends
        zs_ckpt.load(folder, state, group=group)
        whole, seen = zs_ckpt.read(folder), set()
        for key, value in state.items():
            for piece in value.__zs_shardable__().pieces():
                name = f"{key}/{piece.spec.name}"
                if piece.scope:
                    continue
                part = whole[name][tuple(slice(*pair) for pair in piece.box)].reshape(piece.data.shape)
                seen.add(name)
                if not torch.equal(part.to(piece.data.dtype), piece.data):
                    wrong.append(f"{world} ranks, stage {saved_stage}: {name} {piece.box}")
        if group.size == 1 and (missing := {n for n in whole if not n.startswith("rank")} ^ seen):
            wrong.append(f"{world} ranks, stage {saved_stage}: only on one side: {missing}")
        if stage < 3:
            for name, param in model.named_parameters():
                if not torch.equal(param.detach(), whole[f"model/{name}"].to(param.dtype)):
                    wrong.append(f"{world} ranks, stage {saved_stage}: weight {name}")
    return wrong


def test_every_stage_and_world_to_every_other(tmp_path: Path) -> None:
    for world, stage in PLACES:
        folder = tmp_path / f"{world}-{stage}"
        source = run_ranks(written, world, str(folder), stage)[0]
        whole = zs_ckpt.read(folder)
        tied = "model/third.weight"
        assert source.keys() - {tied} == {name for name in whole if not name.startswith("rank")}
        for name, value in source.items():
            stored = whole["model/first.weight" if name == tied else name]
            assert torch.equal(stored, value.to(stored.dtype)) and stored.shape == value.shape, (world, stage, name)
    for world, stage in PLACES:
        for wrong in run_ranks(compared, world, str(tmp_path), stage):
            assert not wrong, (world, stage)


# -- an open window ---------------------------------------------------------------------------------------------------

WINDOWS = [(1, 0), (2, 0), (2, 1), (2, 2), (3, 3)]


def window_of(model: nn.Module, optimizer: zs_zero.ZeroOptimizer) -> dict[str, Tensor | None]:
    return {n: optimizer.full_grad(p) for n, p in model.named_parameters() if p.requires_grad and p.numel()}


def left_open(group: Group, folder: str, stage: int) -> dict[str, Tensor | None]:
    model, optimizer = sharded(group, stage, bf16=False)
    backward(model, group, 0)
    with optimizer.no_sync():
        backward(model, group, 1)
    zs_ckpt.save(folder, {"optimizer": optimizer, "model": model}, group=group)
    backward(model, group, 2)
    return window_of(model, optimizer)


def gone_on(group: Group, root: str, stage: int) -> list[dict[str, Tensor | None]]:
    found = []
    for world, saved_stage in WINDOWS:
        model, optimizer = sharded(group, stage, bf16=False)
        zs_ckpt.load(f"{root}/{world}-{saved_stage}", {"optimizer": optimizer, "model": model}, group=group)
        backward(model, group, 2)
        found.append(window_of(model, optimizer))
        optimizer.step()
    return found


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 1), (3, 2), (2, 3)])
def test_the_gradients_of_an_open_window_keep_their_mean(world: int, stage: int, tmp_path: Path) -> None:
    expected = [run_ranks(left_open, w, f"{tmp_path}/{w}-{stage_}", stage_)[0] for w, stage_ in WINDOWS]
    for saved, wanted, got in zip(WINDOWS, expected, run_ranks(gone_on, world, str(tmp_path), stage)[0], strict=True):
        assert wanted["unused"] is None and got["unused"] is None
        for name, value in wanted.items():
            if value is not None:  # the micro-steps are the same samples; the order of the sums is not
                torch.testing.assert_close(got[name], value, rtol=2e-5, atol=1e-6, msg=f"{saved} {name}")


# -- the engine at another world size ---------------------------------------------------------------------------------


class Samples:
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.randn(7, generator=torch.Generator().manual_seed(index))


def engine_of(group: Group, stage: int, clip: float = 0.5) -> zs_engine.Engine:
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
    }
    return zs_engine.initialize(model=Uneven(), training_data=Samples(), mesh=group, config=config)[0]


def trained(group: Group, folder: str, stage: int, before: int, after: int, load: bool) -> dict[str, Any]:
    """`after` samples of training; their losses are summed by optimizer step, over this rank."""
    engine = engine_of(group, stage)
    batches = zs_engine.RepeatingLoader(engine.training_dataloader)

    def run(samples: int) -> tuple[list[set[int]], list[float]]:
        drawn: list[set[int]] = [set()]
        losses = [0.0]
        for indices, x in itertools.islice(batches, samples // (2 * group.size)):
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
            drawn[-1] |= set(indices.tolist())
            losses[-1] += loss.item() * len(indices)
            if engine.was_step_applied():
                drawn.append(set())
                losses.append(0.0)
        return drawn, losses

    if load:
        engine.load_checkpoint(folder)
    else:
        run(before)
        engine.save_checkpoint(folder)
    drawn, losses = run(after)
    counters = (engine.global_steps, engine.global_samples, engine.training_dataloader.state_dict()["epoch"])
    return {"drawn": drawn, "losses": losses, "counters": counters, "weights": zs_zero.full_state_dict(engine.module)}


@pytest.mark.parametrize(("saved", "loaded"), [((1, 0), (2, 3)), ((2, 2), (1, 0)), ((3, 3), (2, 1))])
@pytest.mark.parametrize("before", [24 * 3, 24 * 3 + 12])  # after a step, and inside a window
def test_another_world_trains_on_the_same_batches(
    saved: tuple[int, int], loaded: tuple[int, int], before: int, tmp_path: Path
) -> None:
    runs = []
    for (world, stage), load in ((saved, False), (loaded, True)):
        ranks = run_ranks(trained, world, str(tmp_path), stage, before, 24 * 5 - before % 24, load)
        drawn = [set.union(*parts) for parts in zip(*(rank["drawn"] for rank in ranks), strict=True)]
        losses = [sum(parts) for parts in zip(*(rank["losses"] for rank in ranks), strict=True)]
        runs.append((drawn, losses, ranks[0]["counters"], ranks[0]["weights"]))
    (drawn, losses, counters, weights), (drawn2, losses2, counters2, weights2) = runs
    assert [len(part) for part in drawn] == [24 - before % 24, 24, 24, 24, 24, 0]
    assert drawn == drawn2 and counters == counters2
    assert losses2 == pytest.approx(losses, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(weights2[name], value, rtol=1e-4, atol=2e-5)


def halves(group: Group, folder: str, load: bool) -> dict[str, Tensor]:
    """One rank takes the two halves of a batch one after the other, two ranks take one each."""
    config = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    config |= {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    engine = zs_engine.initialize(model=Uneven(), mesh=group, config=config)[0]

    def run(first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).split(2)
            for part in x if group.size == 1 else [x[group.rank]]:
                engine.backward(engine(part).square().mean())
                engine.step()

    if load:
        engine.load_checkpoint(folder)
    else:
        run(0, 3)
        engine.save_checkpoint(folder)
    run(3, 7)
    return zs_zero.full_state_dict(engine.module)


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1)])
def test_two_micro_steps_are_two_ranks_bitwise(saved: int, loaded: int, tmp_path: Path) -> None:
    wanted = run_ranks(halves, saved, str(tmp_path), False)[0]
    got = run_ranks(halves, loaded, str(tmp_path), True)[0]
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


# -- plain torch and sharded state load one another's -----------------------------------------------------------------


def from_plain(group: Group, folder: str) -> list[str]:
    """Plain torch's checkpoint into stage 3, and that one's back into plain torch."""
    plain = Uneven()
    client = torch.optim.AdamW(plain.parameters(), lr=0.03)
    backward(plain, Group.single(), 0)
    client.step()
    if group.rank == 0:
        zs_ckpt.save(f"{folder}/plain", {"model": plain, "optimizer": client}, group=Group.single())
    barrier(group)
    model, optimizer = sharded(group, 3, bf16=False)
    zs_ckpt.load(f"{folder}/plain", {"model": model, "optimizer": optimizer}, group=group)
    zs_ckpt.save(f"{folder}/sharded", {"model": model, "optimizer": optimizer}, group=group)
    other = Uneven()
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    zs_ckpt.load(f"{folder}/sharded", {"model": other, "optimizer": again}, group=group)
    wrong = [n for n, value in plain.state_dict().items() if not torch.equal(other.state_dict()[n], value)]
    for (name, before), after in zip(plain.named_parameters(), other.parameters(), strict=True):
        if before.numel():
            states = client.state.get(before, {})
            wrong += [f"{k} {name}" for k, value in states.items() if not torch.equal(again.state[after][k], value)]
            wrong += [f"{k} {name}" for k in again.state.get(after, {}).keys() ^ states.keys()]
    return wrong + (["lr"] if again.param_groups[0]["lr"] != 0.03 else [])


def test_plain_and_sharded_are_one_format(tmp_path: Path) -> None:
    assert run_ranks(from_plain, 2, str(tmp_path)) == [[], []]
