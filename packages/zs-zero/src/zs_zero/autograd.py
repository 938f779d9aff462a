"""The few facts about a running backward that torch tells only privately, wrapped in one place."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


def graph_task_id() -> int:
    """The backward that runs in this thread, or -1 outside of any."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    return graph_task_id() != -1


@contextmanager
def outside_autograd() -> Iterator[None]:
    """For our own tensors in the middle of the user's forward: they outlive an `inference_mode` it may run in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def age(node: Any) -> int:
    """Nodes of a thread are numbered as they are made; leaves have the highest number of all."""
    number: int = node._sequence_nr()
    return number


def made_of(tensor: Tensor, wanted: Callable[[Any], bool], *, since: int) -> bool:
    """Whether a node that is `wanted` lies behind `tensor` in its graph; looks at none older than `since`."""
    seen: set[Any] = set()
    ahead: list[Any] = [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or age(node) < since:
            continue
        if wanted(node):
            return True
        seen.add(node)
        ahead += [behind for behind, _ in node.next_functions]
    return False


class BackwardTasks:
    """Knows when the outermost backward ends.

    A reentrant checkpoint runs a backward inside a backward, and torch calls an end callback at the end of the *nested*
    one. So every running backward seen by a hook is remembered, and `on_finish` runs when none is left.
    """

    def __init__(self, on_finish: Callable[[], None]) -> None:
        self._on_finish = on_finish
        self._running: set[int] = set()

    @property
    def unfinished(self) -> bool:
        """A backward that began has not ended (it runs, or it raised)."""
        return bool(self._running)

    def enter(self) -> None:
        """To be called by every hook that runs in a backward."""
        task = graph_task_id()
        if task != -1 and task not in self._running:
            self._running.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._leave, task))

    def _leave(self, task: int) -> None:
        self._running.discard(task)
        if not self._running:
            self._on_finish()

    def forget(self) -> None:
        """After a backward that raised."""
        self._running.clear()


def call_if_alive(method: "weakref.WeakMethod[Any]", *args: Any) -> None:
    """A hook on a parameter holds numbers only: the collector does not see through it, so it would keep the model."""
    alive = method()
    if alive is not None:
        alive(*args)
