"""The engine's checkpoint calls: what they take, give back and refuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_ckpt
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm import CommError, ConfigError, Group, RankDisagreement, ZsError
from zs_comm.testing import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 9}},
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 12), nn.Linear(12, 3))
    model[2].requires_grad_(False)
    return model


def engine_of(group: Group | None = None, model: nn.Module | None = None, **more: Any) -> zs_engine.Engine:
    group = Group.single() if group is None else group
    return zs_engine.initialize(model=net() if model is None else model, mesh=group, config=CONFIG | more)[0]


def train(engine: zs_engine.Engine, steps: int = 2) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        engine.backward(engine(torch.randn(4, 6)).square().mean())
        engine.step()


def weights(engine: zs_engine.Engine) -> dict[str, Tensor]:
    return zs_zero.full_state_dict(engine.module)


def same(here: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_nothing_saved_is_nothing_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of()
    for folder in (tmp_path, tmp_path / "nowhere"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert engine.load_checkpoint(folder) == (None, None)
        assert len(caplog.records) == 1
    with pytest.raises(zs_ckpt.CheckpointIncomplete, match="mine"):
        engine.load_checkpoint(tmp_path, tag="mine")


def test_tags_and_client_state(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine)
    assert engine.save_checkpoint(tmp_path) is True
    train(engine)
    assert engine.save_checkpoint(str(tmp_path), "mine", {"epoch": 3, "best": (float("inf"), b"x")})
    assert engine.save_checkpoint(tmp_path, "other", {"epoch": 4}, save_latest=False)  # found by its name only
    assert (tmp_path / "global_step2").is_dir() and (tmp_path / "mine").is_dir() and (tmp_path / "other").is_dir()
    other = engine_of()
    assert other.load_checkpoint(tmp_path) == (str(tmp_path / "mine"), {"epoch": 3, "best": (float("inf"), b"x")})
    assert (other.global_steps, other.micro_steps, other.global_samples) == (4, 4, 16)
    assert same(weights(other), weights(engine))
    path, client = other.load_checkpoint(tmp_path, "global_step2")
    assert (path, client, other.global_steps) == (str(tmp_path / "global_step2"), {}, 2)
    assert other.get_lr() != engine.get_lr()


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine)
    engine.save_checkpoint(tmp_path)
    module_only = engine_of()
    train(module_only, 1)
    module_only.load_checkpoint(tmp_path, load_module_only=True)
    assert same(weights(module_only), weights(engine))
    assert module_only.global_steps == 1 and module_only.get_lr() != engine.get_lr()

    fresh = engine_of()
    param = next(fresh.module.parameters())
    fresh.load_checkpoint(tmp_path, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert fresh.global_steps == 2 and fresh.optimizer.full_state(param, "exp_avg") is None
    assert fresh.lr_scheduler.last_batch_iteration == -1

    evaluating = zs_engine.initialize(model=net(), mesh=Group.single(), config={"train_batch_size": 1})[0]
    evaluating.load_checkpoint(tmp_path)
    assert same(weights(evaluating), weights(engine))


def test_strict(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine)
    engine.save_checkpoint(tmp_path)
    torch.manual_seed(1)
    other = engine_of(model=nn.Sequential(*net(), nn.Linear(3, 3)))
    before = weights(other)
    with pytest.raises(ConfigError, match=r"4\.weight: missing; 4\.bias: missing"):
        other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert same(weights(other), before)
    other.load_checkpoint(tmp_path, load_module_strict=False, load_optimizer_states=False)
    assert torch.equal(weights(other)["0.weight"], weights(engine)["0.weight"])
    assert torch.equal(weights(other)["4.weight"], before["4.weight"])
    wider = engine_of(model=nn.Sequential(nn.Linear(6, 13)))
    with pytest.raises(ConfigError, match=r"0\.weight: shape \(12, 6\), the model has \(13, 6\)"):
        wider.load_checkpoint(tmp_path, load_module_strict=False, load_optimizer_states=False)


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    assert "model/2.weight" not in zs_ckpt.read(tmp_path) and "model/0.weight" in zs_ckpt.read(tmp_path)
    other = engine_of()
    other.load_checkpoint(tmp_path)
    assert same(weights(other), weights(engine))
    assert "2.weight" not in engine.module_state_dict(exclude_frozen_parameters=True)
    assert same(engine.module_state_dict(), weights(engine))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_in_one_file(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    engine = engine_of(bf16={"enabled": True}, model=net().requires_grad_(True))
    assert engine.save_16bit_model(tmp_path / "new", name)
    path = tmp_path / "new" / name
    found = load_file(path) if name.endswith(".safetensors") else torch.load(path, weights_only=True)
    assert same(found, weights(engine)) and found["0.weight"].dtype == torch.bfloat16
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def weights_of_two(group: Group, folder: str) -> dict[str, Tensor]:
    engine = engine_of(group, zero_optimization={"stage": 3})
    assert engine.save_16bit_model(folder, "all.safetensors")
    engine.save_16bit_model(folder, "few.safetensors", exclude_frozen_parameters=True)
    train(engine, 1)
    return dict(net().state_dict())


def test_weights_of_two_ranks_in_one_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = run_ranks(weights_of_two, 2, str(tmp_path))[0]
    assert same(load_file(tmp_path / "all.safetensors"), expected)
    assert load_file(tmp_path / "few.safetensors").keys() == expected.keys() - {"2.weight", "2.bias"}


def test_a_window_that_other_sizes_cannot_finish(tmp_path: Path) -> None:
    engine = engine_of(train_micro_batch_size_per_gpu=1, train_batch_size=4)
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    other = engine_of(train_micro_batch_size_per_gpu=2, train_batch_size=4)
    before = weights(other)
    with pytest.raises(ConfigError, match="inside a window, after 1 of 4 samples"):
        other.load_checkpoint(tmp_path)
    assert same(weights(other), before)
    other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert other.micro_steps == 0


def test_micro_steps_are_kept_where_the_caller_decides(tmp_path: Path) -> None:
    engine = engine_of(train_micro_batch_size_per_gpu=1, train_batch_size=4)
    engine.set_gradient_accumulation_boundary(True)
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    other = engine_of(train_micro_batch_size_per_gpu=2, train_batch_size=4)
    other.load_checkpoint(tmp_path)
    assert (other.micro_steps, other.global_steps) == (3, 3)


def test_a_load_ends_a_torn_state(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine)
    engine.save_checkpoint(tmp_path)
    expected = weights(engine)
    engine.optimizer.torn = True
    with pytest.raises(zs_zero.TornError):
        engine.save_checkpoint(tmp_path, "torn")
    with pytest.raises(zs_zero.TornError):
        train(engine, 1)
    engine.load_checkpoint(tmp_path)
    assert same(weights(engine), expected)
    train(engine, 1)


def test_a_copy_of_the_model_is_saved_as_itself(tmp_path: Path) -> None:
    import copy

    engine = engine_of()
    average = copy.deepcopy(engine.module)
    train(engine)
    zs_ckpt.save(tmp_path, {"average": average, "model": engine.module}, group=Group.single())
    found = zs_ckpt.read(tmp_path)
    assert torch.equal(found["average/0.weight"], net()[0].weight)
    assert torch.equal(found["model/0.weight"], engine.module[0].weight)
    engine.destroy()
    assert getattr(engine.module, "__zs_shardable__", None) is None


def test_an_asynchronous_save_has_the_state_of_its_call(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine)
    expected = weights(engine)
    engine.save_checkpoint(tmp_path, "behind", asynchronous=True)
    train(engine)
    engine.save_checkpoint(tmp_path, "later", asynchronous=True)
    engine.destroy()  # waits
    other = engine_of()
    other.load_checkpoint(tmp_path, "behind")
    assert same(weights(other), expected) and other.global_steps == 2
    assert zs_ckpt.tags(tmp_path) == ["behind", "later"]


# -- two ranks --------------------------------------------------------------------------------------------------------


def own_statistics(group: Group, folder: str) -> list[str]:
    """Batch statistics differ between ranks: as many ranks get their own again."""
    engine = engine_of(group, zero_optimization={"stage": 2})
    engine(torch.randn(4, 6, generator=torch.Generator().manual_seed(group.rank)))
    engine.save_checkpoint(folder)
    wanted = engine.module[1].running_mean.clone()
    other = engine_of(group, zero_optimization={"stage": 3})
    other.load_checkpoint(folder)
    return [] if torch.equal(other.module[1].running_mean, wanted) else ["statistics"]


def test_batch_statistics(tmp_path: Path) -> None:
    assert run_ranks(own_statistics, 2, str(tmp_path)) == [[], []]
    engine = engine_of()
    engine.load_checkpoint(tmp_path)  # one rank: rank 0's
    assert torch.equal(engine.module[1].running_mean, zs_ckpt.read(tmp_path)["model/1.running_mean"])


def not_together(group: Group, folder: str) -> list[str]:
    engine = engine_of(group, zero_optimization={"stage": 2})
    found = []
    try:
        engine.save_checkpoint(folder, tag=f"mine{group.rank}")
    except RankDisagreement as error:
        found.append(str(error))
    engine.save_checkpoint(folder)
    try:
        if group.rank == 0:
            engine.save_checkpoint(folder, "alone")
        else:
            train(engine, 1)
    except (CommError, ZsError) as error:
        found.append(type(error).__name__)
    return found


def test_ranks_that_do_not_save_together_are_told(tmp_path: Path) -> None:
    for tags, alone in run_ranks(not_together, 2, str(tmp_path)):
        assert "mine0" in tags and "mine1" in tags
        assert alone in ("CommTimeout", "PeerLost", "RankDisagreement", "CommError")
    assert zs_ckpt.tags(tmp_path) == ["global_step0"]
