"""Whole values where shards live: `gathered`, `full_state_dict`, `load_full_state_dict`. All are collective."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, RankDisagreement, broadcast, exchange

from .flat import Flat
from .flat_reading import ParamState
from .initialize import slice_of
from .runtime import Runtime
from .sharding import runtime_of
from .sync import checksum

Params = nn.Module | nn.Parameter | Iterable[nn.Parameter]


@contextmanager
def gathered(params: Params, *, modifier_rank: int | None = None) -> Iterator[None]:
    """Parameters of a sharded model are whole inside, for reading or changing; every rank enters and leaves.

    Changes are kept: made alike on every rank, or by one rank that `modifier_rank` (a rank of the data-parallel group)
    names, whose values then go to all.

    Raises:
        RankDisagreement: when ranks leave different values behind and no `modifier_rank` is given.
    """
    chosen = _flats_of(params)
    sliced = [
        part for param in _list(params) if (part := slice_of(param)) is not None
    ]  # built under Init, not sharded yet
    for part in sliced:
        part.fetch()
    for _, flat in chosen:
        flat.borrowers += 1
        flat.gather()
    for _, flat in chosen:
        flat.wait()
        flat.lend()
    try:
        yield
    finally:
        with torch.no_grad():
            for runtime, flat in chosen:
                flat.borrowers -= 1
                _take_back(runtime, flat, modifier_rank)
                unit = next(unit for unit in runtime.units if flat in unit.flats)
                if not unit.depth and not unit.pinned and not unit.running:
                    flat.release()
            for part in sliced:
                part.evict()


def full_state_dict(
    model: nn.Module, *, dtype: torch.dtype | None = None, rank0_only: bool = False, masters: bool = False
) -> dict[str, Tensor]:
    """`model.state_dict()` with whole tensors on the CPU, at every stage, gathered one unit at a time.

    Args:
        dtype: cast floating-point tensors to it.
        rank0_only: the other ranks take part and get an empty dictionary (memory for one copy only).
        masters: the fp32 masters instead of the 16-bit values of parameters that have them.
    """
    runtime = runtime_of(model)
    keep = not rank0_only or runtime.groups.dp.rank == 0
    values: dict[int, Tensor] = {}
    with torch.no_grad():
        for unit in runtime.units:
            before = [flat.state for flat in unit.flats]
            for flat in unit.flats:
                if masters and flat.has_masters:
                    for param in flat.params:
                        with runtime.moving(flat):
                            runtime.take_writes([flat])
                            held = flat.values()
                        value = runtime.whole_of(flat, param, held)
                        if keep:
                            values[id(param)] = _to_host(value, dtype)
                    continue
                flat.gather()
                flat.wait()
                for param in flat.params if keep else ():
                    values[id(param)] = _to_host(param.detach(), dtype)
            for flat, state in zip(unit.flats, before, strict=True):
                if state is ParamState.RELEASED:
                    flat.release()
    return _as_state_dict(model, values, dtype) if keep else {}


def load_full_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Takes whole tensors, the same on every rank, into parameters (masters too) and buffers, one unit at a time.

    Raises:
        ConfigError: for missing or unexpected names (unless not `strict`) and for shapes that do not fit; nothing is
            changed then.
    """
    runtime = runtime_of(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in _persistent(model)}
    known = params | buffers
    problems = [f"{name}: shape {tuple(v.shape)}, the model has {tuple(known[name].shape)}"
                for name, v in state_dict.items() if name in known and v.shape != known[name].shape]  # fmt: skip
    if strict:
        problems += [f"{name}: missing" for name in known if name not in state_dict]
        problems += [f"{name}: not in the model" for name in state_dict if name not in known]
    if problems:
        raise ConfigError("state does not fit the model: " + "; ".join(problems[:8]))
    with torch.no_grad():
        for name, param in params.items():
            if name in state_dict and not runtime.is_ignored(param):
                flat, _ = runtime.flat_of(param)
                value = state_dict[name].detach().reshape(-1)
                runtime.set_value(flat, param, value.to(runtime.device, flat.kept.value))
            elif name in state_dict:
                param.copy_(state_dict[name])
        for name, buffer in buffers.items():
            if name in state_dict:
                buffer.copy_(state_dict[name])


def _list(params: Params) -> list[nn.Parameter]:
    if isinstance(params, nn.Parameter):
        return [params]
    return list(params.parameters()) if isinstance(params, nn.Module) else list(params)


def _flats_of(params: Params) -> list[tuple[Runtime, Flat]]:
    chosen: dict[int, tuple[Runtime, Flat]] = {}
    for param in _list(params):
        flat = getattr(param, "_zs_flat", None)
        if flat is not None:
            chosen.setdefault(id(flat[1]), flat)
    return list(chosen.values())


def _take_back(runtime: Runtime, flat: Flat, modifier_rank: int | None) -> None:
    group = runtime.groups.dp
    flat.reattach()
    if modifier_rank is not None:
        broadcast(flat.whole, group, src=modifier_rank, label=flat.name)
    elif group.size > 1:
        values = [param.data for param in flat.params]
        sums = exchange(b"".join(checksum(v).to_bytes(8, "little") for v in values), group, label="gathered")
        for index, entry in enumerate(flat.plan.entries):
            if len({part[8 * index : 8 * index + 8] for part in sums}) > 1:
                raise RankDisagreement(
                    f"ranks left zs_zero.gathered with different values of {entry.spec.name!r}: change it alike on "
                    f"every rank, or name the rank that does with modifier_rank"
                )
    flat.adopt_writes(force=True)


def _to_host(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    target = dtype if dtype is not None and value.is_floating_point() else value.dtype
    copy = value.detach().to("cpu", target)
    return copy.clone() if copy.data_ptr() == value.data_ptr() else copy


def _as_state_dict(model: nn.Module, values: dict[int, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Values in the order and under the names of `model.state_dict()`: tied parameters under each of theirs."""
    result: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, param in module._parameters.items():
            if param is not None:
                result[dot + name] = values[id(param)] if id(param) in values else _to_host(param.detach(), dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                result[dot + name] = _to_host(buffer, dtype)
    return result


def _persistent(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }
