"""States, gradients and the end of an engine: what DeepSpeed's methods of these names do."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import zs_engine
import zs_zero
from torch import Tensor, nn
from zs_comm import CollectiveLog, ConfigError, Group
from zs_comm.memory import live_tensor_nbytes
from zs_comm.testing import run_ranks

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 256}},
    "accumulates in fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.body, self.head = nn.Embedding(512, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.head(self.body(self.tok(ids)).tanh())
        return x.float().square().mean()


def engine_of(group: Group, stage: int, seed: int = 0, **more: Any) -> zs_engine.Engine:
    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.05,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
    }
    return zs_engine.initialize(model=Net(), mesh=group, config=config | more)[0]


def micro_step(engine: zs_engine.Engine, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * number + engine.global_rank)
    engine.backward(engine(torch.randint(64, (2, 4), generator=generator).to(engine.device)))
    engine.step()


def train(engine: zs_engine.Engine, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        micro_step(engine, number)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# -- the norm ---------------------------------------------------------------------------------------------------------
def norms(group: Group, precision: str) -> list[Any]:
    """Of each stage: the norm before and after the first update, and that of the gradients it was taken from."""
    found = []
    for stage in (0, 1, 2, 3):
        engine = engine_of(group, stage, **PRECISIONS[precision])
        before = engine.get_global_grad_norm()
        train(engine, 1)
        generator = torch.Generator().manual_seed(10 + engine.global_rank)
        engine.backward(engine(torch.randint(64, (2, 4), generator=generator).to(engine.device)))
        grads = [zs_zero.safe_get_full_grad(param) for param in engine.module.parameters()]
        expected = torch.cat([grad.flatten() for grad in grads if grad is not None]).double().norm().item()
        engine.step()
        found.append((before, engine.get_global_grad_norm(), expected))
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_norm_is_that_of_the_mean_gradient_before_clipping(precision: str) -> None:
    first, second = run_ranks(norms, 2, precision)
    assert first == second
    for before, norm, expected in first:
        assert before is None and norm == pytest.approx(expected, rel=1e-5) and norm > 0.05
        assert norm == pytest.approx(first[0][1], rel=2e-2 if precision != "fp32" else 1e-5)


# -- one reduction, and states elsewhere ------------------------------------------------------------------------------
def coalesced(group: Group, stage: int) -> tuple[bool, float]:
    results, sent = [], []
    for together in (False, True):
        engine = engine_of(group, stage, gradient_accumulation_steps=1)
        log = CollectiveLog()
        group.observers.add(log)
        for step in range(3):
            losses = []
            for micro in range(3):
                generator = torch.Generator().manual_seed(100 * step + 10 * micro + group.rank)
                losses.append(torch.randint(64, (2, 4), generator=generator))
            if together:
                with engine.coalesce_grad_reduction():
                    for ids in losses:
                        engine.backward(engine(ids))
            else:
                for number, ids in enumerate(losses):
                    with engine.no_sync() if number < 2 else engine.coalesce_grad_reduction():
                        engine.backward(engine(ids))
            engine.step()
        group.observers.remove(log)
        sent.append(sum(c.wire_nbytes for (op, _), c in log.counts.items() if op == "reduce_scatter"))
        results.append(zs_zero.full_state_dict(engine.module))
        assert engine.global_steps == 3 and engine.was_step_applied()
    return same(*results), sent[0] - sent[1]


def test_backwards_of_a_block_are_reduced_once() -> None:
    for stage in (1, 2, 3):
        assert run_ranks(coalesced, 2, stage) == [(True, 0)] * 2


def offloaded(group: Group, precision: str) -> list[bool]:
    found = []
    for stage in (0, 1, 2, 3):
        weights = []
        for leaves in (False, True):
            engine = engine_of(group, stage, **PRECISIONS[precision])
            for number in range(6):
                micro_step(engine, number)
                if leaves:
                    engine.offload_states(include=None, device="cpu", pin_memory=True, non_blocking=False)
                    with pytest.raises(ConfigError, match="call reload_states"):
                        engine.optimizer.grad_norm()
                    engine.reload_states()
            weights.append(zs_zero.full_state_dict(engine.module, masters=True))
        found.append(same(*weights))
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_states_leave_and_come_back(precision: str) -> None:
    assert run_ranks(offloaded, 2, precision) == [[True] * 4] * 2


# -- sparse gradients -------------------------------------------------------------------------------------------------
def sparse(group: Group) -> list[Any]:
    found = []
    for stage in (0, 1):
        weights, sent = [], []
        for key in (False, True):
            engine = engine_of(group, stage, sparse_gradients=key, gradient_clipping=0.0)
            assert engine.sparse_gradients_enabled() is key
            log = CollectiveLog()
            group.observers.add(log)
            train(engine, 6)
            group.observers.remove(log)
            sent.append(
                sum(c.wire_nbytes for (op, _), c in log.counts.items() if op in ("all_reduce", "reduce_scatter"))
            )
            weights.append(zs_zero.full_state_dict(engine.module))
        found.append((same(*weights), sent[1] < 0.7 * sent[0]))
    return found


def test_the_key_sparse_gradients() -> None:
    assert run_ranks(sparse, 2) == [[(True, True)] * 2] * 2
    with pytest.raises(ConfigError, match=r"sparse_gradients: needs whole gradients .* zero_optimization.stage 0 or 1"):
        engine_of(Group.single(), 2, sparse_gradients=True)


# -- several engines, and their end -----------------------------------------------------------------------------------
KINDS: list[tuple[int, dict[str, Any]]] = [(3, {}), (1, PRECISIONS["bf16"]), (2, PRECISIONS["fp16"]), (0, {})]


def interleaved(group: Group) -> list[bool]:
    expected = []
    for seed, (stage, more) in enumerate(KINDS):
        engine = engine_of(group, stage, seed, **more)
        train(engine, 8)
        expected.append((zs_zero.full_state_dict(engine.module), engine.get_global_grad_norm(), engine.global_steps))
    engines = [engine_of(group, stage, seed, **more) for seed, (stage, more) in enumerate(KINDS)]
    for number in range(8):
        for engine in engines if number % 2 else reversed(engines):
            micro_step(engine, number)
        if number == 5:  # one more comes and goes
            passing = engine_of(group, 3, 9)
            train(passing, 2)
            passing.destroy()
    found = [(zs_zero.full_state_dict(e.module), e.get_global_grad_norm(), e.global_steps) for e in engines]
    return [same(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(expected, found, strict=True)]


def test_several_engines_in_one_process_do_not_know_of_each_other() -> None:
    assert run_ranks(interleaved, 2) == [[True] * 4] * 2


def ended(group: Group, stage: int) -> tuple[Any, ...]:
    gc.freeze()  # what torch brought along need not be looked through
    start = live_tensor_nbytes()
    engine = engine_of(group, stage, **PRECISIONS["bf16"])
    train(engine, 3)
    weights = zs_zero.full_state_dict(engine.module)
    module, watched = engine.module, weakref.ref(engine)
    plain = sum(param.nbytes for param in Net().to(torch.bfloat16).parameters())
    engine.destroy()
    engine.destroy()
    with pytest.raises(ConfigError, match="was closed"):
        engine.optimizer.step()
    kept = live_tensor_nbytes() - start - plain  # the copies in `weights`
    whole = same(weights, module.state_dict())
    trained = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.arange(4)[None]).backward()
    trained.step()
    del engine
    gc.collect()
    return whole, kept / plain, watched() is None


def test_destroy_leaves_the_module_alone() -> None:
    for stage in (0, 1, 2, 3):
        for whole, kept, gone in run_ranks(ended, 2, stage):
            assert whole and gone, stage
            assert 1.0 <= kept < 1.5, (stage, kept)
