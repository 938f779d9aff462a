"""Rules between the keys of a configuration that concern offload, on data as it was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zs_comm.config import byte_size, dotted
from zs_comm.jsonfile import KeyPath

_OLD = (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param"))
_OLD_NAMES = (*_OLD, ("cpu_offload_params", "offload_param"))


def offload_rules(zero: Mapping[str, Any], within: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Rules inside `zero_optimization`: the key that has to change, and a text that names both.

    within: path of `zero` in the whole configuration, for the names in the texts; the paths that are given begin there.
    """
    stage = _given(zero, "stage")
    stage = 0 if stage is None else stage
    yield from ((within + path, text) for path, text in _old_spellings(zero))
    for name, stages, least in (("offload_optimizer", "1, 2 or 3", 1), ("offload_param", "3", 3)):
        section = _section(zero, name)
        device, key = _device(zero, name)
        if device not in ("cpu", "nvme"):
            continue
        if isinstance(stage, int) and stage < least:
            value = "true" if len(key) == 1 else repr(device)
            yield within + key, f"{value} needs {dotted((*within, 'stage'))} {stages} (it is {stage})"
        if device == "nvme" and not _given(section, "nvme_path"):
            yield (*within, name, "device"), f"'nvme' needs {dotted((*within, name, 'nvme_path'))}: a folder"
    yield from ((within + path, text) for path, text in _optimizer_rules(zero, within))


def _optimizer_rules(zero: Mapping[str, Any], within: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    section, (device, _) = _section(zero, "offload_optimizer"), _device(zero, "offload_optimizer")
    name = dotted((*within, "offload_optimizer"))

    def at(key: str) -> KeyPath:
        return ("offload_optimizer", key)

    gradients = _given(section, "zs_gradients")
    wishes = {"zs_gradients": gradients in ("cpu", "nvme"), "zs_state": _given(section, "zs_state") == "8bit"}
    wishes |= {key: _given(section, key) is True for key in ("zs_early_update", "super_offload")}
    for key in (key for key, wished in wishes.items() if wished and device == "none"):
        yield at(key), f"needs {name}.device 'cpu' or 'nvme' (it is 'none')"
    if gradients == "nvme" and device == "cpu" and not _given(section, "nvme_path"):
        yield at("zs_gradients"), f"'nvme' needs {name}.nvme_path: a folder"
    if _bytes(_given(section, "zs_max_in_cpu")) is not None:
        if device in ("none", "cpu"):
            yield at("zs_max_in_cpu"), f"needs {name}.device 'nvme' (it is {device!r})"
        elif device == "nvme" and _given(section, "ratio") not in (None, 1, 1.0):
            yield at("zs_max_in_cpu"), f"{name}.ratio says what stays in memory too: give one of them"
    if _given(section, "super_offload") is True and _given(section, "zs_early_update") is False:
        yield at("super_offload"), f"true is an early update, and {name}.zs_early_update is false: drop one of them"


def _old_spellings(zero: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    for old, name in _OLD_NAMES:
        said, device = _given(zero, old), _given(_section(zero, name), "device")
        if said is True and device in ("none", "nvme"):
            yield (old,), f"true is the old way to say {name}.device 'cpu', and that is {device!r}: drop one of them"
        if said is False and device in ("cpu", "nvme"):
            yield (old,), f"false is the old way to say {name}.device 'none', and that is {device!r}: drop one of them"
    one, other = (_given(zero, old) for old in ("cpu_offload_param", "cpu_offload_params"))
    if isinstance(one, bool) and isinstance(other, bool) and one != other:
        yield ("cpu_offload_params",), "is another name of cpu_offload_param, which says the opposite: drop one of them"
    pin = _given(zero, "cpu_offload_use_pin_memory")
    for _, name in _OLD:
        own = _given(_section(zero, name), "pin_memory")
        if isinstance(pin, bool) and isinstance(own, bool) and pin != own and _device(zero, name)[0] != "none":
            text = f"is the old way to say {name}.pin_memory, which says the opposite: drop one of them"
            yield ("cpu_offload_use_pin_memory",), text


def limit_rules(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[KeyPath, str]]:
    """Rules of `host_memory_limit` and `activation_memory`, whose names begin with `prefix` in `data`."""
    limit, part = (_bytes(data.get(f"{prefix}{name}")) for name in ("host_memory_limit", "activation_memory"))
    path = (f"{prefix}activation_memory",)
    if part is not None and data.get(f"{prefix}host_memory_limit") in (None, "auto"):
        yield path, f"is a part of {prefix}host_memory_limit, which is not given"
    elif part is not None and limit is not None and part >= limit:
        yield path, f"{part} bytes leave nothing of {prefix}host_memory_limit ({limit} bytes)"


def aio_rules(aio: Any, within: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Rules inside `aio`."""
    old, new = (
        _given(aio, key) if isinstance(aio, Mapping) else None for key in ("thread_count", "intra_op_parallelism")
    )
    if old is not None and new is not None and old != new:
        yield (*within, "thread_count"), f"is the old name of intra_op_parallelism, which is {new}: drop one of them"


def with_old_spellings(zero: Mapping[str, Any]) -> dict[str, Any]:
    """`zero` with what the old spellings ask for in the sections."""
    result = dict(zero)
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        if section not in (None, "auto") and not isinstance(section, Mapping):
            continue  # said of the key itself
        found = dict(section) if isinstance(section, Mapping) else {}
        if _device(zero, name)[0] == "cpu" and _given(found, "device") is None:
            found["device"] = "cpu"
        pin = _given(zero, "cpu_offload_use_pin_memory")
        if isinstance(pin, bool) and _given(found, "device") == "cpu" and _given(found, "pin_memory") is None:
            found["pin_memory"] = pin
        if found:
            result[name] = found
    return result


def _device(zero: Mapping[str, Any], name: str) -> tuple[str, KeyPath]:
    """ "none", "cpu" or "nvme", and the key that says so; "" for what is said of the key itself."""
    device = _given(_section(zero, name), "device")
    if device is None:
        old = next((old for old, new in _OLD_NAMES if new == name and zero.get(old) is True), None)
        return ("cpu", (old,)) if old else ("none", (name, "device"))
    return (device if device in ("none", "cpu", "nvme") else ""), (name, "device")


def _section(zero: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = zero.get(name)
    return section if isinstance(section, Mapping) else {}


def _given(section: Mapping[str, Any], key: str) -> Any:
    """The value of a key; None where it stands for the default."""
    value = section.get(key)
    return None if isinstance(value, str) and value == "auto" else value


def _bytes(value: Any) -> int | None:
    try:
        size = byte_size(value)
    except ValueError:
        return None  # said of the key itself
    return size if size >= 0 else None
