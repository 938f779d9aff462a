"""Trainings whose blocks are in stores that fail on demand, and what they are compared with.

A reference run without faults records every call of every store, window by window and phase by phase, and the state
after each window. A run with faults then fails call k of a phase, which the reference says is there, looks at the
state, runs the window again and looks once more: any number of faults in one training, each on top of the last.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zs_zero
from torch import Tensor, nn
from zs_comm import Group, Mesh, RankDisagreement
from zs_zero.stores import MemoryStore
from zs_zero.testing import Fault, FaultyStore
from zs_zero.tiers import opening, tiers
from zs_zero.tiers.blocks import PARAM

PHASES = ("forward", "backward", "step")
Optimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Layout:
    """What is where, of a training that moves blocks."""

    optimizer: Mapping[str, Any]
    parameters: Mapping[str, Any] | None = None  # None: in memory
    stage: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)  # of `shard`
    client: Optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)
    accumulate: int = 1
    max_norm: float | None = None
    at_once: bool = False  # in a store whose transfers take no time: what an early update does is the same in every run


BLOCKS: Mapping[str, Any] = {"zs_block_numel": 256, "buffer_count": 2}
FILES: Mapping[str, Any] = {"device": "nvme", **BLOCKS}
GRADS: Mapping[str, Any] = {**FILES, "zs_gradients": "nvme"}
AWAY: Mapping[str, Any] = {"device": "nvme", "max_in_cpu": 0, "buffer_count": 2}
BF16: Mapping[str, Any] = {"dtype": torch.bfloat16}

LAYOUTS: dict[str, Layout] = {
    "everything": Layout(GRADS, AWAY, options=BF16, accumulate=2, max_norm=0.05),
    "everything, fp32": Layout(GRADS, AWAY),
    "states": Layout(FILES, stage=2, options=BF16, client=lambda params: torch.optim.Adam(params, lr=1e-2, fused=True)),
    "half of the states": Layout({**FILES, "ratio": 0.5}, stage=1, max_norm=0.05),
    "states and gradients": Layout(GRADS, stage=2, client=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)),
    "parameters": Layout({"device": "cpu", **BLOCKS}, AWAY, options=BF16),
    "half of the states, parameters": Layout({**FILES, "ratio": 0.5}, AWAY, options=BF16),
    "8 bits": Layout({**FILES, "zs_state": "8bit"}, AWAY, options=BF16),
    "early": Layout({**FILES, "zs_early_update": True}, stage=2, options=BF16, at_once=True),
    "early, everything": Layout({**GRADS, "zs_early_update": True}, AWAY, options=BF16, at_once=True),
    "compensated": Layout(FILES, AWAY, options={**BF16, "bf16_update": "kahan"}),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), *inner, nn.Linear(24, 5))


class Training:
    """One model over faulty stores, window by window."""

    def __init__(
        self, folder: Path | str, group: Group, layout: Layout, *, store: str = "file", net: nn.Module | None = None,
        faults: Mapping[str, Fault] | None = None, job: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:  # fmt: skip
        """`faults`: of the stores from the beginning, by kind. `mesh`: of the ranks of `group`."""
        self.group, self.layout = group, layout
        self.stores: dict[str, FaultyStore] = {}
        self.phase = "build"
        self.calls: list[tuple[str, str, str, str, int]] = []  # phase, kind, op, key, number among the kind's op
        net = model() if net is None else net
        self._faults = faults or {}
        at = {"nvme_path": str(folder)}
        self.model = net
        with self._faulty_stores():
            self.optimizer = zs_zero.shard(
                net, layout.client(net.parameters()), stage=layout.stage, mesh=mesh or group,
                offload_optimizer={**layout.optimizer, **at},
                offload_param=None if layout.parameters is None else {**layout.parameters, **at},
                aio={"zs_store": store, "zs_job": job}, units=[nn.Linear], **layout.options,
            )  # fmt: skip

    @contextlib.contextmanager
    def _faulty_stores(self) -> Iterator[None]:
        plain = opening.open_store

        def opened(files: Any, folder: Any, kind: str, *, bounded_cache: bool) -> tuple[Any, str]:
            store, name = plain(files, folder, kind, bounded_cache=bounded_cache)
            path = str(getattr(store, "path", folder.path))
            if self.layout.at_once:
                store.close()
                store = MemoryStore()
            known = [self._faults[kind]] if kind in self._faults else []
            faulty = self.stores[kind] = FaultyStore(store, known, path=path)
            return faulty, name

        with mock.patch.object(tiers, "open_store", opened):
            yield

    def backward(self, window: int, micro: int = 0) -> None:
        numbers = torch.Generator().manual_seed(1000 * window + 10 * micro + self.group.rank)
        x = torch.randn(4, 12, generator=numbers).to(self.layout.options.get("dtype", torch.float32))
        self.phase = "forward"
        loss = self.model(x).float().square().mean()
        self.phase = "backward"
        self.optimizer.scale(loss).backward()

    def window(self, window: int) -> None:
        """All of it; `phase` says how far it came."""
        for micro in range(self.layout.accumulate):
            self.backward(window, micro)
        self.phase = "step"
        self.optimizer.step(max_norm=self.layout.max_norm)
        self.optimizer.zero_grad()
        self.phase = "between"

    def marks(self) -> dict[tuple[str, str], int]:
        """How many calls there were, by kind and operation."""
        return {(kind, op): store.count(op) for kind, store in self.stores.items() for op in ("read", "write")}

    def recorded(self, window: int) -> dict[tuple[str, str, str], list[int]]:
        """Runs a window. {(phase, kind, op): numbers of such calls in it, counted from its beginning}."""
        found: dict[tuple[str, str, str], list[int]] = {}
        before = self.marks()

        def listen(store: FaultyStore, kind: str) -> Any:
            meet = store._meet

            def met(op: Any, key: str) -> Any:
                number = store.count(op) - before[kind, op]
                found.setdefault((self.phase, kind, op), []).append(number)
                return meet(op, key)

            return mock.patch.object(store, "_meet", met)

        with contextlib.ExitStack() as stack:
            for kind, store in self.stores.items():
                stack.enter_context(listen(store, kind))
            self.window(window)
        return found

    def state(self) -> dict[str, Tensor]:
        """Everything of this rank that a step changes: values, masters, states, counters, and what the model has."""
        found = {}
        for number, flat in enumerate(self.optimizer._runtime.flats):
            home = flat.home
            away = home is not None and home.parameters_away
            held = torch.cat([home.read(b, PARAM) for b in home.blocks.blocks]) if home and away else flat.shard
            for piece in flat.held_pieces():  # not the padding, which is nobody's
                found[f"parameters {number} {piece.low}"] = held[piece.low : piece.high].clone()
        for name, param in self.model.named_parameters():
            found[f"master {name}"] = self.optimizer.local_param(param)
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                state = self.optimizer.local_state(param, key)
                if state is not None:
                    found[f"{key} {name}"] = torch.as_tensor(state).clone()
        return found

    def inject(self, kind: str, op: str, number: int, how: int | str, *, early: bool = False) -> None:
        """Fails call `number`, counted from now, of an operation."""
        store = self.stores[kind]
        at = store.count(op) + number  # type: ignore[arg-type]
        store.faults[:] = [Fault(op=op, number=at, error=how, early=early)]  # type: ignore[arg-type]

    def lift(self) -> None:
        """No fault any more; what hangs goes on."""
        for store in self.stores.values():
            store.faults.clear()
            store.release()

    def close(self) -> None:
        self.optimizer.close(parameters=False)


@dataclass
class Reference:
    """A run without faults: `states[w]` before window `w`, `calls[w]` in it."""

    states: list[dict[str, Tensor]]
    calls: list[dict[tuple[str, str, str], list[int]]]


def reference(
    folder: Path | str, group: Group, layout: Layout, windows: int, *, store: str = "file"
) -> Reference:  # fmt: skip
    training = Training(folder, group, layout, store=store)
    found = Reference([training.state()], [])
    for window in range(windows):
        found.calls.append(training.recorded(window))
        found.states.append(training.state())
    training.close()
    return found


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    names = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        one, other = found[name], expected[name]
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one, other):
            names.append(name)
    return names


ENDS = ("first", "middle", "last")
Way = tuple[str, int | str, bool]
WAYS: list[Way] = [  # where among the calls, how, and whether the call itself raises
    *((place, errno.EIO, False) for place in ENDS),
    ("middle", errno.ENOSPC, False),
    *((place, "hang", False) for place in ENDS),
    *((place, errno.EIO, True) for place in ENDS),
]
LEAST: list[Way] = [("first", "hang", False), ("middle", errno.EIO, False), ("last", errno.EIO, True)]
FEW: list[Way] = [
    *((place, errno.EIO, False) for place in ENDS),
    ("middle", "hang", False),
    ("middle", errno.EIO, True),
]


def windows(ways: Sequence[Way]) -> int:
    """How many windows a training with so many faults has: two before the first, one after the last."""
    return len(ways) + 3


def survive(
    folder: Path | str, group: Group, layout: Layout, where: tuple[str, str, str], *, failing: int = 0,
    store: str = "file", limit_s: float = 2.0, expected: Reference | None = None,
    ways: Sequence[Way] = WAYS,
) -> list[str]:  # fmt: skip
    """Every way to fail, at the first, a middle and the last such call, window after window; what is wrong after it.

    Rank `failing` has the faults.
    """
    phase, kind, op = where
    plan = [None, None, *ways]
    known = expected or reference(folder, group, layout, windows(ways), store=store)
    training = Training(folder, group, layout, store=store)
    wrong: list[str] = []
    for window, way in enumerate(plan):
        if way is None:
            training.window(window)
            continue
        place, how, early = way
        numbers = known.calls[window][where]
        number = numbers[{"first": 0, "middle": len(numbers) // 2, "last": -1}[place]]
        if group.rank == failing:
            training.inject(kind, op, number, how, early=early)
        text = f"{place} of {len(numbers)} {op}s of {kind} in {phase}, {how}{' early' * early}"
        began = time.monotonic()
        try:
            training.window(window)
        except (OSError, TimeoutError, RankDisagreement) as error:
            wrong += [f"{text}: {line}" for line in _misses(error, training, kind, how, own=group.rank == failing)]
            if time.monotonic() - began > limit_s:
                wrong.append(f"{text}: it took {time.monotonic() - began:.1f} s")
        else:
            wrong.append(f"{text}: no error")
            break
        if training.phase != "step" or kind == "gradients":  # the window is open
            training.optimizer.abort_step()
        training.lift()
        if training.optimizer.torn:
            wrong.append(f"{text}: torn")
            break
        for when, state in (("before", known.states[window]), ("after", known.states[window + 1])):
            if lines := differing(training.state(), state):
                wrong.append(f"{text}: {len(lines)} differ from the state {when} the step, {lines[:3]}")
            if when == "before":
                training.window(window)
        if wrong:
            break
    else:
        training.window(len(plan))
        if lines := differing(training.state(), known.states[-1]):
            wrong.append(f"at the end {len(lines)} differ, {lines[:3]}")
    training.close()
    return wrong


def _misses(error: Exception, training: Training, kind: str, how: int | str, *, own: bool) -> list[str]:
    """What an error lacks."""
    lines, text = [], str(error)
    if own and not isinstance(error, TimeoutError if how == "hang" else OSError):
        lines.append(f"{type(error).__name__} on the failing rank: {text}")
    if own and how != "hang" and getattr(error, "errno", None) != how:
        lines.append(f"errno is {getattr(error, 'errno', None)}")
    if not own and not isinstance(error, RankDisagreement):
        lines.append(f"{type(error).__name__} on another rank: {text}")
    path = f"{kind}.blocks" if not own else training.stores[kind].path
    lines += [f"{word!r} is not in: {text}" for word in (path, "offset", kind) if word not in text]
    return lines
