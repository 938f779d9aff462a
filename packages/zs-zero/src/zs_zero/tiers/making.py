"""From a plan and options to tiers, and to where each flat's numbers are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..planning import kept_of
from ..precision import Kept
from .budget import Setting
from .opening import is_plain
from .tiers import Tiers, codecs_of

if TYPE_CHECKING:
    from ..plan import FlatPlan, Plan
    from ..planning import Options
    from ..reducer import Groups


def is_apart(device: torch.device) -> bool:
    """Whether a device has memory of its own."""
    return device.type != "cpu"


def make_tiers(plan: Plan, options: Options, groups: Groups, *, slices: int, meta: Iterable[str]) -> Tiers:
    """The tiers of a model of which this rank holds `slices` slices. `meta`: names of parameters without memory yet.

    Raises ConfigError where the plan does not fit, OSError for folders and space; on all ranks.
    """
    flats, files = list(plan.flats()), (options.offload.optimizer_files, options.offload.parameter_files)
    kept = [kept_of(flat, options) for flat in flats]
    names = set(meta)
    setting = Setting(
        slices=slices,
        world=groups.shard.size,
        kept=kept,
        grad_dtypes=[grad_dtype(flat, own, options, groups) for flat, own in zip(flats, kept, strict=True)],
        states=options.states if options.has_optimizer else (),
        new=[flat.entries[0].spec.name in names for flat in flats],
        releases=options.stage == 3,
        trains=options.has_optimizer,
        plain_files=any(is_plain(one) for one in files if one is not None),
        codecs=codecs_of(options.states) if options.offload.optimizer.eight_bit else {},
    )
    tiers = Tiers(plan, options.offload, setting, group=groups.dp)
    if any(tiers.plan.parameters_away):  # a part that cannot be read is an error for replicas as well
        tiers.told = groups.gather if groups.shard.size == groups.dp.size else groups.dp.channel(1)
    return tiers


def state_device(options: Options, device: torch.device) -> torch.device | None:
    """Where masters and reduced gradients are; None: with the parameters."""
    leaves = options.offload.optimizer.tier != "device" and options.by_blocks
    return torch.device("cpu") if leaves and is_apart(device) else None


def placed(flat: FlatPlan, options: Options, groups: Groups, device: torch.device) -> dict[str, Any]:
    """The keywords of `Flat` that say where masters and gradients are, with tiers."""
    return {
        "grad_dtype": grad_dtype(flat, kept_of(flat, options), options, groups),
        "state_device": state_device(options, device),
        "apart": is_apart(device),
        "pin_states": options.offload.optimizer.pin_memory,
        "pin_parameters": options.offload.parameters.pin_memory,
    }


def grad_dtype(flat: FlatPlan, kept: Kept, options: Options, groups: Groups) -> torch.dtype:
    """Of reduced gradients that wait for the step of an offloaded optimizer: the dtype they come in suffices."""
    if not options.by_blocks:
        return kept.grad
    wire = flat.wire or options.reduce_dtype or flat.dtype
    return kept.accum if groups.dp.size == 1 or wire == kept.accum else kept.grad
