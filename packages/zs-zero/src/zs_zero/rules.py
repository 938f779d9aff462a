"""Rules between the sections of a DeepSpeed configuration that concern precision, stage and offload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zs_comm.jsonfile import KeyPath

from .offload_rules import aio_rules, limit_rules, offload_rules
from .types_config import canonical


def contradictions(data: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Rules between sections: the key that has to change, and a text that names both."""

    def on(section: str, key: str = "enabled") -> bool:
        inner = data.get(section)
        return isinstance(inner, Mapping) and inner.get(key) is True

    bf16, stage = "bfloat16" if "bfloat16" in data else "bf16", _stage(data.get("zero_optimization"))
    for first, second in (("fp16", bf16), ("amp", "fp16"), ("amp", bf16), ("torch_autocast", "amp")):
        if on(first) and on(second):
            yield (first, "enabled"), f"{first}.enabled and {second}.enabled are both true: choose one"
    autocast = data.get("torch_autocast")
    cast = canonical(autocast.get("dtype")) if isinstance(autocast, Mapping) and on("torch_autocast") else None
    for section, name, other in (("fp16", "fp16", "bf16"), (bf16, "bf16", "fp16")):
        if on(section) and cast == other:
            text = f"{other}, and {section}.enabled makes the model {name}: give {name}, or disable one of them"
            yield ("torch_autocast", "dtype"), text
    for section in ("fp16", bf16):
        key = f"{'fp16' if section == 'fp16' else 'bf16'}_master_weights_and_grads"
        if on(section) and on(section, key) and stage == 0:
            yield (section, key), f"{section}.{key} needs zero_optimization.stage 1, 2 or 3 (it is 0)"
    if on(bf16) and on(bf16, "bf16_optimizer_states") and not on(bf16, "bf16_master_weights_and_grads"):
        yield (bf16, "bf16_optimizer_states"), f"needs {bf16}.bf16_master_weights_and_grads: true"
    update = data.get("zs_bf16_update", "plain")
    if update in ("stochastic_rounding", "kahan") and not (on(bf16) and on(bf16, "bf16_master_weights_and_grads")):
        yield ("zs_bf16_update",), f"{update} needs {bf16}.enabled and {bf16}.bf16_master_weights_and_grads: true"
    if data.get("sparse_gradients") is True and stage in (2, 3):
        text = f"needs whole gradients at the step: zero_optimization.stage 0 or 1 (it is {stage})"
        yield ("sparse_gradients",), text
    if on("data_efficiency") and on("curriculum_learning"):
        yield ("curriculum_learning", "enabled"), "data_efficiency.enabled is true too: choose one curriculum"
    fp16 = data.get("fp16")
    if on("fp16") and isinstance(fp16, Mapping) and not fp16.get("loss_scale"):
        yield from _dynamic_scale(fp16)
    types = data.get("data_types")
    wanted = types.get("param_dtype") if isinstance(types, Mapping) else None
    chosen = "fp16" if on("fp16") else "bf16" if on(bf16) else "fp32"
    wanted = canonical(wanted)
    if wanted in ("fp32", "bf16", "fp16") and wanted != chosen:
        text = f"data_types.param_dtype is {wanted!r}, and fp16.enabled and {bf16}.enabled make it {chosen!r}"
        yield ("data_types", "param_dtype"), text
    zero = data.get("zero_optimization")
    if isinstance(zero, Mapping):
        yield from offload_rules(zero, ("zero_optimization",))
    yield from limit_rules(data, "zs_")
    yield from aio_rules(data.get("aio"), ("aio",))


def _dynamic_scale(fp16: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    least, power = fp16.get("min_loss_scale", 1), fp16.get("initial_scale_power", 16)
    if not isinstance(least, int | float) or not isinstance(power, int | float) or abs(least) > 1e300:
        return  # said of the key itself
    if least == 0:
        yield ("fp16", "min_loss_scale"), "a dynamic loss scale needs a minimum above 0 (got 0)"
    elif 0 <= power <= 127 and least > 2**power:
        text = f"fp16.min_loss_scale is {least:g}, above the scale to begin with: fp16.initial_scale_power is {power:g}"
        yield ("fp16", "min_loss_scale"), text


def _stage(section: Any) -> Any:
    return section.get("stage", 0) if isinstance(section, Mapping) else int(section is True)
