"""The engine: DeepSpeed's training loop over a sharded model.

loss = engine(batch)        one micro-step
engine.backward(loss)       divides by the accumulation steps; plain loss.backward() divides by nothing, as in torch
engine.step()               at the end of an accumulation window: clip, update, zero the gradients, step the schedule
"""

from __future__ import annotations

import functools
import json
import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, Group
from zs_zero import LossScaleError, ZeroOptimizer
from zs_zero.batch import BatchSizes
from zs_zero.loop_report import LoopReport
from zs_zero.pacing import Pacing
from zs_zero.scaling import as_loss
from zs_zero.trees import argument_elsewhere

from zs_engine import checkpoint
from zs_engine.data import DataLoader

if TYPE_CHECKING:
    from zs_engine.config import EngineConfig

_log = logging.getLogger("zs_engine")
NAMES = json.loads(resources.files("zs_engine").joinpath("engine_names.json").read_text("utf-8"))


class Engine(nn.Module):
    """What :func:`zs_engine.initialize` returns first. Unknown attributes are the module's.

    Attributes:
        module: the client's model, sharded in place.
        optimizer: the client's optimizer over shards; None for an engine that only evaluates.
        zero: the sharding itself, also without an optimizer (`zero.plan`, `zero.full_param`, ...).
        lr_scheduler: stepped with every optimizer step; set it to None to step it yourself.
        global_steps, micro_steps, global_samples, skipped_steps: counters; `micro_steps` counts calls of `step()`.
        device, global_rank, world_size, local_rank, dp_world_size: where this process stands.
        observers: `observers.add(anything with scalar(name, value, step))` is told of every update: a monitor.
        config: the configuration as it was given.
    """

    def __init__(
        self, module: nn.Module, zero: ZeroOptimizer, *, settings: EngineConfig, sizes: BatchSizes,
        config: Mapping[str, Any], world: Group, local_rank: int, device: torch.device, trains: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.module = module
        self.zero = zero
        self.optimizer = zero if trains else None
        self.lr_scheduler: Any = None
        self.training_dataloader: DataLoader | None = None
        self.config, self._config = dict(config), settings
        self.device = device
        self.global_rank, self.world_size, self.local_rank = world.rank, world.size, local_rank
        self.dp_world_size, self.mp_world_size = zero.group.size, 1
        self.data_parallel_group = zero.group.process_group
        self.global_steps = self.micro_steps = self.global_samples = self.skipped_steps = 0
        self.checkpointers: dict[Any, Any] = {}  # by folder: their buffers, and what is being written
        self._sizes, self._applied, self._window_began = sizes, False, 0
        self._boundary: bool | None = None
        self._norm: Tensor | None = None
        self._backwards = 0  # since the last update
        self.observers = zero.group.observers
        self.report = LoopReport(self.observers, _log, **settings.report_options())
        self.pacing = Pacing(settings.pacers(), module)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward. Raises ConfigError where it failed over an input that is on another device."""
        if self.pacing and self.module.training:
            kwargs |= self.pacing.arguments(self.global_steps)
        try:
            with self.report.phase("forward"):
                return self.module(*inputs, **kwargs)
        except RuntimeError as error:
            wrong = argument_elsewhere(self.module, inputs, kwargs, self.device)
            if wrong is None:
                raise
            raise ConfigError(f"{wrong}, and the model on {self.device}: move the batch to engine.device") from error

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any) -> Tensor:
        """Backward through `loss / gradient_accumulation_steps` (or `loss`: `scale_wrt_gas=False`); returns that."""
        self.report.loss(as_loss(loss))
        if scale_wrt_gas and self._sizes.steps > 1:
            loss = loss / self._sizes.steps
        with self.report.phase("backward"):
            self.zero.scale(loss).backward(retain_graph=retain_graph, **kwargs)
        self._backwards += 1
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """The whole loss times the loss scale (1 in bf16 and fp32), to call its own `backward()`, not the engine's."""
        return self.zero.scale(loss)

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a micro-step; at the accumulation boundary clip, update, zero the gradients, step the schedule."""
        if self.optimizer is None:
            raise ConfigError("step(): the engine has no optimizer: give initialize() one, or the configuration")
        self._applied, stuck = False, None
        if not self.is_gradient_accumulation_boundary():
            self.micro_steps += 1
            return
        try:
            with self.report.phase("step"):
                self.optimizer.step(max_norm=self._config.gradient_clipping or math.inf)  # and the gradients are gone
        except LossScaleError as error:  # said after the skipped step was counted
            stuck = error
        self._applied, self._norm = not self.optimizer.overflow, self.optimizer.norm
        if self._applied and self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self.skipped_steps += not self._applied
        self.global_steps += 1
        managed = self._config.managed_gradient_accumulation  # else the caller says where windows end
        self.global_samples += self._sizes.samples(None if managed else self._backwards or 1)
        self.micro_steps += 1
        self._window_began, self._backwards = self.micro_steps, 0
        self.report.updated(self)
        if stuck is not None:
            raise stuck

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step()` updates."""
        if self._boundary is not None:
            return self._boundary
        return not self.counts_windows or self.window_steps + 1 >= self._sizes.steps

    @property
    def window_steps(self) -> int:
        """Calls of `step()` since the one that updated last."""
        return self.micro_steps - self._window_began

    @property
    def counts_windows(self) -> bool:
        """Whether the engine itself decides which `step()` updates, by counting."""
        return self._boundary is None and self._config.managed_gradient_accumulation

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide from outside whether `step()` updates; None: the engine counts again."""
        self._boundary = is_boundary

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside communicate no gradients; the next one outside, or `step()`, brings theirs along."""
        return nullcontext() if self.optimizer is None else self.optimizer.no_sync()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this accumulation window."""
        self.zero.zero_grad(set_to_none)
        self._backwards = 0

    def get_global_grad_norm(self) -> float | None:
        """The global 2-norm of the last update's mean gradient, before clipping; None before the first."""
        return None if self._norm is None else float(self._norm)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the train batch by changing the accumulation steps, from the next window on. Collective.

        Raises ConfigError for no whole number above 0, when it does not divide, or inside a window.
        """
        self._resize(train_batch_size, self._sizes.micro, None)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch and, with the accumulation steps kept, the train batch; loaders that exist stay.

        Raises ConfigError for no whole number above 0, or inside a window. Collective.
        """
        self._resize(None, micro_batch_size, self._sizes.steps)

    def _resize(self, train: int | None, micro: int, steps: int | None) -> None:
        held = {"backwards": self._backwards, "micro_steps": self.window_steps if self.counts_windows else 0}
        self._sizes = BatchSizes.agree(train, micro, steps, self.zero.group, **held)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self._groups()]

    def set_lr(self, lr: float | Sequence[float]) -> None:
        """Set the learning rate of all parameter groups, or of each."""
        values = lr if isinstance(lr, Sequence) else [lr] * len(self._groups())
        for group, value in zip(self._groups(), values, strict=True):
            group["lr"] = value

    def get_mom(self) -> list[Any]:
        """The betas, or the momentum, of each parameter group."""
        return [group.get("betas", group.get("momentum")) for group in self._groups()]

    def get_type(self) -> list[Any]:
        """The `type` that the client wrote into each parameter group, None where there is none."""
        return [group.get("type") for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def deepspeed_io(
        self, dataset: Any, batch_size: int | None = None, route: str = "train", pin_memory: bool | None = None,
        data_sampler: Iterable[int] | None = None, collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader:  # fmt: skip
        """A loader of this rank's micro-batches; shuffled for the route "train"."""
        group, size = self.zero.group, batch_size or self._sizes.micro
        options: dict[str, Any] = {"sampler": data_sampler, "collate_fn": collate_fn, "shuffle": route == "train"}
        options |= {"drop_last": self._config.dataloader_drop_last, "num_workers": num_local_io_workers or 0}
        options["pin_memory"] = self.device.type == "cuda" if pin_memory is None else pin_memory
        return DataLoader(dataset, size, rank=group.rank, world=group.size, **options)

    def save_checkpoint(
        self, save_dir: Any, tag: str | None = None, client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True, exclude_frozen_parameters: bool = False, asynchronous: bool = False,
    ) -> bool:  # fmt: skip
        """Save everything that an exact resume needs, and `client_state`; every rank calls it. Returns True.

        The tag is `global_step<N>` by default. Asynchronous: returns when the state is copied to host memory; an error
        of the writing is raised at the next call. Raises as `zs_ckpt.save`.
        """
        how = {"exclude_frozen": exclude_frozen_parameters, "asynchronous": asynchronous}
        checkpoint.save(self, save_dir, tag, client_state, latest=save_latest, **how)
        return True

    def load_checkpoint(
        self, load_dir: Any, tag: str | None = None, load_module_strict: bool = True,
        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False,
    ) -> tuple[str | None, Any]:  # fmt: skip
        """Load a checkpoint of any stage, world size and precision; every rank calls it.

        Returns its path and the client's state. Without a tag the newest; (None, None) and a warning where there is
        none. `load_module_only`: parameters and buffers, nothing else. Raises as `zs_ckpt.load`.
        """
        parts = {"optimizer": load_optimizer_states, "scheduler": load_lr_scheduler_states}
        return checkpoint.load(self, load_dir, tag, strict=load_module_strict, module_only=load_module_only, **parts)

    def save_16bit_model(
        self, save_dir: Any, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the module's weights in its own dtype to one file on rank 0. Collective. Returns True.

        A name that ends in .safetensors makes a safetensors file, tensor by tensor; any other one a file of torch's,
        for which all of them are in rank 0's memory.
        """
        checkpoint.save_16bit(self, save_dir, save_filename, exclude_frozen_parameters)
        return True

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """The module's whole weights on the CPU, at every stage. Collective."""
        return checkpoint.module_state_dict(self, exclude_frozen_parameters)

    def to(self, *args: Any, **kwargs: Any) -> Engine:
        """For code that moves every model: accepts what is so already, and raises ConfigError for anything else."""
        wanted: Any = torch._C._nn._parse_to(*args, **kwargs)[:2]
        here = next(self.module.parameters())
        same = wanted[0] is None or torch.empty(0, device=wanted[0]).device == self.device
        if not same or wanted[1] not in (None, here.dtype):
            raise ConfigError(f"an engine's model stays on {self.device} in {here.dtype}: move it before initialize()")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        raise ConfigError("an engine's model stays where and as it is: move or cast it before initialize()")

    def destroy(self) -> None:
        """Finish what is being saved; remove hooks, drop states: what is left is the module, whole. Collective."""
        while self.checkpointers:
            self.checkpointers.popitem()[1].close()
        self.zero.close(states=False)

    def __getattr__(self, name: str) -> Any:
        module = super().__getattr__("module")
        if name in NAMES["later"] and not hasattr(module, name):
            raise AttributeError(f"Engine.{name}: {NAMES['later'][name]}")
        return module if name == "module" else getattr(module, name)


def _method(name: str, doc: str, read: Callable[..., Any]) -> None:
    def method(self: Engine, *args: Any, **kwargs: Any) -> Any:
        return read(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, doc
    setattr(Engine, name, method)


def _call(path: str, engine: Engine, *args: Any, **kwargs: Any) -> Any:
    return operator.attrgetter(path)(engine)(*args, **kwargs)


for _name, _path in NAMES["getters"].items():
    _method(_name, f"`{_path}`", operator.attrgetter(_path))
for _name, _path in NAMES["calls"].items():
    _method(_name, f"See `{_path}`.", functools.partial(_call, _path))
for _name, _value in NAMES["constants"].items():
    _method(_name, f"{_value}: the feature is not there yet", functools.partial(lambda value, _: value, _value))
