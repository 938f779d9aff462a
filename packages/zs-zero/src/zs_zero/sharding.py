"""`shard`: the entrance. A model and an optimizer in, the same model sharded and its optimizer out."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from zs_comm import CommError, ConfigError, Group, Mesh, as_group

from .checkpoint import ModelState, ShardableHook
from .loss_scale import LossScale, as_loss_scale
from .optimizer import ZeroOptimizer
from .planning import Options
from .precision import Bf16Update, Precision
from .reducer import Groups
from .requirements import requirement, requirements
from .runtime import Runtime
from .tiers.policy import Offload
from .units import UnitChoice

_SIXTEEN_BIT_OR_FULL = (torch.float32, torch.bfloat16, torch.float16)


def shard(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    stage: int = 3,
    mesh: Any = None,
    units: UnitChoice = None,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    prefetch: bool = True,
    ignore: Iterable[nn.Module | nn.Parameter | str] = (),
    broadcast_buffers: bool = False,
    predivide_factor: float = 1.0,
    prescale: bool = False,
    sparse_gradients: bool = False,
    allow_untested_optimizer: bool = False,
    loss_scale: LossScale | float | None = None,
    cast_inputs: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    reduce_dtype_of: Mapping[type[nn.Module], torch.dtype] | None = None,
    master_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    grad_accum_dtype: torch.dtype | None = None,
    buffer_dtype: torch.dtype | None = None,
    bf16_update: Bf16Update = "plain",
    seed: int = 0,
    device: torch.device | str | None = None,
    offload_optimizer: Any = None,
    offload_param: Any = None,
    aio: Any = None,
    host_memory_limit: int | str | None = None,
    activation_memory: int | str | None = None,
) -> ZeroOptimizer:
    """Shards `model` in place over data-parallel ranks and returns the optimizer to step. Collective.

    Names and identities of modules and parameters stay; the loop stays `loss.backward(); optimizer.step();
    optimizer.zero_grad()`, and `step()` ends an accumulation window. Without an optimizer the model can be evaluated.

    Args:
        model: any module, on one device (or meta: then built unit by unit by its `reset_parameters`).
        optimizer: over this model's parameters; at stages 1-3 one of which is known what it must see of a parameter
            (`zs_zero.requirements`): element-wise ones of torch.optim, `zs_zero.optimizers`, your own that say it.
        stage: 0 replicate, 1 shard optimizer state, 2 also gradients, 3 also parameters (ZeRO, section 5).
        mesh: the data-parallel ranks: None (all), a `zs_comm.Mesh` (its dp axis, replicate x shard where it has them),
            a `zs_comm.Group`, a torch `ProcessGroup`, or a torch `DeviceMesh` (1-d: shard; 2-d: replicate x shard).
        units: what is gathered and reduced together: module classes, names, or `callable(name, module) -> bool`. The
            default, the model's blocks, is shown by `print(optimizer.plan)`.
        dtype: cast floating-point parameters to this dtype; 16-bit ones get fp32 masters, taken before the cast.
        reduce_dtype: dtype of gradients on the wire (sums run in fp32); default: the parameters'.
        reshard_after_forward: False keeps units whole from forward to backward (more memory, fewer bytes).
        prefetch: gather the next unit ahead, in the order seen last time.
        ignore: modules, parameters or names that stay whole, local and unreduced.
        broadcast_buffers: send rank 0's buffers before every training forward (as DDP does); else they stay local.
        predivide_factor: gradients are divided by it before the sum and by world / predivide_factor after it.
        prescale: divide gradients by world before the sum instead of after it.
        sparse_gradients: of gradients of `nn.Embedding` and `nn.EmbeddingBag` only those rows travel that some rank
            touched (stages 0 and 1; those built with `sparse=True` do it anyway). The sums are the same, bit for bit;
            the global norm adds them in another order.
        allow_untested_optimizer: accept an optimizer that is not known to be element-wise.
        loss_scale: losses go through `optimizer.scale(loss).backward()`, gradients are divided by it at the step, and a
            step with gradients that are not finite on any rank is skipped. `DynamicLossScale()` is what fp16 needs; a
            number is a static scale, of which 1.0 only skips steps. None: nothing is scaled, every step is taken.
        cast_inputs: cast floating-point tensors among the arguments of the model's forward to this dtype.
        autocast: run the model's forward under `torch.autocast` with this dtype; fp16 needs a `loss_scale` too.
        reduce_dtype_of: by module class, another `reduce_dtype` for the parameters that such modules hold directly.
        master_dtype: of the weights that the optimizer updates: torch.float32 (the default for 16-bit parameters), or
            the parameters' own, and there are no masters.
        state_dtype: of element-wise optimizer states between steps: torch.float32 or torch.bfloat16; default: the
            masters' dtype. Where it is another one the optimizer works on fp32 copies.
        grad_accum_dtype: in which the gradients of several backwards are added (default: the parameters' dtype). Where
            it is another one they stand outside of `param.grad`, which torch's own clipping then does not see.
        buffer_dtype: cast floating-point buffers to this dtype; default: they keep theirs.
        bf16_update: how bf16 parameters without fp32 masters take an update: "plain", as torch does; or in fp32, with
            the result rounded by chance ("stochastic_rounding") or what rounding cuts off kept in 16 more bits
            ("kahan": the numbers of fp32 masters; Zamirai et al., "Revisiting BFloat16 Training", 2020). Implies
            `master_dtype=torch.bfloat16`.
        seed: of stochastic rounding, whose choices depend on it, the number of the step, and the element; not on ranks.
        device: where the sharded model lives; default: where its parameters are.
        offload_optimizer: where masters, optimizer states and gradients live, as that section of a configuration says
            it: `{"device": "cpu"}` or `{"device": "nvme", "nvme_path": folder}` and more (stages 1-3).
        offload_param: the same for this rank's parameters, frozen ones too (stage 3).
        aio: how files are moved, as the configuration's section says it.
        host_memory_limit: bytes (or "4GiB") that this process may take above its size now: planned for, obeyed, and
            held against what was measured in `offload_report()`.
        activation_memory: the part of that limit that is left to activations; default: an eighth.

    Raises:
        ConfigError: for an impossible combination, a model without parameters, or an optimizer that does not fit.
        RankDisagreement: when ranks bring different models or options.
    """
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"stage is 0, 1, 2 or 3 (got {stage!r})")
    wires = {f"reduce_dtype_of[{cls.__name__}]": chosen for cls, chosen in (reduce_dtype_of or {}).items()}
    dtypes = {"dtype": dtype, "reduce_dtype": reduce_dtype, "buffer_dtype": buffer_dtype, "cast_inputs": cast_inputs}
    if autocast is not None and autocast not in _SIXTEEN_BIT_OR_FULL[1:]:
        raise ConfigError(f"autocast is torch.bfloat16 or torch.float16 (got {autocast})")
    for name, value in (dtypes | wires).items():
        if value is not None and value not in _SIXTEEN_BIT_OR_FULL:
            raise ConfigError(f"{name} is torch.float32, torch.bfloat16 or torch.float16 (got {value})")
    if sparse_gradients and stage > 1:
        raise ConfigError(
            f"sparse_gradients needs whole gradients at the step, which stages 0 and 1 have (stage is {stage})"
        )
    if not predivide_factor > 0:
        raise ConfigError(f"predivide_factor is a number above 0 (got {predivide_factor!r})")
    before = getattr(model, "_zs_runtime", None)
    if isinstance(before, Runtime) and not before.closed and before.model is model:
        raise ConfigError(f"this {type(model).__name__} is sharded already: close() its optimizer first")
    groups = _groups(mesh, stage)
    ignored = _ignored(model, ignore)
    _check_not_shared(model, ignored)
    offload = Offload()
    if any(v is not None for v in (offload_optimizer, offload_param, aio, host_memory_limit, activation_memory)):
        from .offload_config import offload_of  # pydantic costs 0.2 s: not at import

        offload = offload_of(
            offload_optimizer, offload_param, aio, stage=stage, host_memory_limit=host_memory_limit,
            activation_memory=activation_memory,
        )  # fmt: skip
    needs: dict[int, str] = {}
    by_elements, by_blocks = True, offload.moves
    if optimizer is not None:
        _check_optimizer(model, optimizer)
        in_files = "files" in (offload.optimizer.tier, offload.parameters.tier)
        needs = requirements(optimizer, stage=stage, allow_untested=allow_untested_optimizer, files=in_files)
        by_elements = all(requirement(optimizer, group) == "elements" for group in optimizer.param_groups)
        by_blocks = by_elements and offload.moves
        if in_files and not by_elements:
            raise ConfigError(
                f"{type(optimizer).__name__} is not known to be element-wise, and files give it a block at a time: "
                f"say by __zs_requires__ = 'elements' that it is, and that several step() calls in a step do no harm"
            )
    options = Options(
        stage=stage,
        units=units,
        dtype=dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard_after_forward,
        prefetch=prefetch,
        broadcast_buffers=broadcast_buffers,
        predivide_factor=predivide_factor,
        prescale=prescale,
        sparse_gradients=sparse_gradients,
        has_optimizer=optimizer is not None,
        whole=frozenset(key for key, need in needs.items() if need == "whole"),
        loss_scale=as_loss_scale(loss_scale),
        cast_inputs=cast_inputs,
        autocast=autocast,
        reduce_dtype_of=dict(reduce_dtype_of or {}),
        precision=Precision(
            master=master_dtype, state=state_dtype, accum=grad_accum_dtype, update=bf16_update, seed=seed
        ),
        buffer_dtype=buffer_dtype,
        offload=offload,
        states=_states(optimizer) if offload and by_elements and optimizer is not None else (),
        by_blocks=by_blocks,
    )
    with torch.no_grad():
        runtime = Runtime(model, groups, options, ignored=ignored, device=_device(model, device))
        # how gathered() and full_state_dict() find the runtime; object.__setattr__ because it is no part of the module
        object.__setattr__(model, "_zs_runtime", runtime)
        zero = _optimizer(runtime, optimizer)
        if options.loss_scale is not None:
            options.loss_scale.owner = runtime
        hook = ShardableHook(lambda: ModelState(runtime, zero))
        object.__setattr__(model, "__zs_shardable__", hook)  # how zs-ckpt finds what this rank holds
        return zero


def _optimizer(runtime: Runtime, client: torch.optim.Optimizer | None) -> ZeroOptimizer:
    """What failed takes the sharding off the model again."""
    try:
        return ZeroOptimizer(runtime, client)
    except Exception as error:
        try:
            runtime.close(gather=not isinstance(error, CommError))
        except OSError:
            runtime.closed = False
            runtime.close(gather=False)
        raise


def _states(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The element-wise states that an offloaded optimizer will make."""
    from .tiers.blocks import probe_states

    try:
        return probe_states(optimizer)
    except Exception as error:
        kind = type(optimizer).__name__
        raise ConfigError(f"{kind} cannot be offloaded: a copy of it failed on trial ({error})") from error


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a sharded model.

    Raises:
        ConfigError: when `model` was not given to `shard`.
    """
    runtime = getattr(model, "_zs_runtime", None)
    if not isinstance(runtime, Runtime) or runtime.model is not model:
        raise ConfigError(f"this {type(model).__name__} is not sharded: give it to zs_zero.shard first")
    return runtime


def _groups(mesh: Any, stage: int) -> Groups:
    single = Group.single()
    others: tuple[Group, ...] = ()
    if isinstance(mesh, Mesh):
        others = tuple(group for group in map(mesh.group, ("pp", "sp", "tp")) if group.size > 1)
        dp, sharding, replicating = mesh.group("dp"), mesh.group("shard"), mesh.group("replicate")
    elif getattr(mesh, "ndim", 1) == 2 and hasattr(mesh, "get_group"):  # a torch DeviceMesh
        dp = as_group(axis="dp")
        if mesh.size() != dp.size:
            raise ConfigError(f"mesh has {mesh.size()} ranks, the world has {dp.size}: give a zs_comm.Mesh of parts")
        replicating = as_group(mesh.get_group(0), axis="replicate", hub=dp.hub)
        sharding = as_group(mesh.get_group(1), axis="shard", hub=dp.hub)
    else:
        dp = as_group(mesh, axis="dp")
        sharding, replicating = dp, single
    return Groups.of(dp, single, dp, others) if stage == 0 else Groups.of(dp, sharding, replicating, others)


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    kinds = {param.device for param in model.parameters()} - {torch.device("meta")}
    if len(kinds) > 1:
        raise ConfigError(
            f"parameters on several devices ({', '.join(sorted(map(str, kinds)))}): move the model to one"
        )
    if kinds:
        return next(iter(kinds))
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _ignored(model: nn.Module, ignore: Iterable[nn.Module | nn.Parameter | str]) -> list[nn.Parameter]:
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    found: list[nn.Parameter] = []
    for item in ignore:
        if isinstance(item, str):
            if item not in modules and item not in params:
                raise ConfigError(f"ignore: {item!r} names no module or parameter of the model")
            item = modules[item] if item in modules else params[item]
        found += [item] if isinstance(item, nn.Parameter) else list(item.parameters())
    return found


def _check_not_shared(model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
    alone = {id(param) for param in ignored}
    for name, param in model.named_parameters():
        found = param.__dict__.get("_zs_flat")
        if found is not None and id(param) not in alone:
            runtime: Runtime = found[0]
            there = next(other for other, one in runtime.model.named_parameters() if one is param)
            raise ConfigError(
                f"{name!r} is sharded already, as {there!r} of a {type(runtime.model).__name__}: shard the two as one, "
                f"close() the other's optimizer, or give the parameter in ignore"
            )


@contextlib.contextmanager
def closed_on_error(zero: ZeroOptimizer) -> Iterator[None]:
    """An error of the body, which has to be one on all ranks, takes the sharding off the model before it goes on.

    The parameters are whole then; not after an error of a collective, when nothing can be gathered.
    """
    try:
        yield
    except Exception as error:
        zero.close(parameters=not any(isinstance(one, CommError) for one in (error, error.__cause__)))
        raise


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer should be a torch.optim.Optimizer (got {optimizer!r})")
    known = {id(param) for param in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if id(param) not in known:
                raise ConfigError(
                    f"param_groups[{number}]['params'][{position}] of the optimizer (shape {tuple(param.shape)}) is no "
                    f"parameter of the model; build the optimizer over model.parameters()"
                )
