"""The update of one block at hand: by the client's own optimizer, or by a kernel that gives the same bits.

    in the store            at hand                       update              back
    master, states fp32     themselves                    client or kernel    themselves; parameters cast from masters
    states bf16 or 8 bits   fp32 copies                   client              rounded again (by chance, where asked for)
    bf16 parameter, rest    their sum                     client              split again

The client's optimizer sees its pieces, with memory for the time of this step only. Where it is torch's fused Adam or
AdamW, the kernel does the same operations in one pass and writes the parameters too; torch itself does a parameter's
last elements that fill no vector, where it rounds once more than elsewhere ([Note: One formula] in `host_optimizer`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from ..flat_gradients import scaled
from ..flat_pieces import HeldPiece, hollow, is_element_wise
from ..host_optimizer import HostOptimizer
from ..rounding import join, rounding_key, split, stochastically
from .blocks import MASTER, PARAM, REST, Block

if TYPE_CHECKING:
    from ..flat import Flat

_VECTOR = 16  # elements: see [Note: One formula]


@dataclass
class Todo:
    """A piece with a gradient: elements `[held.low, held.high)` of its flat."""

    piece: Tensor
    held: HeldPiece
    grad: Tensor  # (n,), in the flat's dtype of gradients, with the loss scale


@dataclass
class AtHand:
    """A block whose regions are in memory; the tensors are (block.numel,)."""

    flat: Flat
    block: Block
    regions: Mapping[str, Tensor]  # of the optimizer, and "param"

    def part(self, region: str, held: HeldPiece) -> Tensor:
        return self.regions[region][held.low - self.block.low : held.high - self.block.low]


class BlockUpdate:
    """Updates blocks for one client's optimizer."""

    def __init__(self, client: torch.optim.Optimizer, kernel: HostOptimizer | None, seed: int) -> None:
        self._client, self._kernel, self._seed = client, kernel, seed
        self._group_of: dict[int, dict[str, Any]] = {}
        self._apart: list[Tensor] = []  # ignored parameters, which are whole and in no block

    def listed(self, groups: Sequence[tuple[dict[str, Any], Sequence[Tensor]]], *, blocks: Sequence[Tensor]) -> None:
        """Which group each piece belongs to. `blocks`: those that are updated block by block."""
        self._group_of = {id(piece): group for group, pieces in groups for piece in pieces}
        in_blocks = {id(piece) for piece in blocks}
        self._apart = [piece for _, pieces in groups for piece in pieces if id(piece) not in in_blocks]

    def __call__(
        self, at_hand: AtHand, todo: Sequence[Todo], factors: Sequence[float], *, updates: int, keep: bool
    ) -> None:
        """One step of the pieces of `todo`: values, states and "param" of `at_hand` are the new ones after it.

        `factors`: what gradients are multiplied by, one after the other. `updates`: the number of this step, for the
        random numbers of rounding. `keep`: states stay where they are (resident); else pieces and states are hollow
        again afterwards.
        """
        flat = at_hand.flat
        rest = []
        for one in todo:
            if self._kernel is not None and len(factors) < 2 and self._fused(flat, one.piece):
                self._by_kernel(at_hand, one, factors[0] if factors else 1.0, keep=keep)
            else:
                rest.append(one)
        if rest:
            self._by_client(at_hand, rest, factors, updates, keep=keep)

    def apart(self) -> None:
        """One step of the parameters that are in no block, where they are, with the gradients that they have."""
        if self._apart:
            self._step_of(self._apart)

    def _step_of(self, pieces: Sequence[Tensor]) -> None:
        """The client's step of these pieces only."""
        groups = self._client.param_groups
        listed = [group["params"] for group in groups]
        chosen: dict[int, list[Tensor]] = {}
        for piece in pieces:
            chosen.setdefault(id(self._group_of[id(piece)]), []).append(piece)
        client: Any = self._client
        hooks = client._optimizer_step_pre_hooks, client._optimizer_step_post_hooks
        client._optimizer_step_pre_hooks, client._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        try:
            for group in groups:
                group["params"] = chosen.get(id(group), [])
            client.step()
        finally:
            client._optimizer_step_pre_hooks, client._optimizer_step_post_hooks = hooks
            for group, params in zip(groups, listed, strict=True):
                group["params"] = params

    # -- the kernel ---------------------------------------------------------------------------------------------------
    def _fused(self, flat: Flat, piece: Tensor) -> bool:
        kept, group = flat.kept, self._group_of[id(piece)]
        plain = type(self._client) in (torch.optim.Adam, torch.optim.AdamW) and group.get("fused") is True
        others = ("amsgrad", "maximize", "capturable", "differentiable")
        return (
            plain and piece.dim() > 0  # the states of one of no dim look like counters, and stay with the client
            and not any(group.get(name) for name in others) and not kept.widened and kept.grad == torch.float32
            and kept.master == torch.float32
        )  # fmt: skip

    def _by_kernel(self, at_hand: AtHand, one: Todo, factor: float, *, keep: bool) -> None:
        group, states = self._group_of[id(one.piece)], self._client.state[one.piece]
        value = MASTER if MASTER in at_hand.regions else PARAM
        state = {"param": at_hand.part(value, one.held)}
        for name in ("exp_avg", "exp_avg_sq"):
            if not keep:
                state[name] = at_hand.part(name, one.held)
                if name not in states:
                    state[name].zero_()
                continue
            if name not in states:
                states[name] = torch.zeros(one.piece.shape, dtype=torch.float32)
            state[name] = states[name].view(-1)
        step = states.setdefault("step", torch.zeros((), dtype=torch.float32))
        kind = "adamw" if group.get("decoupled_weight_decay") or isinstance(self._client, torch.optim.AdamW) else "adam"
        hyper = {
            "lr": float(group["lr"]),
            "betas": tuple(map(float, group["betas"])),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
        }
        grad = one.grad.reshape(-1)
        out = at_hand.part(PARAM, one.held) if value == MASTER else None
        body = grad.numel() - grad.numel() % _VECTOR
        if body and self._kernel is not None:
            self._kernel.step(
                kind, {name: tensor[:body] for name, tensor in state.items()}, grad[:body].contiguous(), hyper=hyper,
                step=int(step) + 1, factor=factor, out=None if out is None else out[:body],
            )  # fmt: skip
        if body < grad.numel():
            ends = {name: tensor[body:] for name, tensor in state.items()}
            _torch_fused(kind, ends, grad[body:], hyper, step, factor)
            if out is not None:
                out[body:].copy_(ends["param"])
        step.add_(1)
        for name in ("exp_avg", "exp_avg_sq") if not keep else ():
            states[name] = hollow(one.piece.shape, torch.float32)

    # -- the client's own ---------------------------------------------------------------------------------------------
    def _by_client(
        self, at_hand: AtHand, todo: Sequence[Todo], factors: Sequence[float], updates: int, *, keep: bool
    ) -> None:
        stored = [one.piece.data for one in todo]
        try:
            for one in todo:
                self._widen(at_hand, one, factors, keep=keep)
            self._step_of([one.piece for one in todo])
        finally:
            values = [one.piece.data for one in todo]
            for one, before in zip(todo, stored, strict=True):
                one.piece.grad, one.piece.data = None, before
        for one, value in zip(todo, values, strict=True):
            self._narrow(at_hand, one, value.view(-1), updates, keep=keep)

    def _widen(self, at_hand: AtHand, one: Todo, factors: Sequence[float], *, keep: bool) -> None:
        kept, piece, held = at_hand.flat.kept, one.piece, one.held
        if MASTER in at_hand.regions:
            value = at_hand.part(MASTER, held)
        elif REST in at_hand.regions:
            value = join(at_hand.part(PARAM, held), at_hand.part(REST, held))
        else:
            value = at_hand.part(PARAM, held)
        value = value.float() if kept.widened else value
        piece.data = value.view(piece.shape)
        piece.grad = scaled(one.grad, factors, kept.grad).to(value.dtype).view(piece.shape)
        state = self._client.state.get(piece, {})
        for name, old in state.items():
            if is_element_wise(old, piece):
                part = old if keep else at_hand.part(name, held).view(piece.shape)
                state[name] = part.float() if kept.widened else part

    def _narrow(self, at_hand: AtHand, one: Todo, value: Tensor, updates: int, *, keep: bool) -> None:
        flat, held, kept = at_hand.flat, one.held, at_hand.flat.kept
        name, start = flat.plan.entries[held.piece.index].spec.name, held.piece.start

        def narrow(what: str, wide: Tensor, dtype: torch.dtype) -> Tensor:
            if kept.update != "stochastic_rounding" or dtype != torch.bfloat16:
                return wide
            return stochastically(wide.reshape(-1), key=rounding_key(self._seed, updates, name, what), start=start)

        state = self._client.state.get(one.piece, {})
        for key, wide in state.items():
            if not is_element_wise(wide, one.piece):
                continue
            if keep:
                if kept.widened:
                    state[key] = narrow(key, wide, kept.state).to(kept.state).view(wide.shape)
                continue
            if key not in at_hand.regions:
                raise RuntimeError(f"{name}: the optimizer made a state {key!r} that it had not made on trial")
            part = at_hand.part(key, held)
            if wide.data_ptr() != part.data_ptr():
                part.copy_(narrow(key, wide.reshape(-1), kept.state))
            state[key] = hollow(one.piece.shape, kept.state)
        if REST in at_hand.regions:
            weight, rest = split(value)
            at_hand.part(PARAM, held).copy_(weight)
            at_hand.part(REST, held).copy_(rest)
            return
        own = at_hand.part(MASTER if MASTER in at_hand.regions else PARAM, held)
        if own.data_ptr() != value.data_ptr():
            own.copy_(narrow("", value, own.dtype))
        if MASTER in at_hand.regions:
            at_hand.part(PARAM, held).copy_(own)


def _torch_fused(
    kind: str, state: Mapping[str, Tensor], grad: Tensor, hyper: Mapping[str, Any], step: Tensor, factor: float
) -> None:
    run: Callable[..., None] = adamw if kind == "adamw" else adam
    run(
        [state["param"]], [scaled(grad, [factor] if factor != 1.0 else [], torch.float32)], [state["exp_avg"]],
        [state["exp_avg_sq"]], [], [step.clone()], fused=True, amsgrad=False, lr=hyper["lr"], beta1=hyper["betas"][0],
        beta2=hyper["betas"][1], eps=hyper["eps"], weight_decay=hyper["weight_decay"], maximize=False,
    )  # fmt: skip
