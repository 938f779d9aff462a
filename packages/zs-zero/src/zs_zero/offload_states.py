"""States of a sharded model in host memory for a while, so that something else has the device (generation, say).

    optim_states            the optimizer's tensors
    hp_params               masters of their own (fp32 parameters are their own masters: they go with lp_params)
    lp_params               the parameters: whole buffers at stages 0-2, shards at stage 3
    lp_grads                gradients of an open window
    contiguous_grad_buffer  pooled buffers of reductions, which are dropped

What moves is the memory below the tensors. They stay what they are, views and all, and have no bytes until they are
brought back, so nothing that refers to one has to learn of it; whoever would read one meanwhile gets an error.
"""

from __future__ import annotations

import abc
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zs_comm import ConfigError

from .flat import Flat

if TYPE_CHECKING:
    from .runtime import Runtime

STATES = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")


class _Moved:
    """A storage whose bytes are in host memory."""

    def __init__(self, storage: torch.UntypedStorage, *, pin_memory: bool, non_blocking: bool) -> None:
        self._storage, self._nbytes = storage, storage.nbytes()
        pin_memory = pin_memory and storage.device.type == "cuda"
        self._bytes = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=pin_memory)
        # freed before a copy under way is through, the memory is still the current stream's, and used in its order
        self._bytes.copy_(self._over(), non_blocking=non_blocking and pin_memory)
        storage.resize_(0)

    def bring_back(self, *, non_blocking: bool) -> None:
        self._storage.resize_(self._nbytes)
        self._over().copy_(self._bytes, non_blocking=non_blocking and self._bytes.is_pinned())

    def _over(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage)


class OffloadedStates:
    """Which states of one sharded model are in host memory now."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._moved: dict[str, list[_Moved]] = {}
        self._standing: list[tuple[Flat, int, Tensor]] = []  # gradients that were not reduced yet
        self._reduced: list[tuple[Flat, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._moved)

    def check(self) -> None:
        """Raises ConfigError while anything is away."""
        if self._moved:
            raise ConfigError(f"offload_states() took {', '.join(self._moved)}: call reload_states() first")

    @torch.no_grad()
    def offload(self, optimizer: torch.optim.Optimizer | None, include: Container[Any] | None, **how: Any) -> None:
        """Moves the chosen states that are not away yet."""
        chosen = _chosen(include)
        self._runtime.reducer.finish_issued()  # drops the pooled buffers too
        self._runtime.gatherer.release_all()
        for name in [name for name in STATES if name in chosen and name not in self._moved]:
            tensors = list(self._tensors(name, optimizer))
            if name == "lp_params":
                for flat in self._runtime.flats:
                    flat.leave()
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
            device = self._runtime.device
            self._moved[name] = [
                _Moved(storage, **how) for at, storage in storages.items() if at and storage.device == device
            ]
        _free(self._runtime.device)

    @torch.no_grad()
    def reload(self, *, non_blocking: bool) -> None:
        """Brings everything back; gradients that came meanwhile are added."""
        for name in STATES:
            for moved in self._moved.pop(name, []):
                moved.bring_back(non_blocking=non_blocking)
            if name == "lp_params":
                for flat in self._runtime.flats:
                    flat.come_back()
        for flat, grad in self._reduced:
            flat.grad = grad if flat.grad is None else grad.add_(flat.grad)
            flat.gradient_changes += 1
        for flat, index, grad in self._standing:
            since = self._runtime.reducer.standing(flat, index)
            self._runtime.reducer.set_standing(flat, index, grad if since is None else grad + since)
        self._reduced, self._standing = [], []

    def _tensors(self, name: str, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
        flats = self._runtime.flats
        if name == "optim_states" and optimizer is not None:
            yield from _tensors_in(list(optimizer.state.values()))
        elif name == "hp_params":
            own = (t for flat in flats for t in (flat.master, flat.rest) if t is not None and t is not flat.shard)
            yield from own
        elif name == "lp_params":
            for flat in flats:
                yield from (flat.whole, flat.shard)
        elif name == "lp_grads":
            self._standing = self._runtime.reducer.take_standing()
            self._reduced = [(flat, flat.grad) for flat in flats if flat.grad is not None]
            for flat in flats:
                flat.grad = None
            yield from (grad for _, _, grad in self._standing)
            yield from (grad for _, grad in self._reduced)


def _chosen(include: Container[Any] | None) -> set[str]:
    if include is None:
        return set(STATES)
    wanted: Iterable[Any] = [include] if isinstance(include, str) else include if isinstance(include, Iterable) else []
    names = {str(getattr(name, "value", name)) for name in wanted}
    if unknown := sorted(names - set(STATES)):
        raise ConfigError(f"offload_states(include=...) takes {', '.join(STATES)} (got {', '.join(unknown)})")
    return names


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _free(device: torch.device) -> None:
    """Gives what is free to others on the device, not only to this process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class StatesOffload(abc.ABC):
    """What `ZeroOptimizer` does to have its states in host memory for a while."""

    inner: torch.optim.Optimizer | None
    _runtime: Runtime

    @abc.abstractmethod
    def _check_torn(self) -> None: ...

    def offload_states(
        self,
        include: Container[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Moves states to host memory until `reload_states`; the device's is free for others meanwhile.

        Without parameters nothing can run; with them forward and backward do; `step()` needs everything.

        Args:
            include: some of "optim_states", "hp_params" (masters), "lp_params", "lp_grads", "contiguous_grad_buffer"
                (names, or an enum's members of these values); None: all.
            device: "cpu"; "none" does nothing.
            pin_memory: page-locked host memory, for faster copies.
            non_blocking: return before the copies are through.

        Raises:
            ConfigError: for another device or state, after a backward that raised, or inside `zs_zero.gathered`.
        """
        target = str(getattr(device, "value", device))
        if target not in ("cpu", "none"):
            raise ConfigError(f"offload_states(device=...) is 'cpu' or 'none' (got {device!r})")
        self._check_torn()
        self._runtime.check_no_backward("offload_states()")
        self._runtime.check_not_borrowed("offload_states()")
        if self._runtime.tiers is not None:
            self._runtime.tiers.settle()
        if target == "cpu":
            self._runtime.offloaded.offload(self.inner, include, pin_memory=pin_memory, non_blocking=non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Brings back what `offload_states` took: the same bits in the same tensors."""
        self._runtime.offloaded.reload(non_blocking=non_blocking)
