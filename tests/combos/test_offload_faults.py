"""A disk that fails under a training through zs-offload-aio's store: the step did not happen, on any rank, and both the
training and its last checkpoint go on with the bits of a run that knew no fault."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zs_ckpt
import zs_zero
from torch import Tensor, nn
from zs_comm import Group, RankDisagreement
from zs_comm.testing import run_ranks
from zs_zero.testing import Fault, FaultyStore
from zs_zero.tiers import opening, tiers

REQUIRES = {"zs-comm", "zs-zero", "zs-offload-aio", "zs-ckpt"}

KINDS = [("parameters", "read"), ("parameters", "write"), ("optimizer", "read"), ("optimizer", "write"),
         ("gradients", "read"), ("gradients", "write")]  # fmt: skip


class Training:
    """Everything in files; `store` "aio" behind stores that fail on demand, or all in memory."""

    def __init__(self, folder: Path | str, group: Group, *, store: str | None = "aio", wrap: bool = True) -> None:
        torch.manual_seed(0)
        inner = [nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(2)]
        self.model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), *inner, nn.Linear(24, 5))
        self.client = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.group = group
        self.stores: dict[str, Any] = {}
        files = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 2}
        options: dict[str, Any] = {}
        if store is not None:
            options = {
                "offload_optimizer": {**files, "zs_block_numel": 256, "zs_gradients": "nvme"},
                "offload_param": {**files, "max_in_cpu": 0},
                "aio": {"zs_store": store, "block_size": 4096, "queue_depth": 4},
            }
        plain = opening.open_store

        def opened(files: Any, folder: Any, kind: str, *, bounded_cache: bool) -> tuple[Any, str]:
            made, name = plain(files, folder, kind, bounded_cache=bounded_cache)
            assert name == "aio"
            self.stores[kind] = FaultyStore(made, path=str(getattr(made, "path", folder.path))) if wrap else made
            return self.stores[kind], name

        with mock.patch.object(tiers, "open_store", opened):
            self.optimizer = zs_zero.shard(
                self.model, self.client, stage=3, mesh=group, dtype=torch.bfloat16, units=[nn.Linear], **options
            )

    def window(self, window: int) -> None:
        for micro in range(2):
            numbers = torch.Generator().manual_seed(1000 * window + 10 * micro + self.group.rank)
            x = torch.randn(4, 12, generator=numbers).bfloat16()
            self.model(x).float().square().mean().backward()
        self.optimizer.step(max_norm=0.05)
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        found = {}
        for name, param in self.model.named_parameters():
            found[name] = self.optimizer.full_param(param)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = self.optimizer.full_state(param, key)
                if value is not None:
                    found[f"{name} {key}"] = torch.as_tensor(value).clone()
        return found

    def targets(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def survive(group: Group, folder: str, kinds: list[tuple[str, str]]) -> list[str]:
    """The last rank's disk fails in every kind of transfer; what is wrong."""
    plain = Training(folder, group, store=None)
    states = [plain.state()]
    for window in range(len(kinds) + 2):
        plain.window(window)
        states.append(plain.state())
    plain.optimizer.close(parameters=False)

    training, wrong = Training(folder, group), list[str]()
    training.window(0)
    training.window(1)
    for window, (kind, op) in enumerate(kinds, 2):
        checkpoint = Path(folder) / "checkpoints"
        zs_ckpt.save(checkpoint, training.targets(), group=group, tag=f"window{window}")
        if group.rank == group.size - 1:
            store = training.stores[kind]
            store.faults[:] = [Fault(op=op, number=store.count(op) + 4, error=errno.EIO)]  # type: ignore[arg-type]
        try:
            training.window(window)
        except (OSError, RankDisagreement) as error:
            if f"{kind} block" not in str(error) or "offset" not in str(error):
                wrong.append(f"{kind} {op}: {error}")
        else:
            wrong.append(f"{kind} {op}: no error")
        training.optimizer.abort_step()
        if not same(training.state(), states[window]):
            wrong.append(f"{kind} {op}: not the state before the step")
        resumed = Training(folder, group)
        zs_ckpt.load(checkpoint, resumed.targets(), group=group)
        if not same(resumed.state(), states[window]):
            wrong.append(f"{kind} {op}: the checkpoint has another state")
        resumed.window(window)
        if not same(resumed.state(), states[window + 1]):
            wrong.append(f"{kind} {op}: the checkpoint goes on in another way")
        resumed.optimizer.close(parameters=False)
        training.window(window)
        if not same(training.state(), states[window + 1]):
            wrong.append(f"{kind} {op}: not the state after the step")
    training.optimizer.close(parameters=False)
    return wrong


@pytest.mark.parametrize(("world", "kinds"), [(1, KINDS), (2, KINDS[::3])], ids=["one rank", "two ranks"])
def test_training_and_checkpoint_survive(world: int, kinds: list[tuple[str, str]], tmp_path: Path) -> None:
    for wrong in run_ranks(survive, world, str(tmp_path), kinds, timeout_s=120):
        assert wrong == []
    assert not list(tmp_path.rglob("*.swap"))


def cut_short(folder: Path) -> int:
    """Every file below `folder` that this process has open, most of them without a name; how many."""
    count = 0
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(number)
            if target.startswith(str(folder)) and os.stat(number).st_size > 4096:
                os.truncate(number, 0)
                count += 1
    return count


def test_a_file_that_somebody_cut_short(tmp_path: Path) -> None:
    """Its content is lost: every window says so, and the checkpoint has the state."""
    training = Training(tmp_path / "disk", Group.single(), wrap=False)
    training.window(0)
    training.window(1)
    zs_ckpt.save(tmp_path / "checkpoints", training.targets(), group=Group.single())
    before = training.state()
    assert cut_short(tmp_path / "disk") == 3
    for _ in range(2):
        with pytest.raises(OSError, match="parameters block.* at offset") as caught:
            training.window(2)
        assert str(tmp_path / "disk") in str(caught.value)
        training.optimizer.abort_step()
    training.optimizer.close(parameters=False)
    assert [path for path in (tmp_path / "disk").rglob("*") if path.is_file()] == []
    again = Training(tmp_path / "disk", Group.single(), wrap=False)
    zs_ckpt.load(tmp_path / "checkpoints", again.targets(), group=Group.single())
    assert same(again.state(), before)
    again.window(2)
    again.optimizer.close(parameters=False)


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    """The files are open, so the training goes on; the checkpoint is elsewhere."""
    plain = Training(tmp_path, Group.single(), store=None)
    training = Training(tmp_path / "disk", Group.single(), wrap=False)
    for window in range(3):
        if window == 1:
            shutil.rmtree(tmp_path / "disk")
        plain.window(window)
        training.window(window)
        assert same(training.state(), plain.state())
    zs_ckpt.save(tmp_path / "checkpoints", training.targets(), group=Group.single())
    training.optimizer.close()
    assert zs_ckpt.verify(tmp_path / "checkpoints").ok
