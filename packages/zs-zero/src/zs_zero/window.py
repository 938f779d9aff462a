"""The gradients of an open accumulation window, given to a checkpoint and taken from one.

Two kinds. What was reduced is a shard of the mean gradient (`grad/<name>`), whoever loads it. What was not reduced yet
is a rank's own whole gradient (`local_grad/<name>`): as many ranks as before get their own again, bit for bit; another
number of ranks gets their mean, summed in rank order in fp32 as the reduction would have, as reduced shards.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .flat import Flat
from .flat_pieces import HeldPiece
from .parts import Piece, TensorSpec, parts_of, whole_part
from .runtime import Runtime

REDUCED, LOCAL = "grad/", "local_grad/"
Replica = tuple[int, int]


class Window:
    """What an open window holds; filled by a load before it takes the place of the present one."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._rank, self._world = runtime.groups.dp.rank, runtime.groups.dp.size
        self._own: list[tuple[nn.Parameter, Tensor]] = []
        self._reduced: dict[int, Tensor] = {}  # by flat: (held_numel,)
        self._used: dict[int, set[int]] = {}
        self._sums: list[tuple[Flat, HeldPiece, list[Tensor]]] = []  # a part of each saved rank's gradient

    # -- save ---------------------------------------------------------------------------------------------------------
    def pieces(self, replica: Replica) -> Iterator[Piece]:
        """The window's gradients; waits for the reductions under way."""
        self._runtime.reducer.finish_issued()
        for flat in self._runtime.trainable:
            if flat.gradient_failure is not None:
                raise flat.gradient_failure
        for flat in self._runtime.trainable:
            grad = flat.reduced()
            if grad is not None:
                for held in flat.owned():
                    if held.piece.index in flat.used:
                        entry = flat.plan.entries[held.piece.index]
                        spec = TensorSpec(REDUCED + entry.spec.name, entry.spec.shape, grad.dtype)
                        part = grad[held.low : held.high]
                        yield from parts_of(spec, held.piece.start, part, replica=replica[0], replicas=replica[1])
        for name, param in self._trained().items():
            grad = self._standing(param)
            if grad is not None:
                grad = grad.detach()
                grad = (grad.to_dense() if grad.layout != torch.strided else grad).contiguous()
                yield whole_part(TensorSpec(LOCAL + name, tuple(grad.shape), grad.dtype), grad, scope="rank")

    def _standing(self, param: nn.Parameter) -> Tensor | None:
        if self._runtime.is_ignored(param):
            return param.grad
        return self._runtime.reducer.standing(*self._runtime.flat_of(param))

    def _trained(self) -> dict[str, nn.Parameter]:
        found = {e.spec.name: p for f in self._runtime.trainable for e, p in zip(f.plan.entries, f.params, strict=True)}
        return found | self._runtime.ignored()

    # -- load ---------------------------------------------------------------------------------------------------------
    def places(self, saved: Mapping[str, TensorSpec], before: int) -> Iterator[Piece]:
        """Where the saved gradients go, when `before` ranks saved them."""
        ranks = getattr(saved, "ranks", ()) if before != self._world else ()  # what each rank alone saved
        for flat in self._runtime.trainable:
            numel, device = flat.held_numel, flat.whole.device
            for held in flat.owned():
                spec = flat.plan.entries[held.piece.index].spec
                whole = saved.get(REDUCED + spec.name)
                if whole is not None:
                    if id(flat) not in self._reduced:
                        self._reduced[id(flat)] = torch.zeros(numel, dtype=flat.grad_dtype, device=device)
                    target = self._reduced[id(flat)][held.low : held.high]
                    yield from parts_of(TensorSpec(whole.name, spec.shape, target.dtype), held.piece.start, target)
                theirs = [rank for rank, own in enumerate(ranks) if LOCAL + spec.name in own]
                specs = [TensorSpec(LOCAL + spec.name, spec.shape, ranks[r][LOCAL + spec.name].dtype) for r in theirs]
                parts = [torch.empty(held.piece.numel, dtype=one.dtype, device=device) for one in specs]
                for rank, one, part in zip(theirs, specs, parts, strict=True):
                    for piece in parts_of(one, held.piece.start, part):
                        yield replace(piece, scope=f"rank:{rank}")
                if parts:
                    self._sums.append((flat, held, parts))
            for index, entry in enumerate(flat.plan.entries):
                name = entry.spec.name
                if REDUCED + name in saved or any(LOCAL + name in own for own in ranks):
                    self._used.setdefault(id(flat), set()).add(index)
        for name, param in (self._trained() if before == self._world else {}).items():
            if LOCAL + name in saved:
                ignored = self._runtime.is_ignored(param)
                dtype = param.dtype if ignored else self._runtime.flat_of(param)[0].kept.accum
                grad = torch.empty(param.shape, dtype=dtype, device=param.device)
                self._own.append((param, grad))
                yield whole_part(TensorSpec(LOCAL + name, tuple(param.shape), grad.dtype), grad, scope="rank")

    def _gradients(self) -> Iterator[Tensor]:
        yield from (grad for _, grad in self._own)
        yield from self._reduced.values()
        for _, _, parts in self._sums:
            yield from parts

    def take(self, before: int, factor: float = 1.0) -> None:
        """The filled gradients take the place of the present ones, times `factor`: the present loss scale by theirs."""
        self._runtime.abort()
        if factor != 1.0:
            for grad in self._gradients():
                grad.mul_(factor)
        for param, grad in self._own:
            if self._runtime.is_ignored(param):
                param.grad = grad
            else:
                self._runtime.reducer.set_standing(*self._runtime.flat_of(param), grad)
        for flat, held, parts in self._sums:
            total = parts[0].float() if flat.grad_dtype.itemsize <= 4 else parts[0].to(flat.grad_dtype)
            for part in parts[1:]:
                total += part
            total *= 1.0 / before
            if id(flat) not in self._reduced:
                self._reduced[id(flat)] = torch.zeros(flat.held_numel, dtype=flat.grad_dtype, device=flat.whole.device)
            target = self._reduced[id(flat)][held.low : held.high]
            target += total.to(parts[0].dtype)  # as the wire would have rounded it
        for flat in self._runtime.trainable:
            used = self._used.get(id(flat), set())
            if not used:
                continue
            reduced = self._reduced.get(id(flat))
            if reduced is None:  # others hold the parts that there are
                reduced = torch.zeros(flat.held_numel, dtype=flat.grad_dtype, device=flat.whole.device)
            if self._world > 1 or not flat.leaves_gradients:
                flat.used = used
                flat.set_reduced(reduced)
                continue
            for index in used:  # one rank keeps fp32 gradients where autograd puts them
                entry, param = flat.plan.entries[index], flat.params[index]
                value = reduced[entry.offset : entry.stop].view(entry.spec.shape)
                param.grad = value.clone() if param.grad is None else param.grad.add_(value)
