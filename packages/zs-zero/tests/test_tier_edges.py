"""What happens around the steps of offloaded training: schedules, hooks, values set and states moved in between.

Each training is compared with the same one in memory, bit for bit.
"""

from __future__ import annotations

import copy
import mmap
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zs_zero
from torch import Tensor, nn
from zs_comm import ConfigError
from zs_zero import TornError, norm
from zs_zero.flat_gradients import FlatGradients
from zs_zero.testing import Fault

sys.path.insert(0, str(Path(__file__).parent))

from tier_fault_runs import differing
from tier_records import AWAY, BLOCK, NUMEL, STATES, WIDTH, Training, adamw, layers, writes

B16, F32 = torch.bfloat16, torch.float32
WRITES = NUMEL // BLOCK  # of one region of every block
GIB = 1 << 30

Options = Mapping[str, Any]
CPU: Options = {"offload_optimizer": {"device": "cpu", "zs_block_numel": BLOCK}}
FILES: Options = {"offload_optimizer": STATES}
GRADIENTS: Options = {"offload_optimizer": {**STATES, "zs_gradients": "nvme"}}
EVERYTHING: Options = {**GRADIENTS, "offload_param": AWAY}
PARAMETERS: Options = {**FILES, "offload_param": AWAY}
EARLY: Options = {"offload_optimizer": {**STATES, "zs_early_update": True}}
EARLY_EVERYTHING: Options = {"offload_optimizer": {**GRADIENTS["offload_optimizer"], "zs_early_update": True},
                             "offload_param": AWAY}  # fmt: skip
TIERS: Mapping[str, Options] = {"cpu": CPU, "files": FILES, "gradients": GRADIENTS, "everything": EVERYTHING,
                                "early": EARLY}  # fmt: skip
NAMED = {"argvalues": list(TIERS.values()), "ids": list(TIERS)}


def cast(dtype: torch.dtype) -> dict[str, Any]:
    return {} if dtype == F32 else {"dtype": dtype}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def rmsprop(params: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=1e-3, momentum=0.9)


def plain_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def done(training: Training) -> dict[str, Tensor]:
    found = training.values()
    training.close()
    return found


def inputs(training: Training, seed: int = 7) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed)).to(training.dtype)


# -- what a client did to its optimizer before -------------------------------------------------------------------------
@pytest.mark.parametrize("options", [FILES, EVERYTHING], ids=["files", "everything"])
@pytest.mark.parametrize("kind", [adamw, plain_adamw])
def test_a_schedule_of_before(kind: Callable[[Any], Any], options: Options, tmp_path: Path) -> None:
    """It wraps the client's step; there are gradients, which no trial of the step may use."""

    def trained(**given: Any) -> dict[str, Tensor]:
        model, schedules = layers(), list[Any]()
        model(torch.ones(1, WIDTH)).sum().backward()
        weights = [param.detach().clone() for param in model.parameters()]

        def client(params: Any) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = kind(params)
            schedules.append(torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step)))
            return made

        training = Training(tmp_path, model=model, client=client, **given)
        for param, before in zip(model.parameters(), weights, strict=True):
            assert torch.equal(training.optimizer.full_param(param), before)
        if given:
            assert training.optimizer.offload_report().resident == 0.0, "the states were found"
        training.optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(3):
                training.steps(1, start=step)
                schedules[0].step()
        if given:
            assert training.optimizer.offload_report().written["optimizer"] > 0
        return done(training)

    assert not differing(trained(**options), trained())


# -- values that change while units are read ahead ---------------------------------------------------------------------
def set_whole(training: Training, param: nn.Parameter, value: Tensor) -> None:
    training.optimizer.set_full_param(param, value)


def set_own_part(training: Training, param: nn.Parameter, value: Tensor) -> None:
    training.optimizer.set_local_param(param, value.view(-1)[training.optimizer.local_slice(param)])


def load_all(training: Training, param: nn.Parameter, value: Tensor) -> None:
    state = {name: one.clone() for name, one in zs_zero.full_state_dict(training.model).items()}
    name = next(name for name, one in training.model.named_parameters() if one is param)
    state[name] = value.to(state[name].dtype)
    with torch.no_grad():
        for _ in range(2):
            training.model(inputs(training))
    zs_zero.load_full_state_dict(training.model, state)


def write_gathered(training: Training, param: nn.Parameter, value: Tensor) -> None:
    with zs_zero.gathered(param), torch.no_grad():
        param.copy_(value)


SETTERS = [set_whole, set_own_part, load_all, write_gathered]


@pytest.mark.parametrize("set_value", SETTERS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
def test_a_value_that_is_set_between_evaluations(
    dtype: torch.dtype, set_value: Callable[[Training, nn.Parameter, Tensor], None], tmp_path: Path
) -> None:
    def evaluated(**options: Any) -> dict[str, Tensor]:
        training = Training(tmp_path, **cast(dtype), **options).steps(1)
        outputs = []
        with torch.no_grad():
            for param in training.model.parameters():
                outputs += [training.model(inputs(training)).clone() for _ in range(2)]
                if options:
                    states = {flat.state.name for flat in training.optimizer._runtime.flats}
                    assert "READING" in states, "units are under way"
                set_value(training, param, torch.linspace(-1, 1, param.numel() or WIDTH * WIDTH).view(WIDTH, WIDTH))
                outputs += [training.model(inputs(training)).clone() for _ in range(2)]
                assert torch.equal(outputs[-1], outputs[-2]) and not torch.equal(outputs[-2], outputs[-3])
        training.steps(2, start=1)
        return done(training) | {f"output {number}": one for number, one in enumerate(outputs)}

    assert not differing(evaluated(**PARAMETERS), evaluated())


# -- early updates -----------------------------------------------------------------------------------------------------
def gradients_away(training: Training, seed: int) -> None:
    training.backward(seed)
    training.optimizer.offload_states(include=["lp_grads"])
    training.backward(seed + 100)
    training.optimizer.reload_states()
    training.update()


def states_away(training: Training, seed: int) -> None:
    training.optimizer.offload_states(include=["optim_states"])
    training.backward(seed)
    training.optimizer.reload_states()
    training.update()


@pytest.mark.parametrize("scene", [gradients_away, states_away])
@pytest.mark.parametrize("options", [EARLY, EARLY_EVERYTHING], ids=["states", "everything"])
def test_states_that_move_around_an_early_update(
    options: Options, scene: Callable[[Training, int], None], tmp_path: Path
) -> None:
    found = []
    for given in (options, {"stage": 2}):
        training = Training(tmp_path, **given)
        for seed in range(3):
            scene(training, seed)
        training.steps(2, start=3)
        found.append(done(training))
    assert not differing(*found)


@pytest.mark.parametrize(
    ("client", "changes"),
    [(rmsprop, {"alpha": 0.5}), (rmsprop, {"momentum": 0.1}), (plain_adamw, {"betas": (0.5, 0.6)}),
     (adamw, {"betas": (0.5, 0.6)}), (adamw, {"eps": 1e-2}), (adamw, {"weight_decay": 0.5})],
)  # fmt: skip
def test_a_hyper_parameter_that_changes_after_an_early_update(
    client: Callable[[Any], Any], changes: Options, tmp_path: Path
) -> None:
    found = []
    for given in (EARLY, {"stage": 2}):
        training = Training(tmp_path, client=client, **given).steps(1)

        def changed(training: Training = training) -> None:
            training.backward(1)
            for group in training.optimizer.param_groups:
                group.update(changes)
            training.update()

        calls = training.recorded(changed)
        if given is EARLY:
            assert len(writes(calls, "optimizer", "backward")) == 2 * WRITES
            assert len(writes(calls, "optimizer", "step")) == 2 * WRITES, "and once more"
            again = training.recorded(lambda training=training: training.steps(1, start=2))  # type: ignore[misc]
            assert not writes(again, "optimizer", "step"), "the next one holds"
        else:
            training.steps(1, start=2)
        found.append(done(training))
    assert not differing(*found)


# -- gradients ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True], ids=["", "more for the first"])
def test_a_clip_before_another_units_first_gradient(again: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    def clipped(**options: Any) -> dict[str, Tensor]:
        training = Training(tmp_path, client=sgd, **cast(dtype), **options)
        for seed in range(3):
            first, second = list(training.model)[:2]  # type: ignore[arg-type]
            first(inputs(training, seed)).float().square().sum().backward()
            training.losses.append(float(training.optimizer.clip_grad_norm_(0.01)))
            for part in (second, first) if again else (second,):
                part(inputs(training, seed)).float().square().sum().backward()
            training.losses.append(float(training.optimizer.grad_norm()))
            training.update()
        return done(training)

    wanted = clipped()
    wrong = {name: differing(clipped(**options), wanted) for name, options in TIERS.items()}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_gradients_that_are_set_have_all_their_digits(factor: float, tmp_path: Path) -> None:
    """In bf16 a third of a gradient is none."""

    def trained(**options: Any) -> dict[str, Tensor]:
        training = Training(tmp_path, client=sgd, dtype=B16, **options)
        found = {}
        for seed in range(2):
            training.backward(seed)
            for number, param in enumerate(training.model.parameters()):
                grad = training.optimizer.full_grad(param)
                assert grad is not None
                training.optimizer.set_full_grad(param, grad * factor)
                found[f"gradient {seed} {number}"] = training.optimizer.full_grad(param).clone()  # type: ignore[union-attr]
            training.update()
        return done(training) | found

    wanted = trained()
    for name, options in TIERS.items():
        assert not differing(trained(**options), wanted), name


def test_the_norm_of_gradients_in_files_needs_a_piece_at_a_time(tmp_path: Path) -> None:
    training = Training(tmp_path, **GRADIENTS)
    training.backward(0)
    training.optimizer.clip_grad_norm_(1e-4)
    made, held = list[weakref.ref[Tensor]](), list[int]()
    gradient, norms_of = FlatGradients.gradient, norm.norms_of

    def noted(flat: FlatGradients, piece: Any) -> Tensor:
        found = gradient(flat, piece)
        made.append(weakref.ref(found))
        return found

    def counted(grads: Sequence[Tensor]) -> list[Tensor]:
        held.append(sum(one() is not None for one in made))
        return norms_of(grads)

    with mock.patch.object(FlatGradients, "gradient", noted), mock.patch.object(norm, "norms_of", counted):
        training.optimizer.grad_norm()
    assert len(held) > 2 and held[-1] == 0, "those that stand in memory: none"
    assert set(held[:-1]) == {1}
    training.close()


# -- calls -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", **NAMED)
def test_no_closure(options: Options, tmp_path: Path) -> None:
    training = Training(tmp_path, **options)
    with pytest.raises(ConfigError, match=r"step\(closure\)"):
        training.optimizer.step(lambda: training.backward(0))
    assert not training.optimizer.torn
    assert not differing(done(training.steps(2)), done(Training(tmp_path).steps(2)))


@pytest.mark.parametrize("client", [adamw, plain_adamw])
@pytest.mark.parametrize("options", **NAMED)
def test_a_clients_hooks_are_called_once_in_a_step(
    options: Options, client: Callable[[Any], Any], tmp_path: Path
) -> None:
    calls: list[str] = []

    def hooked(params: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = client(params)
        made.register_step_pre_hook(lambda *_: calls.append("before"))
        made.register_step_post_hook(lambda *_: calls.append("after"))
        return made

    training = Training(tmp_path, client=hooked, **options)
    assert calls == [], "not on trial"
    training.steps(3)
    assert calls == ["before", "after"] * 3
    assert not differing(done(training), done(Training(tmp_path, client=client).steps(3)))


# -- a limit of memory -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_limit_with_nothing_offloaded(stage: int, tmp_path: Path) -> None:
    terms = r"host_memory_limit cannot be met: .*masters and states [\d,.]+ (MiB|B) = .* > 1,000 B; .*[Oo]ffload more"
    with pytest.raises(ConfigError, match=terms):
        Training(tmp_path, stage=stage, host_memory_limit=1000)
    limited = Training(tmp_path, stage=stage, host_memory_limit=GIB).steps(2)
    report = limited.optimizer.offload_report()
    assert limited.optimizer.offloads and report.limit == GIB and report.resident == 1.0
    assert report.store == "memory" and 0 < report.planned_nbytes <= GIB
    free = Training(tmp_path, stage=stage).steps(2)
    assert not free.optimizer.offloads
    assert not differing(done(limited), done(free))
    assert [*tmp_path.iterdir()] == []


def test_files_that_are_mapped_are_not_what_was_allocated(tmp_path: Path) -> None:
    training = Training(tmp_path, host_memory_limit=GIB)
    path = tmp_path / "data"
    path.write_bytes(bytes(64 << 20))
    before = training.optimizer.offload_report().peak_nbytes
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        sum(content[::4096])
        peak = training.optimizer.offload_report().peak_nbytes
    if before is not None and peak is not None:
        assert peak - before < 16 << 20


# -- errors ------------------------------------------------------------------------------------------------------------
class Counted(torch.optim.Optimizer):
    """Its states are a number, a short tensor and one that is element-wise, all but the number changed in place."""

    __zs_requires__ = "elements"

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state |= {"number": 0, "short": torch.zeros(3), "momentum_buffer": torch.zeros_like(param)}
                state["number"] += 1
                state["short"].add_(torch.tensor([1.0, 2.0, 0.5]))
                state["momentum_buffer"].mul_(0.9).add_(param.grad)
                param.add_(state["momentum_buffer"], alpha=-group["lr"] / float(state["short"][0] + state["number"]))


def others(training: Training) -> list[tuple[Any, Tensor]]:
    states = [training.optimizer.inner.state[piece] for piece, _, _ in training.optimizer._owned]  # type: ignore[union-attr]
    return [(state["number"], state["short"].clone()) for state in states]


@pytest.mark.parametrize("number", [0, WRITES // 2, WRITES - 1])
@pytest.mark.parametrize("name", ["files", "everything", "early"])
def test_states_that_are_not_of_elements_come_back_after_an_error(name: str, number: int, tmp_path: Path) -> None:
    training = Training(tmp_path, client=Counted, **TIERS[name]).steps(2)
    before, values = others(training), training.values()
    store = training.stores["optimizer"]
    store.faults.append(Fault(op="write", number=store.count("write") + number))
    with pytest.raises(OSError, match="optimizer"):
        training.steps(1, start=2)
    store.faults.clear()
    training.optimizer.abort_step()
    training.losses.pop()
    assert not training.optimizer.torn
    after = others(training)
    assert [one for one, _ in after] == [one for one, _ in before] == [2] * len(before)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(after, before, strict=True))
    assert not differing(training.values(), values)
    plain = Training(tmp_path, client=Counted).steps(4)
    assert not differing(done(training.steps(2, start=2)), done(plain))


@pytest.mark.parametrize("number", [0, WRITES, 2 * WRITES - 1])
def test_loading_that_fails_half_way(number: int, tmp_path: Path) -> None:
    training = Training(tmp_path, **FILES).steps(2)
    saved = copy.deepcopy(training.optimizer.state_dict())
    weights = {name: one.clone() for name, one in zs_zero.full_state_dict(training.model, masters=True).items()}
    training.steps(1, start=50)
    training.losses.pop()
    store = training.stores["optimizer"]
    store.faults.append(Fault(op="write", number=store.count("write") + number))
    with pytest.raises(OSError, match="optimizer"):
        training.optimizer.load_state_dict(copy.deepcopy(saved))
    store.faults.clear()
    assert training.optimizer.torn
    with pytest.raises(TornError, match="load a checkpoint"):
        training.optimizer.step()
    training.optimizer.load_state_dict(saved)
    zs_zero.load_full_state_dict(training.model, weights)
    assert not training.optimizer.torn
    assert not differing(done(training.steps(2, start=2)), done(Training(tmp_path).steps(4)))
