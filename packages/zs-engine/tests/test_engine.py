"""The engine on one rank: the loop, its numbers beside plain torch, and everything clients call on it."""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm import ConfigError
from zs_engine.engine import NAMES

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def batches(count: int, size: int = 4) -> list[Tensor]:  # (size, 6)
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 6, generator=generator) for _ in range(count)]


def configuration(**more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 4, "optimizer": ADAMW} | more


def engine_of(model: nn.Module | None = None, **more: Any) -> zs_engine.Engine:
    return zs_engine.initialize(model=model or net(), config=configuration(**more))[0]


def train(engine: zs_engine.Engine, data: list[Tensor]) -> list[float]:
    losses = []
    for batch in data:
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def plain(data: list[Tensor], *, steps: int, clip: float, rates: Callable[[int], float]) -> tuple[Any, ...]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    losses, norms = [], []
    for number, batch in enumerate(data):
        loss = model(batch).square().mean()
        (loss / steps).backward()
        losses.append(loss.item())
        if (number + 1) % steps == 0:
            optimizer.param_groups[0]["lr"] = rates(number // steps)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf).item())
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms, model.state_dict()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [1, 3])
def test_numbers_are_plain_torchs(stage: int, steps: int) -> None:
    data = batches(12)
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 2, "warmup_type": "linear"}}
    engine = engine_of(
        zero_optimization={"stage": stage},
        gradient_accumulation_steps=steps,
        scheduler=schedule,
        gradient_clipping=0.05,
    )
    norms, losses = [], []
    for batch in data:
        losses += train(engine, [batch])
        if engine.was_step_applied():
            norms.append(engine.get_global_grad_norm())
    expected = plain(data, steps=steps, clip=0.05, rates=lambda step: 0.02 * min(2, max(0, step - 1)) / 2)
    assert losses == pytest.approx(expected[0], rel=1e-6)
    assert norms == pytest.approx(expected[1], rel=1e-6)
    for name, value in zs_zero.full_state_dict(engine.module).items():
        torch.testing.assert_close(value, expected[2][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 3])
def test_bitwise_without_clipping(stage: int) -> None:
    data = batches(8)
    engine = engine_of(zero_optimization={"stage": stage}, gradient_accumulation_steps=2)
    losses, norms, weights = plain(data, steps=2, clip=0.0, rates=lambda step: 0.01)
    assert train(engine, data) == losses
    assert engine.get_global_grad_norm() == pytest.approx(norms[-1], rel=1e-6)
    assert all(torch.equal(value, weights[name]) for name, value in zs_zero.full_state_dict(engine.module).items())


def test_plain_backward_divides_nothing() -> None:
    (batch,) = batches(1)
    scaled, undivided = (engine_of(gradient_accumulation_steps=2) for _ in range(2))
    for _ in range(2):
        assert scaled.backward(scaled(batch).sum()).item() == pytest.approx(scaled(batch).sum().item() / 2)
        scaled.step()
        undivided.scale(undivided(batch).sum()).backward()
        undivided.step()
    assert undivided.get_global_grad_norm() == pytest.approx(2 * scaled.get_global_grad_norm(), rel=1e-6)
    scaled.backward(scaled(batch).sum(), scale_wrt_gas=False)
    scaled.backward(scaled(batch).sum(), scale_wrt_gas=False)
    scaled.set_gradient_accumulation_boundary(True)
    scaled.step()


def test_retained_graphs() -> None:
    engine = engine_of()
    loss = engine(batches(1)[0]).sum()
    engine.backward(loss, retain_graph=True)
    engine.backward(loss)
    engine.step()
    assert engine.global_steps == 1


def test_boundaries_and_counters() -> None:
    engine = engine_of(gradient_accumulation_steps=3)
    applied = []
    for batch in batches(7):
        applied.append(engine.is_gradient_accumulation_boundary())
        train(engine, [batch])
        assert engine.was_step_applied() is applied[-1]
    assert applied == [False, False, True, False, False, True, False]
    assert (engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps) == (7, 2, 24, 0)


def test_the_caller_decides_the_boundary() -> None:
    engine = engine_of(gradient_accumulation_steps=8)
    for number, batch in enumerate(batches(4)):
        engine.set_gradient_accumulation_boundary(is_boundary=number % 2 == 1)
        train(engine, [batch])
    assert engine.global_steps == 2
    engine.set_gradient_accumulation_boundary(None)
    assert not engine.is_gradient_accumulation_boundary()
    unmanaged = engine_of(gradient_accumulation_steps=8, managed_gradient_accumulation=False)
    train(unmanaged, batches(3))
    assert unmanaged.global_steps == 3


def test_zero_grad_drops_the_window() -> None:
    engine, other = engine_of(gradient_accumulation_steps=2), engine_of(gradient_accumulation_steps=2)
    first, second, third = batches(3)
    engine.backward(engine(first).sum())
    engine.zero_grad()
    train(engine, [second, third])
    train(other, [second, third])
    assert engine.get_global_grad_norm() == other.get_global_grad_norm()


def test_no_sync_is_a_context() -> None:
    engine = engine_of(zero_optimization={"stage": 1}, gradient_accumulation_steps=2)
    first, second = batches(2)
    with engine.no_sync():
        engine.backward(engine(first).square().mean())
    engine.step()
    train(engine, [second])
    assert engine.global_steps == 1


def test_the_returned_objects_can_be_driven_alone() -> None:
    schedule = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    engine, optimizer, _, scheduler = zs_engine.initialize(model=net(), config=configuration(scheduler=schedule))
    assert optimizer is engine.optimizer and scheduler is engine.lr_scheduler
    for batch in batches(2):
        engine.backward(engine(batch).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert engine.get_lr() == [0.0025]


def test_batch_size_family() -> None:
    engine = engine_of(gradient_accumulation_steps=3)
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (12, 4)
    engine.set_train_batch_size(20)
    assert engine.get_batch_info() == (20, 4, 5) and engine.gradient_accumulation_steps() == 5
    engine.set_train_micro_batch_size(2)
    assert engine.get_batch_info() == (10, 2, 5)
    with pytest.raises(ConfigError, match=r"train_batch_size\(7\) !="):
        engine.set_train_batch_size(7)


def test_rates() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "type": "tail"}]
    engine = zs_engine.initialize(model=model, model_parameters=groups, config=configuration())[0]
    assert engine.get_lr() == [0.1, 0.01]
    assert engine.get_mom() == [(0.9, 0.999)] * 2
    assert engine.get_type() == [None, "tail"]
    engine.set_lr(0.5)
    assert engine.get_lr() == [0.5, 0.5]
    engine.set_lr([0.1, 0.2])
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.1, 0.2]
    sgd = engine_of(optimizer={"type": "SGD", "params": {"momentum": 0.9}})
    assert sgd.get_mom() == [0.9]


def test_bf16() -> None:
    engine = engine_of(zero_optimization={"stage": 2}, bf16={"enabled": True})
    assert engine.bfloat16_enabled() and not engine.fp16_enabled()
    data = [batch.bfloat16() for batch in batches(20)]
    losses = train(engine, data)
    assert {param.dtype for param in engine.parameters()} == {torch.bfloat16}
    assert losses[-1] < losses[0]


def test_options_reach_the_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = zs_zero.shard

    def shard(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return real(*args, **options)

    monkeypatch.setattr(zs_zero, "shard", shard)
    engine_of(
        zero_optimization={"stage": 2, "stage3_prefetch_bucket_size": 0},
        bf16={"enabled": True},
        communication_data_type="fp32",
        prescale_gradients=True,
        gradient_predivide_factor=2,
        zero_allow_untested_optimizer=True,
    )
    assert (seen["stage"], seen["prefetch"], seen["dtype"]) == (2, False, torch.bfloat16)
    assert (seen["reduce_dtype"], seen["prescale"], seen["predivide_factor"]) == (torch.float32, True, 2.0)
    assert seen["allow_untested_optimizer"] is True


def test_two_engines_share_nothing() -> None:
    first, second, alone = (
        engine_of(zero_optimization={"stage": 3}),
        engine_of(),
        engine_of(zero_optimization={"stage": 3}),
    )
    losses = []
    for batch in batches(4):
        losses += train(first, [batch])
        train(second, [batch, batch])
    assert losses == train(alone, batches(4))
    assert (first.global_steps, second.global_steps) == (4, 8)


def test_progress_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zs_engine"):
        engine = engine_of(steps_per_print=2, gradient_clipping=1.0)
        train(engine, batches(5))
        train(engine_of(steps_per_print=float("inf"), gradient_clipping=1.0), batches(2))
    assert [line.split(":")[0] for line in caplog.messages] == ["step 2", "step 4"]


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_an_optimizer_evaluates(stage: int) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    engine, optimizer, loader, schedule = zs_engine.initialize(model=net(), config=config)
    assert (optimizer, loader, schedule) == (None, None, None)
    engine.eval()
    (batch,) = batches(1)
    with torch.no_grad():
        assert torch.equal(engine(batch), net()(batch))
    assert engine.get_lr() == [] and engine.get_global_grad_norm() is None
    with pytest.raises(ConfigError, match="the engine has no optimizer"):
        engine.step()
    with engine.no_sync():
        pass


def test_train_and_eval_reach_the_module() -> None:
    engine = engine_of()
    assert engine.eval() is engine and not engine.module.training
    assert engine.train() is engine and engine.module.training


# -- the ways to call initialize --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["config", "path", "config_params", "namespace", "mapping", "zs_config"])
def test_where_the_configuration_comes_from(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(configuration()))
    call: dict[str, Any] = {
        "config": {"config": configuration()},
        "path": {"config": file},
        "config_params": {"config_params": configuration()},
        "namespace": {"args": argparse.Namespace(deepspeed_config=str(file), local_rank=0)},
        "mapping": {"args": {"local_rank": 0, "deepspeed_config": configuration()}},
        "zs_config": {"args": argparse.Namespace(zs_config=file)},
    }[kind]
    engine = zs_engine.initialize(model=net(), **call)[0]
    assert engine.config == configuration()
    assert engine.optimizer_name() == "AdamW"


def test_the_configuration_is_given_once() -> None:
    args = argparse.Namespace(deepspeed_config="x.json")
    with pytest.raises(ConfigError, match=r"config and args\.deepspeed_config are both given"):
        zs_engine.initialize(args, net(), config=configuration())
    with pytest.raises(ConfigError, match="none is given: config, config_params"):
        zs_engine.initialize(model=net())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"mpu": object()}, "mpu is not supported: pass the data-parallel ranks as"),
        ({"model": None}, r"model should be a torch\.nn\.Module \(got NoneType\)"),
        ({"model": nn.ReLU(), "config": {"train_batch_size": 1}}, "no parameters"),
        ({"optimizer": 3}, r"optimizer should be a torch optimizer or make one \(got int\)"),
        ({"model_parameters": []}, "AdamW: optimizer got an empty parameter list"),
        ({"config": "no_such_file.json"}, "cannot read the configuration 'no_such_file.json'"),
    ],
)
def test_bad_calls(call: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        zs_engine.initialize(**({"model": net(), "config": configuration()} | call))


def test_client_optimizer_and_schedule_keep_their_identity() -> None:
    model = net()
    client = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.optim.lr_scheduler.StepLR(client, step_size=1, gamma=0.1)
    engine, optimizer, _, scheduler = zs_engine.initialize(
        model=model, optimizer=client, lr_scheduler=before, config={"train_batch_size": 4}
    )
    assert scheduler is before and optimizer.inner is client
    assert optimizer.param_groups is client.param_groups
    train(engine, batches(2))
    assert engine.get_lr() == pytest.approx([0.01])


def test_callables_make_them() -> None:
    engine, _, _, scheduler = zs_engine.initialize(
        model=net(),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        config=configuration(),
    )
    assert isinstance(scheduler, torch.optim.lr_scheduler.ExponentialLR)
    assert isinstance(engine.optimizer.inner, torch.optim.SGD)  # not the configuration's
    train(engine, batches(1))
    assert engine.get_lr() == [0.5]


class Increments:
    """A scheduler that is none of torch's."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, increment: int) -> None:
        self.steps.append(increment)


def test_lr_kwargs_reach_the_schedule_and_none_turns_it_off() -> None:
    schedule = Increments()
    engine = zs_engine.initialize(model=net(), lr_scheduler=schedule, config=configuration())[0]
    for batch in batches(2):
        engine.backward(engine(batch).sum())
        engine.step(lr_kwargs={"increment": 4})
    assert schedule.steps == [4, 4]
    engine.lr_scheduler = None
    train(engine, batches(1))
    assert schedule.steps == [4, 4]


def test_training_data() -> None:
    data = torch.arange(12)
    engine, _, loader, _ = zs_engine.initialize(
        model=net(), training_data=data, collate_fn=sum, config=configuration(dataloader_drop_last=True)
    )
    assert loader is engine.training_dataloader
    first, second = [int(batch) for batch in loader], [int(batch) for batch in loader]
    assert sum(first) == sum(second) == 66 and first != second
    other = engine.deepspeed_io(data, batch_size=5, route="eval")
    assert [batch.tolist() for batch in other] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


# -- the engine as a module -------------------------------------------------------------------------------------------


class Chatty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.config = {"hidden": 6}

    def forward(self, batch: Tensor, *rest: Any, extra: Any = None) -> Tensor:
        out: Tensor = self.layer(batch)
        return out + extra["mask"][0] if extra else out

    def generate(self) -> str:
        return "text"

    def train_batch(self) -> str:
        return "its own"


def test_unknown_attributes_are_the_modules() -> None:
    engine = engine_of(Chatty())
    assert engine.generate() == "text"
    assert engine.layer is engine.module.layer
    assert engine.train_batch() == "its own"
    assert engine.config["train_micro_batch_size_per_gpu"] == 4  # the engine's own name comes first
    engine.total_params = 3
    assert engine.total_params == 3
    with pytest.raises(AttributeError, match="'Chatty' object has no attribute 'nothing'"):
        _ = engine.nothing


@pytest.mark.parametrize("name", sorted(NAMES["later"]))
def test_names_that_are_not_there_say_so(name: str) -> None:
    with pytest.raises(AttributeError, match=f"Engine.{name}: "):
        getattr(engine_of(), name)


def test_getters() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": False}
    engine = engine_of(zero_optimization=zero, gradient_clipping=0.5, steps_per_print=7)
    assert engine.zero_optimization_stage() == 2
    assert engine.zero_optimization() and engine.zero_optimization_partition_gradients()
    assert not engine.zero_optimization_partition_weights()
    assert engine.zero_reduce_bucket_size() == 5_000_000 and engine.zero_overlap_comm() is False
    assert (engine.gradient_clipping(), engine.steps_per_print(), engine.loss_scale()) == (0.5, 7, 1.0)
    assert engine.optimizer_params() == ADAMW["params"] and engine.scheduler_name() is None
    for name in (*NAMES["getters"], *NAMES["constants"]):
        assert getattr(engine, name)() != NotImplemented, name


def test_places() -> None:
    engine = engine_of()
    assert (engine.global_rank, engine.world_size, engine.local_rank, engine.dp_world_size) == (0, 1, 0, 1)
    assert engine.device == next(engine.parameters()).device
    assert engine.data_parallel_group is None


def test_moving_an_engine() -> None:
    engine = engine_of(zero_optimization={"stage": 3})
    assert engine.to(engine.device) is engine.to(torch.float32) is engine.to(device=engine.device) is engine
    for move in (lambda: engine.to(torch.float16), lambda: engine.to("meta"), engine.double, engine.half):
        with pytest.raises(ConfigError, match=r"before initialize\(\)"):
            move()
    train(engine, batches(1))


def test_destroy_gives_the_module_back() -> None:
    engine = engine_of(zero_optimization={"stage": 3})
    train(engine, batches(2))
    weights = zs_zero.full_state_dict(engine.module)
    engine.destroy()
    alone = copy.deepcopy(engine.module)
    assert all(torch.equal(value, weights[name]) for name, value in alone.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "kwargs", "text"),
    [
        (("meta",), {}, "argument batch of forward is on meta, and the model on "),
        (("here", "here", "meta"), {"extra": None}, r"argument #2 of forward is on meta|argument rest of forward"),
        (("here",), {"extra": {"mask": ["meta"]}}, r"argument extra\['mask'\]\[0\] of forward is on meta"),
    ],
)
def test_inputs_on_another_device(inputs: tuple[str, ...], kwargs: dict[str, Any], text: str) -> None:
    engine = engine_of(Chatty())
    tensors = {"here": torch.ones(4, 6, device=engine.device), "meta": torch.ones(4, 6, device="meta")}
    values = [tensors[name] for name in inputs]
    if kwargs.get("extra"):
        kwargs = {"extra": {"mask": [torch.ones(3, device="meta")]}}
    if len(values) == 3:  # a stray input that the module never touches is nobody's error
        engine(*values)
        return
    with pytest.raises(ConfigError, match=text):
        engine(*values, **kwargs)


def test_other_errors_of_a_forward_stay_what_they_are() -> None:
    engine = engine_of()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine(torch.ones(4, 5, device=engine.device))
