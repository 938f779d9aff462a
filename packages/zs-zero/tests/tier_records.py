"""A training over stores in memory that record every call beside what the model does, in one list."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zs_zero
from torch import Tensor, nn
from zs_comm import Group
from zs_zero.stores import MemoryStore
from zs_zero.testing import FaultyStore
from zs_zero.tiers import opening, tiers
from zs_zero.tiers.blocks import PARAM

WIDTH, LAYERS, BLOCK = 64, 4, 512
LAYER = WIDTH * WIDTH  # elements of a unit: no padding
NUMEL = LAYER * LAYERS

STATES: Mapping[str, Any] = {"device": "nvme", "zs_block_numel": BLOCK, "buffer_count": 2}
AWAY: Mapping[str, Any] = {"device": "nvme", "max_in_cpu": 0, "buffer_count": 2}


@dataclass(frozen=True)
class Call:
    phase: str
    kind: str  # of a store, or "need" for the beginning of a unit's use, and "have" where it is whole
    op: str  # "read", "write"; the phase of a need
    key: str  # of the block, without its slot; the number of a unit

    @property
    def block(self) -> tuple[int, int]:
        """(flat, index)"""
        flat, index, _ = self.key.split(".")
        return int(flat), int(index)


class Recorded(FaultyStore):
    def __init__(self, log: Callable[[str, str], None], *, path: str) -> None:
        super().__init__(MemoryStore(), path=path)
        self._log = log

    def read(self, key: str, buf: Any) -> Any:
        self._log("read", key)
        return super().read(key, buf)

    def write(self, key: str, buf: Any) -> Any:
        self._log("write", key)
        return super().write(key, buf)


def layers(count: int = LAYERS) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(count)))


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


class Training:
    """`options`: of `zs_zero.shard`; sections without `nvme_path`, which is never written to."""

    def __init__(
        self, folder: Path, *, model: nn.Module | None = None, client: Callable[[Any], Any] = adamw,
        group: Group | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.log: list[Call] = []
        self.stores: dict[str, Recorded] = {}
        self.phase = "build"
        self.dtype: torch.dtype = options.get("dtype", torch.float32)
        self.model = layers() if model is None else model
        for name in ("offload_optimizer", "offload_param"):
            if options.get(name) is not None and options[name]["device"] == "nvme":
                options[name] = {**options[name], "nvme_path": str(folder)}
        given = {"stage": 3, "units": [nn.Linear], "mesh": group} | options
        if given.keys() & {"offload_optimizer", "offload_param"}:
            given["aio"] = {"zs_store": "file"}
        with self._recorded():
            self.optimizer = zs_zero.shard(self.model, client(self.model.parameters()), **given)
        self.losses: list[float] = []
        self._watch()

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        plain = opening.open_store

        def opened(files: Any, folder: Any, kind: str, *, bounded_cache: bool) -> tuple[Any, str]:
            store, name = plain(files, folder, kind, bounded_cache=bounded_cache)
            path = str(getattr(store, "path", folder.path))
            store.close()
            self.stores[kind] = Recorded(lambda op, key: self.note(kind, op, key.split("\0")[0]), path=path)
            return self.stores[kind], name

        with mock.patch.object(tiers, "open_store", opened):
            yield

    def _watch(self) -> None:
        gatherer = self.optimizer._runtime.gatherer
        plain = gatherer.need

        def need(unit: Any, phase: str) -> None:
            self.note("need", phase, str(unit.index))
            plain(unit, phase)
            self.note("have", phase, str(unit.index))

        gatherer.need = need  # type: ignore[method-assign]

    def note(self, kind: str, op: str, key: str) -> None:
        self.log.append(Call(self.phase, kind, op, key))

    # -- the loop ------------------------------------------------------------------------------------------------------
    def backward(self, seed: int) -> None:
        numbers = torch.Generator().manual_seed(seed)
        x = torch.randn(3, WIDTH, generator=numbers).to(self.dtype)
        self.phase = "forward"
        loss = self.model(x).float().square().mean()
        self.losses.append(loss.item())
        self.phase = "backward"
        self.optimizer.scale(loss).backward()
        self.phase = "between"

    def update(self, max_norm: float | None = None) -> None:
        self.phase = "step"
        self.optimizer.step(max_norm=max_norm)
        self.optimizer.zero_grad()
        self.phase = "between"

    def steps(self, count: int, *, start: int = 0) -> Training:
        for seed in range(start, start + count):
            self.backward(seed)
            self.update()
        return self

    def recorded(self, run: Callable[[], Any]) -> list[Call]:
        """What was called meanwhile."""
        start = len(self.log)
        run()
        return self.log[start:]

    # -- what came of it -----------------------------------------------------------------------------------------------
    def values(self) -> dict[str, Tensor]:
        """Exact values and states of every parameter, what the model has of them, and losses."""
        found: dict[str, Tensor] = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for number, flat in enumerate(self.optimizer._runtime.flats):
            home = flat.home
            if home is not None and home.parameters_away:
                held = torch.cat([home.read(block, PARAM) for block in home.blocks.blocks])
            else:
                held = flat.shard
            found[f"model's {number}"] = held[: flat.plan.numel].clone()
        for name, param in self.model.named_parameters():
            found[f"exact {name}"] = self.optimizer.local_param(param)
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                state = self.optimizer.local_state(param, key)
                if state is not None:
                    found[f"{key} {name}"] = torch.as_tensor(state).clone()
        return found

    def close(self) -> None:
        self.optimizer.close(states=False, parameters=False)


def writes(calls: Sequence[Call], kind: str, phase: str | None = None) -> list[Call]:
    return [one for one in calls if (one.kind, one.op) == (kind, "write") and phase in (None, one.phase)]


def reads(calls: Sequence[Call], kind: str, phase: str | None = None) -> list[Call]:
    return [one for one in calls if (one.kind, one.op) == (kind, "read") and phase in (None, one.phase)]
