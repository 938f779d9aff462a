"""What a training loop says of itself: to whoever observes it, and in lines for people where the configuration asks.

    phase "forward" | phase "backward" | ... | phase "step" | updated()
                                                              scalars to the observers, then at most four lines:
                                                              steps_per_print, and what offload moved there;
                                                              wall_clock_breakdown, memory_breakdown

A monitor is an observer with `scalar(name, value, step)`. Names and x axis (samples so far) are DeepSpeed's:
`Train/Samples/train_loss`, `lr`, `loss_scale`, `elapsed_time_ms_forward`, ...; `grad_norm` and `offload_...` are ours.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from zs_comm import Observers

PHASES = ("forward", "backward", "step")


class Loop(Protocol):
    """What is read from an engine after an update."""

    global_steps: int
    global_samples: int
    skipped_steps: int

    def get_lr(self) -> list[float]: ...
    def get_mom(self) -> list[Any]: ...
    def get_global_grad_norm(self) -> float | None: ...
    def loss_scale(self) -> Any: ...


class LoopReport:
    """Phases, scalars and lines of one loop. While nobody asks, a phase costs one comparison and a step a few.

    Args:
        observers: who watches; shared with whatever communicates in the same groups.
        log: where the lines go; rank 0's speaks at INFO.
        steps_per_print: updates between lines of progress; None or 0: none.
        times: after every update a line of the milliseconds of each phase since the one before.
        memory: a line of host and device memory before and after each phase.
    """

    def __init__(
        self, observers: Observers, log: logging.Logger, *,
        steps_per_print: float | None = None, times: bool = False, memory: bool = False,
    ) -> None:  # fmt: skip
        self.observers = observers
        self.times: dict[str, float] = {}
        self._log = log
        self._every = 0 if steps_per_print is None or math.isinf(steps_per_print) else steps_per_print
        self._time: Any = None
        self._mine: list[object] = []  # observers only while a phase of this loop runs: another loop may share them
        speaks = log.isEnabledFor(logging.INFO)
        if times or memory:
            from zs_comm.breakdown import MemoryBreakdown, TimeBreakdown

            if memory and speaks:
                self._mine.append(MemoryBreakdown(log.info, PHASES))
            if times:  # after it, so that the time holds nothing of that
                self._time = TimeBreakdown()
                self._mine.append(self._time)
        self._losses: list[Tensor] = []
        self._began, self._samples = time.perf_counter(), 0

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Around one of PHASES."""
        return self._watched(name) if self._mine else self.observers.span(name)

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        for observer in self._mine:
            self.observers.add(observer)
        try:
            with self.observers.span(name):
                yield
        finally:
            for observer in self._mine:
                self.observers.remove(observer)

    def loss(self, loss: Tensor) -> None:
        """A micro-step's loss, as it was before any scaling."""
        if self._every or self.observers.wants("scalar"):
            self._losses.append(loss.detach())

    def updated(self, loop: Loop) -> None:
        """After an update, or one that was skipped."""
        due = bool(self._every) and loop.global_steps % self._every == 0
        if due or self.observers.wants("scalar"):
            told, moved = self._scalars(loop), _moved(loop)
            told |= moved
            for name, value in told.items():
                self.observers.scalar(f"Train/Samples/{name}", value, loop.global_samples)
            if due:
                self._log.info("%s", self._line(loop, told))
                if moved:
                    self._log.info("%s", _offload_line(moved))
        if self._time is not None:
            self.times = self._time.milliseconds()
            self._log.info("%s", self._time.line())
            self._time.reset()
        self._losses.clear()

    def _scalars(self, loop: Loop) -> dict[str, float]:
        norm = loop.get_global_grad_norm()
        told = {"lr": loop.get_lr()[0], "loss_scale": float(loop.loss_scale())}
        told |= {} if norm is None else {"grad_norm": norm}
        if self._losses:  # of this rank: the mean over the window's micro-steps
            told = {"train_loss": float(torch.stack([loss.float().mean() for loss in self._losses]).mean())} | told
        if self._time is not None:
            told |= {f"elapsed_time_ms_{name}": 1e3 * took for name, took in self._time.seconds.items()}
        return told

    def _line(self, loop: Loop, told: dict[str, float]) -> str:
        now = time.perf_counter()
        rate = (loop.global_samples - self._samples) / max(now - self._began, 1e-9)
        self._began, self._samples = now, loop.global_samples
        parts = [f"loss {told['train_loss']:.6g}"] if "train_loss" in told else []
        parts += [f"lr {loop.get_lr()}", f"momentum {loop.get_mom()}"]
        parts += [f"gradient norm {told['grad_norm']:.4g}"] if "grad_norm" in told else []
        parts += [f"loss scale {told['loss_scale']:g}"] if told["loss_scale"] != 1.0 else []
        parts += [f"skipped {loop.skipped_steps}", f"{rate:.1f} samples/s"]
        return f"step {loop.global_steps}: {', '.join(parts)}"


def _moved(loop: Any) -> dict[str, float]:
    """What the last update's offload read, wrote and waited for; empty where nothing is offloaded."""
    optimizer = getattr(loop, "optimizer", None)
    if not getattr(optimizer, "offloads", False):
        return {}
    made: Any = optimizer.offload_report()  # type: ignore[union-attr]
    return {
        "offload_read_nbytes": sum(made.read.values()),
        "offload_written_nbytes": sum(made.written.values()),
        "offload_stall_ms": 1e3 * made.stall_s,
        "offload_overlap": made.overlap,
    }


def _offload_line(moved: dict[str, float]) -> str:
    read, written = (moved[f"offload_{way}_nbytes"] / 2**20 for way in ("read", "written"))
    stall, overlap = moved["offload_stall_ms"], moved["offload_overlap"]
    return f"offload: read {read:,.1f} MiB, written {written:,.1f} MiB, stalled {stall:.1f} ms, overlap {overlap:.2f}"


def state_text(engine: Any) -> str:
    """An engine's state for people, a name and a value to the line: sizes, counters, optimizer, schedule, plan."""
    rows = {name: getattr(engine, name) for name in ("device", "global_rank", "world_size", "dp_world_size")}
    rows |= engine.get_batch_info()._asdict()
    rows |= {name: getattr(engine, name) for name in ("micro_steps", "global_steps", "global_samples", "skipped_steps")}
    rows |= {"stage": engine.zero.stage, "loss_scale": engine.loss_scale(), "pacing": engine.pacing.state_dict()}
    schedule = engine.lr_scheduler
    state = f"{type(schedule).__name__} {schedule.state_dict()}" if hasattr(schedule, "state_dict") else schedule
    rows |= {"lr": engine.get_lr(), "momentum": engine.get_mom(), "lr_scheduler": state}
    lines = [f"  {name:<16} {value}" for name, value in rows.items()]
    config = json.dumps(engine.config, default=repr)
    blocks = {"optimizer": engine.optimizer, "config": config, "plan": engine.zero.plan}
    return "\n".join(["state of the engine", *lines, *(f"  {name}\n{value}" for name, value in blocks.items())])
