"""Building a model that never stands whole on a rank: construction under `Init`, and models on the meta device.

Under `Init` each parameter is built in full by its own module, so random streams are used up as ever and the bits are
those of an ordinary construction. A few stay whole; the oldest then keeps this rank's slice of rank 0's values only.
Code that touches such a parameter later (a parent that initialises its children again) gets it back whole.
No class is patched: torch calls a hook when a module registers a parameter.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from zs_comm import ConfigError, Group, all_gather, as_group, scatter

from .released import classes_of
from .units import UnitSpec

_LIVE_NUMEL = 1 << 22  # elements that may be whole at a time: enough for a layer to initialise itself without traffic


class _Slice:
    """A parameter of which this rank keeps one slice of rank 0's values."""

    def __init__(self, param: nn.Parameter, name: str, group: Group, dtype: torch.dtype | None) -> None:
        self.param = param
        self.name = name
        self.group = group
        self.dtype = dtype  # asked for by Init; the values stay as built until `shard` takes masters and casts
        self.numel = param.numel()
        self.slice_numel = -(-self.numel // group.size)
        self.values: Tensor | None = None
        self._classes = classes_of(param)

    @torch.no_grad()
    def evict(self) -> None:
        if self.values is not None and self.param.__class__ is self._classes[1]:
            return
        if not self.param.is_contiguous():
            self.param.data = self.param.data.contiguous()
        data = self.param.data
        padded = None
        if self.group.rank == 0:
            padded = data.reshape(-1)
            if padded.numel() != self.slice_numel * self.group.size:
                padded = data.new_zeros(self.slice_numel * self.group.size)
                padded[: self.numel].copy_(data.reshape(-1))
        self.values = data.new_empty(self.slice_numel)
        scatter(padded, self.values, self.group, src=0, label=self.name)
        del data, padded
        if self.shared_storage:  # whoever holds the other tensor keeps its memory, and with it valid (old) values
            self.param.data = torch.empty_like(self.param)
        self.param.untyped_storage().resize_(0)
        self.param.__dict__["_zs_name"] = self.name
        self.param.__class__ = self._classes[1]

    @torch.no_grad()
    def fetch(self) -> None:
        if self.param.__class__ is self._classes[0] or self.values is None:
            return
        self.param.__class__ = self._classes[0]
        storage = self.param.untyped_storage()
        storage.resize_(self.slice_numel * self.group.size * self.values.element_size())
        whole = self.values.new_empty(0).set_(storage, 0, (self.slice_numel * self.group.size,), (1,))
        all_gather(whole, self.group, shard=self.values, label=self.name)

    @property
    def shared_storage(self) -> bool:
        """Somebody holds another tensor of the same memory (`param.data` in a variable): it must not go away now."""
        storage = self.param.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) > 2  # the parameter's and the one just made


class Init:
    """Context in which modules are built already sharded over the data-parallel ranks (stage 3). Collective.

    Peak memory is this rank's slices, `live_numel` elements and the largest parameter. Pass the model to
    `zs_zero.shard` (or an engine) afterwards. At world 1, or with a configuration of another stage, it does nothing.

    Args:
        module: shard this existing module instead (then no `with` is needed).
        config_dict_or_path: a configuration: its `zero_optimization.stage` decides whether there is anything to do and
            its `bf16.enabled` or `fp16.enabled` sets `dtype`.
        mesh: the data-parallel ranks, as in `zs_zero.shard`.
        dtype: dtype of floating-point parameters after `zs_zero.shard`; they are built, and kept, in theirs before.
        enabled: False makes it do nothing.
        live_numel: elements that may stay whole at a time while the model is built.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        config_dict_or_path: Mapping[str, Any] | str | Path | None = None,
        mesh: Any = None,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        live_numel: int = _LIVE_NUMEL,
    ) -> None:
        stage, from_config = _read(config_dict_or_path)
        self._dtype = dtype or from_config
        self._live_numel = live_numel
        self._group = as_group(mesh, axis="dp")
        self._enabled = enabled and stage == 3 and self._group.size > 1
        self._slices: dict[int, _Slice] = {}
        self._live: list[_Slice] = []  # oldest first
        self._handle: Any = None
        if module is not None and self._enabled:
            for name, param in module.named_parameters():
                self._add(param, name)
            self._evict(0, force=True)
            self._finish()

    def __enter__(self) -> "Init":
        if self._enabled:
            self._handle = register_module_parameter_registration_hook(self._registered)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            if kind is None:
                self._evict(0, force=True)
            self._finish()

    def _registered(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and id(param) not in self._slices and param.device.type != "meta":
            self._add(param, f"{type(module).__name__}.{name}")
            self._evict(self._live_numel, keep=self._live[-1:])

    def _add(self, param: nn.Parameter, name: str) -> None:
        part = _Slice(param, name, self._group, self._dtype)
        self._slices[id(param)] = part
        self._live.append(part)
        param.__dict__["_zs_slice"] = part
        param.__dict__["_zs_fetch"] = self._fetch

    def _fetch(self, params: Iterable[nn.Parameter]) -> None:
        parts = [self._slices[id(param)] for param in params]
        for part in parts:
            part.fetch()
            if part not in self._live:
                self._live.append(part)
        self._evict(self._live_numel, keep=parts)

    def _evict(self, limit: int, *, keep: list[_Slice] | None = None, force: bool = False) -> None:
        """Leaves at most `limit` elements whole, besides `keep` and (unless `force`) what somebody holds a view of."""
        whole = sum(part.numel for part in self._live)
        for part in list(self._live):
            if whole <= limit:
                return
            if part in (keep or []) or (not force and part.shared_storage):
                continue
            part.evict()
            self._live.remove(part)
            whole -= part.numel

    def _finish(self) -> None:
        for part in self._slices.values():
            part.param.__dict__.pop("_zs_fetch", None)


def slice_of(param: nn.Parameter) -> _Slice | None:
    """What `Init` left of a parameter that has not been given to `shard` yet."""
    part = param.__dict__.get("_zs_slice")
    return part if isinstance(part, _Slice) else None


def bring(param: nn.Parameter) -> None:
    """Makes a parameter whole that `Init` sliced, for good. Collective."""
    part = slice_of(param)
    if part is not None:
        part.fetch()
        part.values = None
        del param.__dict__["_zs_slice"]


def materialize(model: nn.Module, spec: UnitSpec, device: torch.device) -> None:
    """Gives a unit's parameters on the meta device values, by the `reset_parameters` of the modules that hold them.

    Raises:
        ConfigError: for a module without `reset_parameters`.
    """
    wanted = {id(param) for param in spec.params.values() if param.is_meta}
    if not wanted:
        return
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) in wanted]
        if not own:
            continue
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise ConfigError(
                f"module {name!r} ({type(module).__name__}) is on the meta device and has no reset_parameters() that "
                f"could give its parameters values"
            )
        for param in own:
            if param.is_meta:
                # swapped, not replaced: the optimizer, and modules that share it, hold this very object
                torch.utils.swap_tensors(
                    param, nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
                )
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=device)
        reset()


def _read(config: Mapping[str, Any] | str | Path | None) -> tuple[int, torch.dtype | None]:
    if config is None:
        return 3, None
    if isinstance(config, Mapping):
        data: Mapping[str, Any] = config
    else:
        from zs_comm.jsonfile import read_json

        data, _ = read_json(config)
    zero = data.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    for name, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        section = data.get(name)
        if isinstance(section, Mapping) and section.get("enabled") is True:
            return stage, dtype
    return stage, None
