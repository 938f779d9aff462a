"""Tiers of a device with memory of its own, as far as a CPU can stand in for one.

`is_apart` is told so: gradients and masters are then in host memory, apart from the parameters, and new values are
copied back; on a real device the same lines move them over the bus.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zs_zero.tiers import making

sys.path.insert(0, str(Path(__file__).parent))

from tier_fault_runs import differing
from tier_records import AWAY, BLOCK, STATES, Training, adamw
from tier_runs import PARAMETERS, How, compared, policies
from tier_runs import STATES as STATE_POLICIES

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HOST = {"device": "cpu", "zs_block_numel": BLOCK}


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "is_apart", lambda device: True)


LAYOUTS: dict[str, dict[str, Any]] = {
    "cpu": {"offload_optimizer": HOST, "stage": 1},
    "cpu, stage 3": {"offload_optimizer": HOST},
    "states": {"offload_optimizer": STATES, "stage": 2},
    "half of the states": {"offload_optimizer": {**STATES, "ratio": 0.5}, "stage": 2},
    "early": {"offload_optimizer": {**STATES, "zs_early_update": True}, "stage": 2},
    "gradients": {"offload_optimizer": {**STATES, "zs_gradients": "nvme"}, "stage": 2},
    "parameters": {"offload_optimizer": STATES, "offload_param": AWAY},
    "parameters in host memory": {"offload_optimizer": STATES, "offload_param": {"device": "cpu"}},
    "parameters, states in memory": {"offload_optimizer": HOST, "offload_param": AWAY},
    "parameters alone": {"offload_param": AWAY},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {}, "bf16": {"dtype": B16}, "compensated": {"dtype": B16, "bf16_update": "kahan"},
    "bf16 masters": {"dtype": B16, "master_dtype": B16}, "bf16 states": {"dtype": B16, "state_dtype": B16},
    "added in fp32": {"dtype": B16, "grad_accum_dtype": F32}, "fp32, bf16 states": {"state_dtype": B16},
}  # fmt: skip


def outcome(training: Training, *, backwards: int = 1, max_norm: float | None = None) -> dict[str, torch.Tensor]:
    for step in range(3):
        for micro in range(backwards):
            training.backward(step * 10 + micro)
        training.update(max_norm)
    found = training.values()
    training.close()
    return found


@pytest.mark.parametrize("name", PRECISIONS)
def test_numbers_are_those_of_one_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backwards, max_norm in ((2, 1e-3), (1, None))[: 1 + (name == "bf16")]:
        with monkeypatch.context() as here:
            here.setattr(making, "is_apart", lambda device: False)
            wanted = outcome(Training(tmp_path, stage=1, **PRECISIONS[name]), backwards=backwards, max_norm=max_norm)
        for layout, options in LAYOUTS.items():
            training = Training(tmp_path, **options, **PRECISIONS[name])
            assert not differing(outcome(training, backwards=backwards, max_norm=max_norm), wanted), layout


def test_optimizers_of_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    for client in (sgd, lambda params: torch.optim.AdamW(params, lr=1e-2), adamw):
        with monkeypatch.context() as here:
            here.setattr(making, "is_apart", lambda device: False)
            wanted = outcome(Training(tmp_path, stage=1, client=client, dtype=B16))
        for layout in ("cpu", "states", "parameters"):
            assert not differing(outcome(Training(tmp_path, client=client, dtype=B16, **LAYOUTS[layout])), wanted), (
                layout
            )


@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
def test_the_hardest_model(dtype: torch.dtype, tmp_path: Path) -> None:
    assert set(STATE_POLICIES) <= set(policies(2)) and set(PARAMETERS) <= set(policies(3))
    lines = compared(None, How(dtype=dtype, micros=2, clip="in step"), tmp_path, (3,))
    assert not lines, "\n".join(sorted(lines)[:40])


@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["cpu", "cpu, stage 3", "half of the states"])
def test_where_things_are(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cast = {} if dtype == F32 else {"dtype": dtype}
    training = Training(tmp_path, **LAYOUTS[layout], **cast).steps(1)
    training.backward(1)
    if training.optimizer.stage == 1:
        training.optimizer.grad_norm()  # reduces
    flats = training.optimizer._runtime.flats
    for flat in flats:
        assert flat.state_device == torch.device("cpu")
        assert all(param.grad is None for param in flat.params), "nothing is left on the device"
        assert flat.grad is not None and flat.grad.device == flat.state_device
        assert flat.grad.untyped_storage().data_ptr() != flat.whole.untyped_storage().data_ptr()
        if dtype == B16:
            assert flat.grad.dtype == B16, "as it came: half the bytes over the bus"
    if dtype == B16 and layout.startswith("cpu"):
        assert all(flat.master is not None and flat.master.dtype == F32 for flat in flats)
        assert all(flat.master.data_ptr() != flat.shard.data_ptr() for flat in flats if flat.master is not None)
    before = [flat.shard.clone() for flat in flats]
    training.update()
    for flat, old in zip(flats, before, strict=True):
        assert not torch.equal(flat.shard, old), "new values were copied back"
        if dtype == B16 and layout.startswith("cpu") and flat.master is not None:
            assert torch.equal(flat.shard, flat.master.to(B16))
    training.close()


def test_gradients_leave_as_their_unit_is_through(tmp_path: Path) -> None:
    """At stages 2 and 3 a unit's are in host memory before the backward of the one below begins."""
    training = Training(tmp_path, **LAYOUTS["cpu, stage 3"], dtype=B16).steps(1)
    seen: list[list[bool]] = []
    flats = training.optimizer._runtime.flats

    def look(*_: Any) -> None:
        seen.append([flat.grad is not None for flat in flats])

    for module in training.model:
        module.register_forward_hook(lambda module, args, output: output.register_hook(look) and None)
    training.backward(1)
    assert [sum(one) for one in seen] == [0, 1, 2, 3] and seen[1][3]
    training.close()
