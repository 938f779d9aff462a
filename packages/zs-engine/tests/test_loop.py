"""What the loop says and what it paces: lines, monitors, batch sizes that change, curricula, dropped layers."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
from torch import Tensor, nn
from zs_comm import ConfigError, Group, RankDisagreement
from zs_comm.testing import run_ranks

CURRICULUM = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 2,
    "max_difficulty": 12,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 2},
}
LENGTHS = [2, 4, 6, 8, 10, 12, 12, 12]


class Net(nn.Module):
    """Averages a sequence, as long as it is told, and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        self.told: list[dict[str, Any]] = []

    def forward(self, x: Tensor, **told: Any) -> Tensor:  # (batch, 12, 6)
        self.told.append(told)
        out: Tensor = self.layers(x[:, : told.get("curriculum_seqlen", 12)].mean(1))
        return out


def configuration(**more: Any) -> dict[str, Any]:
    optimizer = {"type": "AdamW", "params": {"lr": 0.01}}
    return {"train_micro_batch_size_per_gpu": 2, "optimizer": optimizer, "gradient_clipping": 1.0} | more


def engine_of(**more: Any) -> zs_engine.Engine:
    return zs_engine.initialize(model=Net(), config=configuration(**more))[0]


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 12, 6, generator=generator) for _ in range(count)]


def train(engine: zs_engine.Engine, data: list[Tensor]) -> list[float]:
    losses = []
    for batch in data:
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


class Monitor:
    def __init__(self) -> None:
        self.told: list[tuple[str, float, int]] = []

    def scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name.removeprefix("Train/Samples/"), value, step))

    def of(self, name: str) -> list[tuple[float, int]]:
        return [(value, step) for known, value, step in self.told if known == name]


# -- what it says -----------------------------------------------------------------------------------------------------


def test_progress(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zs_engine"):
        engine = engine_of(steps_per_print=2, gradient_accumulation_steps=2)
        losses = train(engine, batches(8))
    assert [line.split(":")[0] for line in caplog.messages] == ["step 2", "step 4"]
    line = caplog.messages[1]
    assert f"loss {(losses[6] + losses[7]) / 2:.6g}," in line
    assert f"gradient norm {engine.get_global_grad_norm():.4g}," in line
    assert "lr [0.01], momentum [(0.9, 0.999)]" in line
    assert "skipped 0" in line
    assert re.search(r"\d+\.\d samples/s$", line)


def test_time_breakdown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zs_engine"):
        engine = engine_of(wall_clock_breakdown=True, gradient_accumulation_steps=2)
        assert engine.get_wall_clock_timers() == {}
        train(engine, batches(4))
    assert len(caplog.messages) == 2
    for line in caplog.messages:
        assert re.fullmatch(r"time \(ms\) \| forward [\d.]+ \| backward [\d.]+ \| step [\d.]+", line)
    times = engine.get_wall_clock_timers()
    assert set(times) == {"forward", "backward", "step"} and all(took > 0 for took in times.values())
    assert len(engine.observers) == 0  # nobody watches between the phases


def test_times_of_two_engines_do_not_mix() -> None:
    group = Group.single()
    watched, other = (
        zs_engine.initialize(model=Net(), mesh=group, config=configuration(wall_clock_breakdown=on))[0]
        for on in (True, False)
    )
    (batch,) = batches(1)
    watched.backward(watched(batch).sum())
    began = dict(watched.report._time.seconds)
    train(other, [batch])
    assert dict(watched.report._time.seconds) == began


def test_memory_breakdown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zs_engine"):
        train(engine_of(memory_breakdown=True), batches(1))
    moments = [line.split(" | ")[0] for line in caplog.messages]
    assert moments == [
        f"memory {when} {what}" for what in ("forward", "backward", "step") for when in ("before", "after")
    ]
    assert all("host resident" in line and "tensors" in line for line in caplog.messages)


def test_dump_state(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zs_engine"):
        engine_of(dump_state=True, gradient_accumulation_steps=3, zero_optimization={"stage": 2})
    (text,) = caplog.messages
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if re.match(r"  \w+ +\S", line))
    assert (rows["train"], rows["micro"], rows["steps"], rows["stage"]) == ("6", "2", "3", "2")
    assert (rows["global_steps"], rows["lr"], rows["device"]) == ("0", "[0.01]", "cpu")
    assert '"dump_state": true' in text and "AdamW" in text and "1 units, 123 parameters" in text


def test_nothing_is_said_unasked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zs_engine"):
        engine = engine_of()
        train(engine, batches(2))
    assert caplog.messages == []
    assert engine.report._losses == []


# -- monitors ---------------------------------------------------------------------------------------------------------


def test_a_monitor_is_told_of_every_update() -> None:
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 2, "warmup_type": "linear"}}
    engine = engine_of(gradient_accumulation_steps=2, scheduler=schedule)
    engine.observers.add(monitor := Monitor())
    losses, norms = [], []
    for batch in batches(6):
        losses += train(engine, [batch])
        if engine.was_step_applied():
            norms.append(engine.get_global_grad_norm())
    assert [step for _, step in monitor.of("lr")] == [4, 8, 12]  # samples so far, as in DeepSpeed
    assert [value for value, _ in monitor.of("lr")] == pytest.approx([0.0, 0.01, 0.02])
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [value for value, _ in monitor.of("train_loss")] == pytest.approx(means, rel=1e-6)
    assert [value for value, _ in monitor.of("grad_norm")] == norms
    assert [value for value, _ in monitor.of("loss_scale")] == [1.0] * 3
    assert {name for name, _, _ in monitor.told} == {"lr", "train_loss", "grad_norm", "loss_scale"}


def test_a_monitor_is_told_the_loss_scale(caplog: pytest.LogCaptureFixture) -> None:
    fp16 = {"enabled": True, "auto_cast": True, "initial_scale_power": 4, "hysteresis": 1}
    with caplog.at_level(logging.INFO, "zs_engine"):
        engine = engine_of(fp16=fp16, steps_per_print=2)
        engine.observers.add(monitor := Monitor())
        first, second = batches(2)
        train(engine, [first, second * torch.inf])
    assert monitor.of("loss_scale") == [(16.0, 2), (8.0, 4)]
    assert not engine.was_step_applied()
    assert "loss scale 8, skipped 1," in caplog.messages[-1]


def test_a_monitor_is_told_the_times() -> None:
    engine = engine_of(wall_clock_breakdown=True)
    engine.observers.add(monitor := Monitor())
    train(engine, batches(2))
    for phase in ("forward", "backward", "step"):
        took = monitor.of(f"elapsed_time_ms_{phase}")
        assert len(took) == 2 and all(value > 0 for value, _ in took)


def test_a_monitor_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def scalar(self, name: str, value: float, step: int) -> None:
            raise OSError("no space")

    engine = engine_of()
    engine.observers.add(Broken())
    assert train(engine, batches(3)) == train(engine_of(), batches(3))
    assert sum("no space" in (record.exc_text or "") for record in caplog.records) == 1


# -- batch sizes ------------------------------------------------------------------------------------------------------


def test_windows_after_the_batch_size_changed() -> None:
    engine = engine_of(gradient_accumulation_steps=3)
    applied = []
    for number, batch in enumerate(batches(9)):
        if number == 3:
            engine.set_train_batch_size(4)  # two micro-steps
        if number == 7:
            engine.set_train_micro_batch_size(5)
        train(engine, [batch])
        applied.append(engine.was_step_applied())
    assert applied == [False, False, True, False, True, False, True, False, True]
    assert engine.get_batch_info() == (10, 5, 2)
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (9, 4, 6 + 4 + 4 + 10)


def test_batch_sizes_do_not_change_inside_a_window() -> None:
    engine = engine_of(gradient_accumulation_steps=2)
    train(engine, batches(1))
    for change in (engine.set_train_batch_size, engine.set_train_micro_batch_size):
        with pytest.raises(ConfigError, match="this one is at 1 micro-steps"):
            change(8)
    with pytest.raises(ConfigError, match="train_batch_size"):
        engine_of().set_train_batch_size(3)


@pytest.mark.parametrize("wrong", [0, -2, 1.5, "8", True])
def test_batch_sizes_are_whole_numbers_above_zero(wrong: Any) -> None:
    engine = engine_of(gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match=rf"^train_batch_size should be a whole number .*\(got {wrong!r}\)"):
        engine.set_train_batch_size(wrong)
    with pytest.raises(ConfigError, match=rf"^train_micro_batch_size_per_gpu should be .* at least 1 \(got {wrong!r}"):
        engine.set_train_micro_batch_size(wrong)
    assert engine.get_batch_info() == (4, 2, 2)


@pytest.mark.parametrize("managed", [True, False])
def test_batch_sizes_do_not_change_between_a_backward_and_its_step(managed: bool) -> None:
    engine = engine_of(gradient_accumulation_steps=2, managed_gradient_accumulation=managed)
    (batch,) = batches(1)
    engine.backward(engine(batch).square().mean())
    for change in (engine.set_train_batch_size, engine.set_train_micro_batch_size):
        with pytest.raises(ConfigError, match="this one is open, between a backward and its step"):
            change(8)
    engine.zero_grad()
    engine.set_train_batch_size(8)
    assert engine.get_batch_info() == (8, 2, 4)


def resized(group: Group, sizes: list[int]) -> str:
    engine = zs_engine.initialize(model=Net(), config=configuration(), mesh=group)[0]
    try:
        engine.set_train_batch_size(sizes[group.rank])
    except ConfigError as error:
        return f"{type(error).__name__}: {error}"
    except RankDisagreement as error:
        return str(error)
    return str(engine.get_batch_info().steps)


def test_all_ranks_change_to_one_batch_size() -> None:
    assert run_ranks(resized, 2, [8, 8]) == ["2", "2"]
    first, second = run_ranks(resized, 2, [8, 12])
    assert first == second
    assert re.search("the new batch sizes differs between the ranks.*train=8.*train=12", first, re.DOTALL)
    first, second = run_ranks(resized, 2, [8, 0])
    assert "rank 1 failed with ConfigError: train_batch_size should be" in first
    assert second.startswith("ConfigError: train_batch_size should be")


def one_rank_lr(group: Group, stage: int) -> tuple[str, bool, int]:
    engine = zs_engine.initialize(model=Net(), config=configuration(zero_optimization={"stage": stage}), mesh=group)[0]
    data = batches(3)
    train(engine, data[:1])
    before = [engine.zero.full_param(param) for param in engine.module.parameters()]
    if group.rank:
        engine.set_lr(0.5)
    with pytest.raises(RankDisagreement) as raised:
        train(engine, data[1:2])
    after = [engine.zero.full_param(param) for param in engine.module.parameters()]
    engine.set_lr(0.5)
    engine.step()  # nothing was lost
    return str(raised.value), all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), engine.global_steps


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_with_different_learning_rates(stage: int) -> None:
    first, second = run_ranks(one_rank_lr, 2, stage)
    assert first == second
    assert re.search("differs between the ranks.*'lr': 0.01.*'lr': 0.5", first[0], re.DOTALL)
    assert first[1:] == (True, 2)


def test_a_changed_batch_size_is_where_it_was_after_a_load(tmp_path: Path) -> None:
    engine = engine_of(gradient_accumulation_steps=3)
    data = batches(12)
    train(engine, data[:3])
    engine.set_train_batch_size(4)
    train(engine, data[3:6])  # one window and half of the next
    engine.save_checkpoint(tmp_path)
    resumed = engine_of(gradient_accumulation_steps=2)
    resumed.load_checkpoint(tmp_path)
    assert (resumed.window_steps, resumed.global_steps, resumed.global_samples) == (1, 2, 10)
    assert resumed.is_gradient_accumulation_boundary()
    assert train(resumed, data[6:10]) == train(engine, data[6:10])


def test_unmanaged_windows_count_their_own_samples() -> None:
    engine = engine_of(gradient_accumulation_steps=4, managed_gradient_accumulation=False)
    (batch,) = batches(1)
    for count in (3, 1):
        for _ in range(count):
            engine.backward(engine(batch).sum())
        engine.step()
    assert (engine.global_steps, engine.global_samples) == (2, 8)


# -- curriculum and dropped layers ------------------------------------------------------------------------------------


def test_the_model_is_told_the_length() -> None:
    engine = engine_of(curriculum_learning=CURRICULUM, gradient_accumulation_steps=2)
    losses = train(engine, batches(16))
    assert [told["curriculum_seqlen"] for told in engine.module.told] == [n for n in LENGTHS for _ in range(2)]
    assert losses[0] != train(engine_of(gradient_accumulation_steps=2), batches(1))[0]
    engine.eval()
    engine(batches(1)[0])
    assert engine.module.told[-1] == {}  # whole sequences in evaluation
    assert engine.curriculum_enabled_legacy() and not engine_of().curriculum_enabled_legacy()


def test_the_callers_own_arguments_stay() -> None:
    engine = engine_of(curriculum_learning=CURRICULUM)
    engine(batches(1)[0], more=1)
    assert engine.module.told == [{"more": 1, "curriculum_seqlen": 2}]


def test_a_custom_curriculum() -> None:
    engine = engine_of(curriculum_learning=CURRICULUM | {"schedule_type": "custom"})
    with pytest.raises(ConfigError, match="set_custom_curriculum_learning_schedule"):
        engine(batches(1)[0])
    engine.set_custom_curriculum_learning_schedule({"seqlen": lambda step: 3 * step})
    train(engine, batches(5))
    assert [told["curriculum_seqlen"] for told in engine.module.told] == [3, 6, 9, 12, 12]
    with pytest.raises(ConfigError, match="curriculum_learning is not enabled"):
        engine_of().set_custom_curriculum_learning_schedule({"seqlen": len})


def test_the_model_is_told_theta() -> None:
    engine = engine_of(progressive_layer_drop={"enabled": True, "theta": 0.5, "gamma": 0.1})
    train(engine, batches(4))
    assert all(told["progressive_layer_drop"] is True for told in engine.module.told)
    thetas = [told["pld_theta"] for told in engine.module.told]
    assert thetas == pytest.approx([1.0, 0.9524187, 0.9093654, 0.8704091], rel=1e-6)
    assert (engine.pld_enabled(), engine.pld_theta(), engine.pld_gamma()) == (True, 0.5, 0.1)


@pytest.mark.parametrize("middle", [3, 5])
def test_both_resume_from_their_state(middle: int, tmp_path: Path) -> None:
    more = {
        "curriculum_learning": CURRICULUM,
        "progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.1},
        "gradient_accumulation_steps": 2,
    }
    whole = engine_of(**more)
    expected = train(whole, batches(14))
    first = engine_of(**more)
    losses = train(first, batches(14)[:middle])
    first.save_checkpoint(tmp_path)
    second = engine_of(**more)
    second.load_checkpoint(tmp_path)
    assert second.pacing.state_dict() == first.pacing.state_dict() != engine_of(**more).pacing.state_dict()
    assert losses + train(second, batches(14)[middle:]) == expected
    assert first.module.told + second.module.told == whole.module.told


def test_the_end_of_a_custom_curriculum_is_in_the_state(tmp_path: Path) -> None:
    more = {"curriculum_learning": CURRICULUM | {"schedule_type": "custom"}}
    engines = [engine_of(**more) for _ in range(2)]
    for engine in engines:
        engine.set_custom_curriculum_learning_schedule(lambda step: 12 if step == 2 else 4)
    train(engines[0], batches(3))
    engines[0].save_checkpoint(tmp_path)
    engines[1].load_checkpoint(tmp_path)
    train(engines[1], batches(1))
    assert [told["curriculum_seqlen"] for told in engines[1].module.told] == [12]


def test_a_model_that_takes_no_such_argument() -> None:
    with pytest.raises(ConfigError, match="curriculum_learning.enabled: the forward of Linear .* curriculum_seqlen"):
        zs_engine.initialize(model=nn.Linear(6, 3), config=configuration(curriculum_learning=CURRICULUM))


def paced(group: Group, stage: int) -> list[Any]:
    config = configuration(curriculum_learning=CURRICULUM, zero_optimization={"stage": stage}, steps_per_print=1)
    config |= {"train_micro_batch_size_per_gpu": 1, "wall_clock_breakdown": True}
    engine = zs_engine.initialize(model=Net(), mesh=group, config=config)[0]
    train(engine, [batch[group.rank : group.rank + 1] for batch in batches(4)])
    return [[told["curriculum_seqlen"] for told in engine.module.told], set(engine.get_wall_clock_timers())]


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks(stage: int) -> None:
    first, second = run_ranks(paced, 2, stage)
    assert first[0] == second[0] == LENGTHS[:4]
    assert {"forward", "backward", "step"} < first[1]  # and what was waited for inside of them
    assert first[1] & {"all_gather", "reduce_scatter", "zero.gather"}
