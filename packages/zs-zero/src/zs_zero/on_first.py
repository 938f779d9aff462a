"""Whole tensors of a sharded model on rank 0, one at a time, so that writing them out takes no more memory than one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zs_comm import broadcast

from .checkpoint import model_state
from .flat_reading import ParamState
from .parts import TensorSpec
from .sharding import runtime_of


@dataclass(frozen=True)
class Weights:
    """`specs`: name, shape and dtype of each tensor of the model's state dict, tied ones once; `get` brings one."""

    specs: dict[str, TensorSpec]
    get: Callable[[str], Tensor]


@contextmanager
def weights_on_first(model: nn.Module, *, exclude_frozen: bool = False) -> Iterator[Weights | None]:
    """Rank 0's block may ask for whole weights in the model's dtype, on the CPU, in any order. Collective.

    The other ranks help with the gathering until rank 0 leaves its block, and get None.
    """
    runtime = runtime_of(model)
    group = runtime.groups.dp
    places = [(flat, index) for flat in runtime.flats for index in range(len(flat.params))]
    entries = [flat.plan.entries[index].spec for flat, index in places]
    numbers = {spec.name: number for number, spec in enumerate(entries)}
    local = model_state(model).local()
    specs = {
        spec.name: TensorSpec(spec.name, spec.shape, spec.dtype)
        for spec in entries
        if spec.trainable or not exclude_frozen
    }
    specs |= {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in local.items()}

    @torch.no_grad()
    def brought(number: int) -> Tensor:
        flat, index = places[number]
        released = flat.state is ParamState.RELEASED
        flat.gather()
        flat.wait()
        value = flat.params[index].detach().to("cpu", copy=True)
        if released:
            flat.release()
        return value

    def get(name: str) -> Tensor:
        if name in local:
            return local[name].detach().to("cpu", copy=True)
        broadcast(torch.tensor([numbers[name]]), group, label="weights")
        return brought(numbers[name])

    if group.rank == 0:
        try:
            yield Weights(specs, get)
        finally:
            broadcast(torch.tensor([-1]), group, label="weights")
        return
    while (number := int(broadcast(torch.tensor([0]), group, label="weights"))) >= 0:
        brought(number)
    yield None
