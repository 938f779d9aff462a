"""Stage 3: parameters are whole only while their unit runs.

    forward    | gather 0 | run 0, gather 1 | release 0, run 1, gather 2 | ...        keep the last one
    backward   | run n, gather n-1 | gradients and input gradients of n are out: release n, gather n-2 | run n-1 | ...

Hooks are a few lines and call one method here:

- before a unit's module: its values are needed; the next unit's are gathered ahead.
- after it: release, unless the same unit comes next. Every output tensor gets a hook: in backward it fires before the
  module's own backward does (module backward hooks do not fire for nested outputs, and forbid in-place changes).
- an input's gradient and the last parameter's gradient are out: nothing of the unit's backward is left that could need
  its values. Counting gradients alone is not enough: with a frozen layer below a trainable one the frozen weights are
  still needed then.
- the end of the outermost backward releases what is left.

Autograd goes back through the nodes of a graph in the order opposite to that in which they were made. So when a call's
backward begins, that of every call which began after this one ended is over, whether all its gradients came or not.

A recomputation under activation checkpointing runs a forward inside a backward. Then nothing is released after it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zs_comm import ZsError

from .autograd import BackwardTasks, graph_task_id, in_backward, outside_autograd
from .flat import Flat
from .flat_reading import ParamState
from .order import Order
from .trees import tensors_in

MAX_WHOLE_UNITS = 2  # the one that runs and the one gathered ahead


class Call:
    """One forward of a unit's module, until its backward is through."""

    def __init__(self, unit: "Unit", began: int, *, repeats: bool) -> None:
        self.unit = unit
        self.began, self.ended = began, began  # when its forward did, counted in calls
        self.repeats = repeats  # only to compute again what another call's backward needs; it has none of its own
        self.task = -1  # the backward in which its own runs; -1: in none
        self.inputs = 0
        self.outputs = 0
        self.inputs_left = 0


class Unit:
    """A unit at run time."""

    def __init__(self, index: int, name: str, flats: list[Flat], *, passing: bool) -> None:
        self.index = index
        self.name = name
        self.flats = flats
        self.passing = passing  # comes and goes; False: held for the whole forward of the model (root, shared)
        self.encloses = not passing  # gradients of units inside may need its values after its own are out
        self.trainable = sum(len(flat.params) for flat in flats if flat.plan.trainable)
        self.depth = 0  # forwards of its modules under way
        self.calls: list[Call | None] = []  # of those forwards
        self.coming: weakref.WeakSet[Call] = weakref.WeakSet()  # with a graph, their backward still to begin
        self.running: list[Call] = []  # in this backward
        self.gradients: set[tuple[int, int]] = set()  # parameters whose gradient came since the last gather
        self.repeated = False  # one came twice (a reentrant checkpoint ran part of the unit again): more may follow
        self.pinned = False  # stays whole until a backward ends

    @property
    def state(self) -> ParamState:
        """That of its flats; where some are always whole, that of the others."""
        return next((flat.state for flat in self.flats if flat.state is not ParamState.WHOLE), ParamState.WHOLE)

    def is_in(self, task: int) -> bool:
        """Whether its backward is part of this one: a forward in it computes saved tensors again, for that backward.

        (A reentrant checkpoint's forward builds a graph, whose backward is one of its own.)
        """
        return task != -1 and (bool(self.coming) or any(call.task == task for call in self.running))

    def read_ahead(self) -> None:
        for flat in self.flats:
            flat.read_ahead()

    def gather(self) -> None:
        for flat in self.flats:
            flat.gather()

    def wait(self) -> None:
        for flat in self.flats:
            flat.wait()

    def release(self) -> None:
        for flat in self.flats:
            flat.release()


class Gatherer:
    """Gathers and releases units as the model runs."""

    def __init__(
        self,
        units: list[Unit],
        tasks: BackwardTasks,
        *,
        prefetch: bool,
        reshard_after_forward: bool,
        span: Callable[[str, str], Any],
        depth: int = 1,
        over: Callable[[list[Flat]], None],
    ) -> None:
        self.units = units
        self.order = Order()
        self._tasks = tasks
        self._prefetch = prefetch
        self._reshard_after_forward = reshard_after_forward
        self._span = span
        self._depth = (
            depth  # units ahead of the one that runs: the next is gathered, those after it are read from files
        )
        self._over = over  # told of flats whose backward is over
        self._clock = 0
        self._under_way: list[Call] = []  # whose backward began, and is not known to be over
        self._ahead: list[Unit] = []  # gathered before they were asked for, or kept because they come next
        self._graph_kept = False  # this backward builds a graph of its own
        self._leaf_hooks: list[Any] = []

    def install(self, modules: Iterable[tuple[nn.Module, Unit]]) -> list[Any]:
        """Hooks the modules; returns the handles."""
        handles: list[Any] = []
        for module, unit in modules:
            # before the user's hooks and, of those that are there by now, after the last: theirs may read parameters
            handles.append(
                module.register_forward_pre_hook(partial(self._before_forward, unit), with_kwargs=True, prepend=True)
            )
            # always_call: a non-reentrant checkpoint stops its recomputation by an exception
            handles.append(module.register_forward_hook(partial(self._after_forward, unit), always_call=True))
        return handles

    def __deepcopy__(self, memo: Any) -> "Gatherer":
        return self  # as Runtime, which refuses where there is nothing to copy

    # -- forward ------------------------------------------------------------------------------------------------------
    def _before_forward(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        recomputing = in_backward()
        self._clock += 1
        call = Call(unit, self._clock, repeats=unit.is_in(graph_task_id())) if torch.is_grad_enabled() else None
        unit.depth += 1
        unit.calls.append(call)  # first: the hook after the forward runs even when something here raises
        if recomputing:
            self._tasks.enter()
        elif self._tasks.unfinished:
            raise ZsError("the last backward raised an exception; call optimizer.abort_step() before going on")
        self.need(unit, "recompute" if recomputing else "forward")
        if call is not None:
            for tensor in tensors_in((args, kwargs)):
                if tensor.requires_grad:
                    call.inputs += 1
                    handle = tensor.register_hook(partial(self._after_input_gradient, call))
                    if tensor.is_leaf:  # it outlives this graph, and the hook would too
                        self._leaf_hooks.append(handle)
            call.inputs_left = call.inputs

    def _after_forward(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> Any:
        unit.depth -= 1
        call = unit.calls.pop()
        replaced = _without_views_of(unit, output)
        if call is not None:
            call.ended = self._clock
            for tensor in (*tensors_in(output if replaced is None else replaced), *_kept_by(module)):
                if tensor.requires_grad and not tensor.is_leaf:
                    call.outputs += 1
                    hook = partial(self._before_backward, call)
                    tensor.register_hook(hook)
                    base = tensor._base  # changing a view in place takes the view's own node out of the graph
                    if base is not None and base.requires_grad and not base.is_leaf:
                        base.register_hook(hook)
            if call.repeats:
                pass
            elif call.outputs:
                unit.coming.add(call)
            elif unit.trainable or call.inputs:
                unit.pinned = True  # its backward cannot be seen coming
        self._release_after_forward(unit, graph=call is not None)
        return replaced

    def _release_after_forward(self, unit: Unit, *, graph: bool) -> None:
        if in_backward() or unit.depth or unit.pinned or (graph and not self._reshard_after_forward):
            return
        coming = self.order.predict()
        if coming is not None and coming[0] == unit.index:
            self._ahead.append(unit)
        else:
            unit.release()

    # -- backward -----------------------------------------------------------------------------------------------------
    def _before_backward(self, call: Call, _: Tensor) -> None:
        self._tasks.enter()
        unit = call.unit
        if torch.is_grad_enabled():  # create_graph: the graph built now needs the values again later
            unit.pinned = self._graph_kept = True
        if call.task != -1:
            return
        self._end_calls_after(call)
        call.task = graph_task_id()
        unit.coming.discard(call)
        unit.running.append(call)
        self._under_way.append(call)
        if unit.state is not ParamState.WHOLE:
            unit.gradients.clear()
            unit.repeated = False
        self.need(unit, "backward")

    def _end_calls_after(self, call: Call) -> None:
        ended = [other for other in self._under_way if other.began > call.ended]
        if not ended:
            return
        self._under_way = [other for other in self._under_way if other.began <= call.ended]
        left = {id(other.unit) for other in self._under_way}
        units = {id(other.unit): other.unit for other in ended}
        through = [unit for key, unit in units.items() if key not in left and not unit.coming]
        self._over([flat for unit in through for flat in unit.flats])
        for unit in through:
            if not unit.pinned and not unit.depth and unit not in self._ahead:
                unit.release()  # also where a parameter got no gradient

    def _after_input_gradient(self, call: Call, _: Tensor) -> None:
        call.inputs_left -= 1
        self._release_if_through(call.unit)

    def after_gradient(self, unit: Unit, flat: Flat, index: int) -> None:
        """A parameter of `unit` got its gradient."""
        unit.repeated |= (id(flat), index) in unit.gradients
        unit.gradients.add((id(flat), index))
        self._release_if_through(unit)

    def _release_if_through(self, unit: Unit) -> None:
        if unit.pinned or unit.depth or unit.encloses or unit.repeated or not unit.running:
            return
        if len(unit.gradients) < unit.trainable:
            return
        if all(call.inputs_left <= 0 for call in unit.running) and self._tasks.unfinished:
            unit.release()

    def finish_backward(self) -> None:
        """The outermost backward ended."""
        for unit in self.units:
            for call in unit.running:
                call.task, call.inputs_left = -1, call.inputs
            unit.running.clear()
            unit.gradients.clear()
            unit.repeated = False
            if not self._graph_kept:
                unit.pinned = False
            if not unit.pinned and not unit.depth:
                unit.release()
        self._graph_kept = False
        self._ahead.clear()
        self._under_way.clear()
        self.drop_leaf_hooks()

    def drop_leaf_hooks(self) -> None:
        for handle in self._leaf_hooks:
            handle.remove()
        self._leaf_hooks.clear()

    # -- values -------------------------------------------------------------------------------------------------------
    def need(self, unit: Unit, phase: str) -> None:
        """Makes `unit` whole now, and starts on the one that came after it last time."""
        self.order.observe((unit.index, phase))
        coming = {index for index, _ in self.order.ahead(self._depth)} if self._depth > 1 else set()
        kept = []
        for other in self._ahead:
            if other.index in coming and other is not unit:
                kept.append(other)
            elif other is not unit and not other.depth and not other.pinned and not other.running:
                with outside_autograd():
                    other.release()  # the order changed
        self._ahead = kept
        with outside_autograd():
            if unit.state is not ParamState.WHOLE:
                with self._span("zero.gather", unit.name):
                    unit.gather()
                    unit.wait()
            self._gather_ahead(phase)

    def _gather_ahead(self, phase: str) -> None:
        for position, (index, event) in enumerate(self.order.ahead(self._depth) if self._prefetch else ()):
            if phase != "forward" and event == "forward":
                return  # between a backward and the next forward the values may change
            unit = self.units[index]
            if unit.state is ParamState.READING and position == 0:
                unit.gather()
            if unit.state is not ParamState.RELEASED:
                continue
            whole = sum(other.passing and other.state is not ParamState.RELEASED for other in self.units)
            if whole >= MAX_WHOLE_UNITS - 1 + self._depth:
                return
            if position == 0:
                unit.gather()
            else:
                unit.read_ahead()
            self._ahead.append(unit)

    def release_all(self) -> None:
        """After the shards changed, or after an exception."""
        for unit in self.units:
            unit.release()
        self._ahead.clear()

    def forget(self) -> None:
        """Drops everything known about forwards and backwards under way."""
        for unit in self.units:
            unit.depth, unit.repeated, unit.pinned = 0, False, False
            unit.gradients.clear()
            unit.calls.clear()
            unit.coming.clear()
            unit.running.clear()
        self._under_way.clear()
        self._graph_kept = False
        self.drop_leaf_hooks()
        self.release_all()


def _without_views_of(unit: Unit, output: Any) -> Any:
    """`output` with copies in the place of tensors that are parameters of `unit` or views of them; None: it has none.

    A view handed out would outlive the values. (A tensor inside of an object that is no pytree keeps the unit whole.)
    """
    storages = {flat.whole.untyped_storage().data_ptr() for flat in unit.flats if flat.whole.numel()}

    def is_view(tensor: Tensor) -> bool:
        strided = tensor.layout == torch.strided and tensor.numel() > 0
        return strided and tensor.untyped_storage().data_ptr() in storages

    if not any(is_view(tensor) for tensor in tensors_in(output)):
        return None
    copied = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.clone() if is_view(tensor) else tensor, output)
    unit.pinned |= any(is_view(tensor) for tensor in tensors_in(copied))
    return copied


def _kept_by(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a forward left in attributes (a loss on the side): their backward may run before the output's."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor | list | tuple) or (isinstance(value, dict) and not name.startswith("_")):
                yield from tensors_in(value)
