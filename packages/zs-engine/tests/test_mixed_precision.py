"""`fp16`, `torch_autocast` and `bf16.check_grad_overflow` in the engine's loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
from torch import Tensor, nn
from zs_ckpt.importing import loss_scale_of
from zs_comm import ConfigError, Group
from zs_comm.testing import run_ranks
from zs_zero import DynamicLossScale

FP16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x.to(self.inner.weight.dtype)).tanh())


def engine_of(group: Group | None = None, *, accumulate: int = 1, **more: Any) -> zs_engine.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.005, "warmup_max_lr": 0.01, "warmup_num_steps": 20},
        },
    }
    return zs_engine.initialize(model=Net(), mesh=group, config=config | more)[0]


def batch(step: int, rank: int = 0, *, bad: bool = False) -> Tensor:  # (2, 6)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(10 * step + rank))
    return x.index_fill(0, torch.tensor([0]), torch.inf) if bad else x


def loss_of(engine: zs_engine.Engine, x: Tensor) -> Tensor:
    return engine(x).float().square().mean()


def weights(engine: zs_engine.Engine) -> list[Tensor]:
    return [engine.zero.full_param(param) for param in engine.module.parameters()]


def counted(group: Group | None, stage: int, section: dict[str, Any]) -> list[tuple[Any, ...]]:
    engine = engine_of(group, zero_optimization={"stage": stage}, **section)
    rank, seen = group.rank if group else 0, []
    for step in range(6):
        before = weights(engine)
        engine.backward(loss_of(engine, batch(step, rank, bad=step == 2 and rank == 0)))
        engine.step()
        moved = not all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
        rate = engine.lr_scheduler.last_batch_iteration
        seen.append((engine.was_step_applied(), moved, engine.skipped_steps, engine.global_steps, rate))
        seen[-1] += (engine.loss_scale(), engine.optimizer.overflow)
    return seen


def expected(scales: list[float]) -> list[tuple[Any, ...]]:
    """Step 2 is skipped and counted; the schedule stands still in it, as DeepSpeed's does."""
    rows = []
    for step, scale in enumerate(scales):
        skipped = step == 2
        rows.append((not skipped, not skipped, int(step >= 2), step + 1, step - (step >= 2), scale, skipped))
    return rows


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_skips_and_counts(stage: int, world: int) -> None:
    rows = run_ranks(counted, world, stage, {"fp16": FP16}) if world > 1 else [counted(None, stage, {"fp16": FP16})]
    assert rows == [expected([256.0, 256.0, 128.0, 128.0, 128.0, 128.0])] * world


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_checks_at_every_stage(stage: int) -> None:
    assert counted(None, stage, {"bf16": {"enabled": True}}) == expected([1.0] * 6)
    taken = counted(None, stage, {"bf16": {"enabled": True, "check_grad_overflow": False}})
    assert [row[0] for row in taken] == [True] * 6
    assert taken[-1][2] == 0
    assert [row[4] for row in taken] == [0, 1, 2, 3, 4, 5]


def test_fp32_takes_every_step_as_torch_does() -> None:
    assert [row[0] for row in counted(None, 1, {})] == [True] * 6


def test_autocast_in_fp16_scales_the_loss() -> None:
    rows = counted(None, 1, {"torch_autocast": {"enabled": True, "dtype": "float16"}})
    assert rows == expected([65536.0, 65536.0, *[32768.0] * 4])


def test_backward_scales_and_returns_the_unscaled_loss() -> None:
    engine = engine_of(accumulate=4, fp16=FP16)
    loss = loss_of(engine, batch(0))
    returned = engine.backward(loss)
    assert torch.equal(returned, loss / 4)
    assert torch.equal(engine.scale(loss), loss * 256)


@pytest.mark.parametrize("section", [{}, {"fp16": FP16}, {"bf16": {"enabled": True}}], ids=["fp32", "fp16", "bf16"])
def test_a_backward_of_the_users_own(section: dict[str, Any]) -> None:
    ends = []
    for own in (False, True):
        engine = engine_of(accumulate=2, zero_optimization={"stage": 2}, **section)
        for step in range(8):
            loss = loss_of(engine, batch(step, bad=bool(section) and step == 4))
            if own:
                engine.scale(loss / 2).backward()
            else:
                engine.backward(loss)
            engine.step()
        ends.append(
            ([engine.get_lr(), engine.loss_scale(), engine.skipped_steps, engine.global_steps], weights(engine))
        )
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_a_plain_backward_is_refused_where_the_loss_is_to_be_scaled() -> None:
    engine = engine_of(fp16=FP16)
    with pytest.raises(ConfigError, match=r"engine\.scale\(loss\)\.backward\(\)"):
        loss_of(engine, batch(0)).backward()
    engine.optimizer.abort_step()
    engine.backward(loss_of(engine, batch(0)))
    engine.step()
    assert engine.was_step_applied()


def test_norm_and_clipping_are_in_the_units_of_the_loss() -> None:
    norms = {}
    for name, section in {"fp32": {}, "fp16": {"fp16": FP16}}.items():
        engine = engine_of(gradient_clipping=0.01, **section)
        engine.backward(loss_of(engine, batch(0)))
        engine.step()
        norms[name] = engine.get_global_grad_norm()
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=2e-3)


def test_a_static_scale_of_the_configuration() -> None:
    engine = engine_of(fp16={"enabled": True, "loss_scale": 32, "min_loss_scale": 0})
    assert (engine.loss_scale(), engine.dynamic_loss_scale(), engine.initial_dynamic_scale()) == (32.0, False, 32.0)
    engine.backward(loss_of(engine, batch(0, bad=True)))
    engine.step()
    assert (engine.loss_scale(), engine.skipped_steps) == (32.0, 1)


def test_what_the_engine_says_of_its_precision() -> None:
    engine = engine_of(fp16=FP16 | {"auto_cast": True})
    assert (engine.fp16_enabled(), engine.fp16_auto_cast(), engine.bfloat16_enabled()) == (True, True, False)
    assert (engine.loss_scale(), engine.dynamic_loss_scale(), engine.initial_dynamic_scale()) == (256.0, True, 256.0)
    assert (engine.torch_autocast_enabled(), engine.torch_autocast_dtype()) == (False, None)
    plain = engine_of()
    assert (plain.fp16_enabled(), plain.loss_scale(), plain.dynamic_loss_scale()) == (False, 1.0, False)


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", "bfloat16"])
def test_autocast_beside_bf16_parameters(name: str) -> None:
    """Both sections at once is a combination that DeepSpeed's examples use."""
    engine = engine_of(bf16={"enabled": True}, torch_autocast={"enabled": True, "dtype": name})
    assert engine.torch_autocast_dtype() == torch.bfloat16
    assert engine.module.inner.weight.dtype == torch.bfloat16
    engine.backward(loss_of(engine, batch(0)))
    engine.step()
    assert engine.was_step_applied()


def test_autocast_runs_the_forward_in_its_dtype() -> None:
    engine = engine_of(torch_autocast={"enabled": True, "dtype": "bf16"})
    assert engine(batch(0)).dtype == torch.bfloat16
    assert engine.module.inner.weight.dtype == torch.float32
    assert engine.loss_scale() == 1.0


def test_inputs_are_cast_where_asked_for() -> None:
    class Strict(Net):
        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            if (x.dtype, mask.dtype) != (torch.float16, torch.bool):
                raise TypeError(f"{x.dtype} {mask.dtype}")
            return self.outer(self.inner(x))

    config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine = zs_engine.initialize(model=Strict(), config=config | {"fp16": {"enabled": True, "auto_cast": True}})[0]
    assert engine(batch(0), mask=torch.ones(2, dtype=torch.bool)).dtype == torch.float16


def stuck(group: Group, ask: bool) -> list[Any]:
    section = {"enabled": True, "initial_scale_power": 1, "hysteresis": 1}
    engine = engine_of(group, fp16=section, zs_raise_at_min_loss_scale=ask)
    for step in range(4):
        engine.backward(loss_of(engine, batch(step, group.rank, bad=group.rank == 1)))
        try:
            engine.step()
        except RuntimeError as error:
            return [step, type(error).__name__, engine.loss_scale()]
    return [engine.skipped_steps, engine.loss_scale()]


@pytest.mark.parametrize(("ask", "end"), [(False, [4, 1.0]), (True, [1, "LossScaleError", 1.0])])
def test_the_smallest_scale_raises_only_where_asked_for(ask: bool, end: list[Any]) -> None:
    assert run_ranks(stuck, 2, ask) == [end, end]


# -- resuming ---------------------------------------------------------------------------------------------------------


def resumed(group: Group, folder: str, stage: int, resume: bool) -> tuple[Any, ...]:
    """Seven windows of two; the checkpoint is taken after the first backward of the fourth."""
    engine = engine_of(group, accumulate=2, fp16=FP16, zero_optimization={"stage": stage}, gradient_clipping=1.0)
    begin = 0
    if resume:
        engine.load_checkpoint(folder)
        begin = engine.micro_steps
    seen = []
    for micro in range(begin, 14):
        engine.backward(loss_of(engine, batch(micro, group.rank, bad=micro == 3 and group.rank == 1)))
        engine.step()
        if micro == 6 and not resume:
            engine.save_checkpoint(folder)
        if micro > 6:
            seen.append((engine.loss_scale(), engine.skipped_steps, engine.get_lr(), engine.get_global_grad_norm()))
    return seen, weights(engine)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_resumes_inside_a_window(stage: int, tmp_path: Path) -> None:
    through = run_ranks(resumed, 2, str(tmp_path), stage, False)
    again = run_ranks(resumed, 2, str(tmp_path), stage, True)
    for (seen, end), (seen_again, end_again) in zip(through, again, strict=True):
        assert seen == seen_again
        assert all(torch.equal(a, b) for a, b in zip(end, end_again, strict=True))
    assert {row[0] for row in again[0][0]} == {128.0, 256.0}, "the scale did not grow after the resume"
    assert again[0][0][-1][1] == 1


ROWS = json.loads((Path(__file__).parents[2] / "zs-zero/tests/tables/loss_scales.json").read_text("utf-8"))


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["delayed_shift"] == 1], ids=lambda row: f"{row['min_scale']}"
)
def test_the_scaler_of_a_deepspeed_checkpoint_goes_on(row: dict[str, Any]) -> None:
    for done in (0, 5, 60, 100):
        scaler = {
            "cur_scale": 2.0 ** row["powers"][done],
            "cur_iter": done,
            "last_overflow_iter": row["overflows"].rfind("x", 0, done),
            "cur_hysteresis": 1,
        }
        scale = DynamicLossScale(window=row["scale_window"], hysteresis=1, minimum=row["min_scale"])
        scale.load_state_dict(loss_scale_of(scaler))
        values = []
        for step in row["overflows"][done:]:
            values.append(scale.value)
            scale.update(step == "x")
        assert values == [2.0**power for power in row["powers"][done:]]
    assert loss_scale_of({"cur_scale": 1.0, "dynamic": False}) == loss_scale_of(None) == {}


# -- the loss, and what becomes of it ---------------------------------------------------------------------------------


def static(**more: Any) -> zs_engine.Engine:
    return engine_of(fp16={"enabled": True, "loss_scale": 128}, **more)


def norm_of(engine: zs_engine.Engine) -> float:
    engine.step()
    norm = engine.get_global_grad_norm()
    assert norm is not None
    return norm


def test_a_loss_is_scaled_once() -> None:
    engine, x = static(), batch(0)
    engine.backward(loss_of(engine, x))
    right = norm_of(engine)
    engine = static()
    scaled = engine.scale(loss_of(engine, x))
    for twice in (scaled, scaled / 2, scaled + loss_of(engine, x)):
        with pytest.raises(ConfigError, match="scaled already, or a part of it"):
            engine.backward(twice)
        with pytest.raises(ConfigError, match="scaled already, or a part of it"):
            engine.scale(twice)
    scaled.backward()  # nothing was spoiled
    assert norm_of(engine) == right


def test_several_scaled_losses_are_added() -> None:
    engine, x = static(), batch(0)
    engine.backward(3 * loss_of(engine, x))
    right = norm_of(engine)
    engine = static()
    first, second = engine.scale(loss_of(engine, x)), engine.scale(2 * loss_of(engine, x))
    (first + second).backward()
    assert norm_of(engine) == pytest.approx(right, rel=1e-3)
    engine = static()
    kept = engine.scale(loss_of(engine, x))
    kept.backward(retain_graph=True)
    engine.backward(2 * loss_of(engine, x))  # a loss that had its backward is in nobody's way
    assert norm_of(engine) == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("section", [{}, {"fp16": FP16}, {"steps_per_print": 1}], ids=["fp32", "fp16", "printing"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_no_loss(section: dict[str, Any], accumulate: int) -> None:
    engine = engine_of(accumulate=accumulate, **section)
    for loss, name in ((None, "NoneType"), ((torch.zeros(1),), "tuple"), (1.5, "float")):
        with pytest.raises(ConfigError, match=rf"a loss should be a tensor .*\(got {name}\)"):
            engine.backward(loss)
        with pytest.raises(ConfigError, match=name):
            engine.scale(loss)
    for step in range(accumulate):
        engine.backward(loss_of(engine, batch(step)))
        engine.step()
    assert engine.global_steps == 1


@pytest.mark.parametrize("made", [None, "adam", 3])
def test_a_callable_that_makes_no_optimizer(made: Any) -> None:
    with pytest.raises(ConfigError, match=rf"make a torch optimizer .*it returned {made!r}"):
        zs_engine.initialize(model=Net(), optimizer=lambda _: made, config={"train_batch_size": 2})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_that_raises_is_counted(accumulate: int) -> None:
    config = {"fp16": {"enabled": True, "initial_scale_power": 0, "hysteresis": 1}, "zs_raise_at_min_loss_scale": True}
    engine = engine_of(accumulate=accumulate, **config)

    def micro_step(number: int, *, bad: bool = False) -> None:
        engine.backward(loss_of(engine, batch(number, bad=bad)))
        engine.step()

    for number in range(accumulate - 1):
        micro_step(number)
    with pytest.raises(RuntimeError, match="smallest loss scale, 1"):
        micro_step(1, bad=True)
    assert (engine.was_step_applied(), engine.optimizer.overflow, engine.window_steps) == (False, True, 0)
    assert engine.lr_scheduler.last_batch_iteration == -1
    for number in range(accumulate):
        assert engine.global_steps == 1
        micro_step(number)
    assert engine.was_step_applied()
    assert (engine.skipped_steps, engine.global_steps, engine.micro_steps) == (1, 2, 2 * accumulate)
    assert engine.global_samples == 2 * 2 * accumulate


# -- bad configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"fp16": FP16 | {"loss_scale": -1}}, "fp16.loss_scale: .*greater than or equal to 0"),
        ({"fp16": FP16 | {"loss_scale": True}}, "fp16.loss_scale: .*number"),
        ({"fp16": FP16 | {"loss_scale": float("inf")}}, "fp16.loss_scale: .*finite"),
        ({"fp16": FP16 | {"loss_scale_window": 0}}, "fp16.loss_scale_window: .*greater than or equal to 1"),
        ({"fp16": FP16 | {"hysteresis": 0}}, "fp16.hysteresis"),
        ({"fp16": FP16 | {"min_loss_scale": 0}}, r"fp16.min_loss_scale: .*above 0 \(got 0\)"),
        ({"fp16": FP16 | {"min_loss_scale": 1024}}, "fp16.min_loss_scale .*fp16.initial_scale_power is 8"),
        ({"fp16": FP16 | {"initial_scale_powr": 8}}, "initial_scale_powr: unknown key.*initial_scale_power"),
        ({"fp16": FP16 | {"fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads: .*fp32"),
        ({"fp16": FP16, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are both true"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp8"}}, "torch_autocast.dtype"),
        (
            {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Liner"]}},
            r"torch_autocast.lower_precision_safe_modules\[0\]: .*torch.nn.Liner",
        ),
        ({"zs_raise_at_min_loss_scale": 1}, "zs_raise_at_min_loss_scale"),
        (
            {"fp16": FP16, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            "torch_autocast.dtype: bf16, and fp16.enabled makes the model fp16",
        ),
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "fp16"}},
            "torch_autocast.dtype: fp16, and bf16.enabled makes the model bf16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        engine_of(**section)
