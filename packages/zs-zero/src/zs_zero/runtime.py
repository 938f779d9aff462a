"""The one ZeRO runtime: stages 0-3 are lifetimes in one table (ZeRO, section 5).

    stage   parameters                        gradients                         optimizer state, fp32 masters
    0       whole                             all-reduced at the step           whole
    1       whole                             reduce-scattered at the step      shard
    2       whole                             reduce-scattered in backward      shard
    3       shard; whole while a unit runs    reduce-scattered in backward      shard

Among one rank every stage is stage 0: there is nobody to share with.
"""

import logging
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import CommError, ConfigError, Group, ZsError, agreed, broadcast

from . import casting
from .access import ParameterAccess
from .autograd import BackwardTasks, call_if_alive, in_backward
from .flat import Flat
from .flat_reading import ParamState
from .gatherer import Gatherer, Unit
from .gradients import Gradients
from .initialize import materialize, slice_of
from .offload_states import OffloadedStates
from .placement import Placement
from .plan import FlatPlan
from .planning import Options, description, kept_of, plan_of
from .reducer import Groups, Reducer
from .released import ReleasedParameterError
from .scaling import Scaling
from .sync import check_same_model, report_differing, send_from_first
from .units import UnitSpec, choose_units
from .values_by_parameter import ValuesByParameter

if TYPE_CHECKING:
    from .tiers.tiers import Tiers

log = logging.getLogger("zs_zero")
CHECKED_STEPS = 3  # so many steps in an unchanged order until calls are no longer compared between ranks


class Runtime(ValuesByParameter):
    """A sharded model: its plan, its units and what happens to them."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        options: Options,
        *,
        ignored: Sequence[nn.Parameter],
        device: torch.device,
    ) -> None:
        self.model = model
        self.groups = groups
        self.options = options
        self.device = device
        self.stage = options.stage
        self.sync = True
        self.closed = False
        self.scaling = Scaling(options.loss_scale, speaks=groups.dp.rank == 0)
        self._ignored = {id(param): param for param in ignored}
        self.offloaded = OffloadedStates(self)
        self.access: ParameterAccess | None = None  # the optimizer that `shard` returned
        self._handles: list[Any] = []
        self._steady_steps = self._order_changes = 0
        sharded = groups.shard.size > 1
        self.whole_state = options.stage == 0 or not sharded  # every rank owns all of it
        self._sharded = sharded
        specs = choose_units(model, options.units, ignored=frozenset(self._ignored))
        if not specs:
            raise ConfigError(f"{type(model).__name__} has no parameters to shard")
        # stage 0 owns every slice, yet cuts as finely as the others: so its gradient norm is summed in the same order
        slices = groups.dp.size if options.stage == 0 else groups.shard.size
        self.plan = plan_of(model, specs, options, slices=slices)
        options.precision.check(flat.dtype for flat in self.plan.flats() if flat.trainable)
        check_same_model(description(model, self.plan, options), groups.dp)
        self.tiers: Tiers | None = None
        if options.offload:
            from .tiers.making import make_tiers, state_device  # only where something is offloaded

            meta = [name for spec in specs for name, param in spec.params.items() if param.is_meta]
            self.tiers = make_tiers(
                self.plan, options, groups, slices=self.plan.slices if self.whole_state else 1, meta=meta
            )
            leave = self.tiers.reduces_in_backward or state_device(options, self.device) is not None
        away = self.tiers is not None and any(self.tiers.plan.parameters_away)
        alone = self.tiers is not None and leave and groups.dp.size == 1
        self._reduces_in_backward = (sharded and options.stage >= 2) or alone
        self._releases = (sharded or away) and options.stage == 3
        differing: list[str] = []
        made: list[Flat] = []
        try:
            self.units = [self._make_unit(index, spec, differing, made) for index, spec in enumerate(specs)]
        except BaseException as error:
            self._take_apart(made, values=isinstance(error, Exception) and not isinstance(error, CommError))
            raise
        self.flats = [flat for unit in self.units for flat in unit.flats]
        self.trainable = [flat for flat in self.flats if flat.plan.trainable]
        self.placement = Placement(self.plan, self.flats, groups.shard)
        self._where = {id(p): (flat, i) for flat in self.flats for i, p in enumerate(flat.params)}
        report_differing(differing + self._send_buffers(), groups.dp)
        world = groups.dp.size
        if self.tiers is not None:
            self.tiers.attach(self.flats, by_blocks=options.by_blocks)
        pre = 1.0 / world if options.prescale else 1.0 / options.predivide_factor
        self.reducer = Reducer(
            self.trainable,
            groups,
            reduce_dtype=options.reduce_dtype,
            pre_factor=None if pre == 1.0 or world == 1 else pre,
            post_factor=1.0 if options.prescale or world == 1 else options.predivide_factor / world,
        )
        own = [groups.dp] if any(param.requires_grad for param in ignored) else []
        self.gradients = Gradients(
            self.trainable,
            ignored,
            self.scaling,
            shard=Group.single() if self.whole_state else groups.shard,
            votes=[*own, *groups.others],
            slices=self.plan.slices,
        )
        self.tasks = BackwardTasks(self._finish_backward)
        self.gatherer = Gatherer(
            self.units,
            self.tasks,
            prefetch=options.prefetch,
            reshard_after_forward=options.reshard_after_forward,
            span=groups.dp.observers.span,
            depth=options.offload.parameters.buffer_count if away else 1,
            over=self._over,
        )
        self._mark_enclosing(specs)
        self._hook(specs)
        groups.set_checked(True)

    # -- building -----------------------------------------------------------------------------------------------------
    def _make_unit(self, index: int, spec: UnitSpec, differing: list[str], made: list[Flat]) -> Unit:
        materialize(self.model, spec, self.device)
        here = {name: param.data for name, param in spec.params.items() if slice_of(param) is None}
        differing += send_from_first(here, self.groups.dp)
        del here
        planned = self.plan.units[index]
        held = (
            range(self.plan.slices) if self.whole_state else range(self.groups.shard.rank, self.groups.shard.rank + 1)
        )
        flats = []
        first = sum(len(unit.flats) for unit in self.plan.units[:index])
        for number, flat_plan in enumerate(planned.flats, first):
            home = None if self.tiers is None else self.tiers.homes[number]
            away = home is not None and home.parameters_away
            params = [spec.params[entry.spec.name] for entry in flat_plan.entries]
            flat = Flat(
                flat_plan, params, self.groups.gather, held=held, name=spec.name or "(root)", home=home,
                kept=kept_of(flat_plan, self.options),
                releasable=self._releases and (self._sharded or away),
                told=None if self.tiers is None else self.tiers.told, **self._placed(flat_plan),
            )  # fmt: skip
            # what one rank cannot write is an error on all
            with nullcontext() if home is None else agreed(self.groups.dp, f"moving {flat.name} to files"):
                flat.adopt(self.device, want_master=self.options.has_optimizer)
            for param in params:
                param.__dict__["_zs_flat"] = (self, flat)  # how gathered(params) finds its way
            flats.append(flat)
            made.append(flat)
        unit = Unit(index, spec.name or "(root)", flats, passing="" not in spec.modules and "(shared)" not in spec.name)
        unit.release()
        return unit

    def _placed(self, flat: FlatPlan) -> dict[str, Any]:
        if self.tiers is None:
            return {}
        from .tiers.making import placed

        return placed(flat, self.options, self.groups, self.device)

    def _take_apart(self, made: Sequence[Flat], *, values: bool) -> None:
        """After an error while units were made: parameters are ordinary again, with the values that can be had."""
        for flat in made:
            if values:
                with suppress(Exception):  # the disk that failed may fail again; the first error is the one to tell
                    flat.gather()
                    flat.wait()
            flat.close()
        if self.tiers is not None:
            self.tiers.close()

    def _send_buffers(self) -> list[str]:
        buffers = {}
        for name, buffer in self.model.named_buffers():
            dtype = self.options.buffer_dtype if buffer.is_floating_point() else None
            if buffer.device != self.device or buffer.dtype != (dtype or buffer.dtype):
                buffer.data = buffer.data.to(self.device, dtype)
            buffers[name] = buffer
        return send_from_first(buffers, self.groups.dp)

    def _mark_enclosing(self, specs: Sequence[UnitSpec]) -> None:
        entered = [(name, unit) for unit, spec in zip(self.units, specs, strict=True) for name in spec.modules]
        for name, unit in entered:
            unit.encloses |= any(other is not unit and _is_inside(inner, name) for inner, other in entered)

    def _hook(self, specs: Sequence[UnitSpec]) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if self._releases:
            self._handles += self.gatherer.install(
                (modules[name], unit) for unit, spec in zip(self.units, specs, strict=True) for name in spec.modules
            )
            self._handles.append(self.model.register_state_dict_pre_hook(self._refuse_state_dict))
        accumulates = self.options.has_optimizer and any(flat.kept.accumulates for flat in self.trainable)
        if self._reduces_in_backward or self.scaling.required or accumulates:
            for unit in self.units:
                for position, flat in enumerate(unit.flats):
                    if flat.plan.trainable:
                        for index, param in enumerate(flat.params):
                            place = (unit.index, position, index)
                            hook = partial(call_if_alive, weakref.WeakMethod(self._after_gradient), *place)
                            self._handles.append(param.register_post_accumulate_grad_hook(hook))
        self._handles += casting.install(
            self.model, self.device, cast_inputs=self.options.cast_inputs, autocast=self.options.autocast
        )
        if self.options.broadcast_buffers and self.groups.dp.size > 1:
            self._handles.append(self.model.register_forward_pre_hook(self._broadcast_buffers))
        self._handles.append(self.model.register_load_state_dict_post_hook(self._after_load))

    def __deepcopy__(self, memo: Any) -> "Runtime":
        """Reached through the model's hooks when somebody copies it (for an average of its weights, say)."""
        for flat in self.flats:
            if flat.state is ParamState.RELEASED:
                raise ReleasedParameterError(
                    f"a model sharded at stage 3 cannot be copied: {flat.plan.entries[0].spec.name!r} and others are "
                    f"spread over the ranks; load zs_zero.full_state_dict(model) into a new one"
                )
        return self

    # -- hooks --------------------------------------------------------------------------------------------------------
    def _after_gradient(self, unit_index: int, position: int, index: int, param: Tensor) -> None:
        if self.scaling.required:
            self.scaling.check_backward()
        unit = self.units[unit_index]
        flat = unit.flats[position]
        if flat.kept.accumulates and not (self._reduces_in_backward and self.sync):
            self.reducer.keep(flat, index)
        if not self._reduces_in_backward:
            return
        self.tasks.enter()
        if self.sync and param.grad is not None:
            grad, param.grad = param.grad, None
            self.reducer.add(flat, index, grad)
        if self._releases:
            self.gatherer.after_gradient(unit, flat, index)

    def _over(self, flats: list[Flat]) -> None:
        if self._reduces_in_backward and self.sync:
            with torch.no_grad():
                self.reducer.over(flats)

    def _finish_backward(self) -> None:
        with torch.no_grad():
            if self._releases:
                self.gatherer.finish_backward()
            if self.sync:
                self.reducer.finish_backward()
                if self.tiers is not None:
                    if self.tiers.early:
                        self.reducer.finish_issued()
                    self.tiers.end_backward(self.gatherer)

    def _broadcast_buffers(self, module: nn.Module, _: Any) -> None:
        if module.training and torch.is_grad_enabled() and not in_backward():
            for name, buffer in module.named_buffers():
                broadcast(buffer.data.view(-1), self.groups.dp, src=0, label=name)

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        released = [e.spec.name for f in self.flats if f.state is ParamState.RELEASED for e in f.plan.entries]
        if released:
            shown = ", ".join(released[:4]) + (f" and {len(released) - 4} more" if len(released) > 4 else "")
            raise ZsError(
                f"state_dict() at stage 3 would lack {shown}: their values are spread over the ranks; use "
                f"zs_zero.full_state_dict(model) on every rank"
            )

    def _after_load(self, module: nn.Module, _: Any) -> None:
        for flat in self.flats:
            if flat.state is ParamState.WHOLE:
                flat.adopt_writes(force=True)

    # -- the window ---------------------------------------------------------------------------------------------------
    def after_update(self) -> None:
        """The optimizer changed the masters: spread the new values and close the window."""
        # with tiers the values were written back block by block
        self.spread(((flat, flat.used) for flat in self.trainable if flat.used), written=self.tiers is not None)
        self.reducer.drop()
        self.scaling.forget()
        self._count_step()

    def spread(self, changed: Iterable[tuple[Flat, Iterable[int]]], *, written: bool = False) -> None:
        """New masters, or shards, of these flats (and which of their parameters) to whoever keeps them. Collective.

        `written`: the masters are in the shards already.
        """
        if self._releases:
            self.gatherer.release_all()
        under_way = []
        for flat, indices in changed:
            if not written:
                flat.write_back()
            flat.bump_versions(indices)
            under_way.append(flat.publish())  # in place: any number of them needs no memory
        for work in under_way:
            if work is not None:
                work.wait()

    def _count_step(self) -> None:
        """Calls are compared between ranks while the order of units is new, and a few steps after it changed."""
        if self.gatherer.order.changes != self._order_changes:
            self._order_changes, self._steady_steps = self.gatherer.order.changes, 0
        self._steady_steps += 1
        self.groups.set_checked(self._steady_steps < CHECKED_STEPS)

    def drop_gradients(self) -> None:
        if self.tiers is not None:
            self.tiers.dropped()
        self.reducer.drop()
        self.scaling.forget()
        for param in self._ignored.values():
            param.grad = None

    def abort(self) -> None:
        self.tasks.forget()
        self.gatherer.forget()
        self.drop_gradients()

    def check_no_backward(self, call: str) -> None:
        if self.tasks.unfinished and not in_backward():
            raise ZsError(f"the last backward raised an exception; call optimizer.abort_step() before {call}")

    def check_frozen(self) -> None:
        for flat in self.flats:
            if not flat.plan.trainable:
                for param, entry in zip(flat.params, flat.plan.entries, strict=True):
                    if param.grad is not None:
                        raise ConfigError(
                            f"{entry.spec.name!r} was frozen when the model was sharded and has a gradient now: "
                            f"unfreeze parameters before zs_zero.shard"
                        )

    # -- values by parameter ------------------------------------------------------------------------------------------
    def is_ignored(self, param: Tensor) -> bool:
        return id(param) in self._ignored

    def ignored(self) -> dict[str, nn.Parameter]:
        """Parameters that stay whole, local and unreduced, by name."""
        return {name: param for name, param in self.model.named_parameters() if id(param) in self._ignored}

    def flat_of(self, param: Tensor) -> tuple[Flat, int]:
        try:
            return self._where[id(param)]
        except KeyError:
            raise ConfigError("this tensor is no parameter of the sharded model") from None

    def close(self, *, gather: bool = True) -> None:
        """Takes everything off the model; `gather`: after making its parameters whole. Collective then."""
        if self.closed:
            return
        self.closed, self.access = True, None
        if self.scaling.loss_scale is not None:
            self.scaling.loss_scale.owner = None
        for unit in self.units:
            if gather:
                unit.gather()
                unit.wait()
            elif unit.state is ParamState.WHOLE:  # all alike: alone they are no model
                unit.release()
        self.tasks.forget()
        self.gatherer.drop_leaf_hooks()
        self.reducer.drop(wait=gather)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in ("__zs_shardable__", "_zs_runtime"):
            self.model.__dict__.pop(name, None)
        self.placement.clear()
        for flat in self.flats:
            flat.close()
        if self.tiers is not None:
            self.tiers.close()


def _is_inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(outer + "."))
