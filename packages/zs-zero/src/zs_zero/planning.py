"""From a model to its plan: how it is to be sharded, and what must be the same on all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .initialize import slice_of
from .loss_scale import LossScale
from .plan import FlatPlan, ParamSpec, Plan, make_plan
from .precision import Kept, Precision
from .tiers.policy import Offload
from .units import UnitChoice, UnitSpec


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is sharded. See `zs_zero.shard`."""

    stage: int
    units: UnitChoice = None
    dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reduce_dtype_of: Mapping[type[nn.Module], torch.dtype] = field(default_factory=dict)
    reshard_after_forward: bool = True
    prefetch: bool = True
    broadcast_buffers: bool = False
    predivide_factor: float = 1.0
    prescale: bool = False
    sparse_gradients: bool = False
    has_optimizer: bool = True
    whole: frozenset[int] = frozenset()  # ids of the parameters that the optimizer needs whole
    loss_scale: LossScale | None = None
    cast_inputs: torch.dtype | None = None
    autocast: torch.dtype | None = None
    precision: Precision = field(default_factory=Precision)
    buffer_dtype: torch.dtype | None = None
    offload: Offload = field(default_factory=Offload)
    states: tuple[str, ...] = ()  # element-wise ones of the optimizer, where it is offloaded
    by_blocks: bool = True  # an offloaded optimizer may be stepped a part at a time


def plan_of(model: nn.Module, specs: Sequence[UnitSpec], options: Options, *, slices: int) -> Plan:
    """The plan of a model whose units are `specs`."""
    chosen = options.reduce_dtype_of
    wires = {id(p): chosen[type(m)] for m in model.modules() if type(m) in chosen for p in m.parameters(False)}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    # whole gradients wait for the step at stages 0 and 1: there the ranks can tell each other which rows there are
    rows = {id(m.weight) for m in tables if (options.sparse_gradients or m.sparse) and options.stage <= 1}

    def spec_of(name: str, param: nn.Parameter) -> ParamSpec:
        return ParamSpec(
            name,
            tuple(param.shape),
            _dtype_of(param, options.dtype),
            param.requires_grad,
            whole=id(param) in options.whole,
            wire=wires.get(id(param)),
            rows=id(param) in rows,
        )

    units = [(spec.name, spec.modules, [spec_of(*item) for item in spec.params.items()]) for spec in specs]
    return make_plan(units, slices=slices)


def _dtype_of(param: nn.Parameter, wanted: torch.dtype | None) -> torch.dtype:
    if not param.is_floating_point():
        return param.dtype
    sliced = slice_of(param)
    return wanted or (sliced.dtype if sliced is not None else None) or param.dtype


def kept_of(flat: FlatPlan, options: Options) -> Kept:
    """In which dtypes a flat's numbers are kept."""
    return (options.precision if flat.trainable else Precision()).of(flat.dtype)


def description(model: nn.Module, plan: Plan, options: Options) -> str:
    """What every rank has to bring alike, a line for each thing."""
    lines = [f"stage {options.stage}", f"dtype {options.dtype}", f"slices {plan.slices}"]
    # what is not asked for is not said: a message about two models shows the first few hundred characters of each
    lines += [f"{options.precision}"] if options.precision != Precision() else []
    more: dict[str, object] = {
        "buffers in": options.buffer_dtype,
        "loss scale": options.loss_scale,
        "autocast": options.autocast,
    }
    more["offload"] = options.offload.described() if options.offload else None
    lines += [f"{what} {value}" for what, value in more.items() if value is not None]
    for unit in plan.units:
        for flat in unit.flats:
            for entry in flat.entries:
                kind = (" whole" if entry.spec.whole else "") if entry.spec.trainable else " frozen"
                kind += " rows" if entry.spec.rows else ""
                lines.append(f"{entry.spec.name} {entry.spec.shape} {entry.spec.dtype}{kind} in {unit.name!r}")
    lines += [f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in model.named_buffers()]
    return "\n".join(lines)
