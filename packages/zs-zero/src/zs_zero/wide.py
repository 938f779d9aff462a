"""The client's optimizer on fp32 copies of what is kept in bf16, made for its step and gone after it.

    kept          widened                        step          narrowed
    p bf16        fp32(p), or p + rest           client's      to nearest, by chance, or split into p and rest
    state bf16    fp32(state)                    optimizer     to nearest, or by chance

So the arithmetic is fp32 whatever is kept, and an optimizer of any class can train bf16 weights. Optimizers of torch
keep nothing but their parameters' states, so they step one flat buffer at a time: that much is wide at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .flat import Flat
from .flat_pieces import HeldPiece, is_element_wise
from .rounding import join, rounding_key, stochastically

Owned = tuple[Tensor, Flat, HeldPiece]


class WideStep:
    """The steps of one client's optimizer; `updates` counts them, for the random numbers of the next."""

    def __init__(self, client: torch.optim.Optimizer, owned: Sequence[Owned], seed: int) -> None:
        self.updates = 0
        self._client = client
        self._seed = seed
        self._wide = [one for one in owned if one[1].kept.widened]
        alone = type(client).__module__.startswith("torch.optim.")  # an unknown one may count its calls
        parts: dict[int, list[Owned]] = {}
        for one in self._wide:
            parts.setdefault(id(one[1]) if alone else 0, []).append(one)
        self._parts = list(parts.values())
        self._rest_apart = alone

    def __bool__(self) -> bool:
        return bool(self._wide)

    def __call__(self, gradient_of: Callable[[Flat, HeldPiece], Tensor | None]) -> None:
        """One step. `gradient_of` gives a piece's gradient, or None where it has none; pieces that are not kept in
        bf16 have theirs already."""
        self.updates += 1
        listed = [group["params"] for group in self._client.param_groups]
        wide = {id(piece) for piece, _, _ in self._wide}
        try:
            if self._rest_apart:
                self._list(listed, lambda tensor: id(tensor) not in wide)
                self._client.step()
            for part in self._parts:
                mine = {id(piece) for piece, _, _ in part}
                if self._rest_apart:
                    self._list(listed, lambda tensor, mine=mine: id(tensor) in mine)  # type: ignore[misc]
                self._step(part, gradient_of)
        finally:
            for group, params in zip(self._client.param_groups, listed, strict=True):
                group["params"] = params

    @contextmanager
    def as_states(self) -> Iterator[None]:
        """Inside, pieces have the dtype in which their states are kept, to which torch casts states that it loads."""
        stored = [piece.data for piece, _, _ in self._wide]
        for piece, flat, _ in self._wide:
            dtype = flat.kept.state if piece.dim() else torch.float32  # of no dim: may be a counter, is never narrowed
            piece.data = torch.empty((), dtype=dtype, device=piece.device).expand(piece.shape)
        try:
            yield
        finally:
            for (piece, _, _), values in zip(self._wide, stored, strict=True):
                piece.data = values

    def _list(self, listed: list[list[Tensor]], chosen: Callable[[Tensor], bool]) -> None:
        for group, params in zip(self._client.param_groups, listed, strict=True):
            group["params"] = [tensor for tensor in params if chosen(tensor)]

    def _step(self, part: Iterable[Owned], gradient_of: Callable[[Flat, HeldPiece], Tensor | None]) -> None:
        widened: list[tuple[Owned, Tensor]] = []
        try:
            for piece, flat, held in part:
                gradient = gradient_of(flat, held)
                if gradient is not None:
                    widened.append(((piece, flat, held), piece.data))
                    piece.data = _wide_value(piece, flat, held)
                    piece.grad = gradient.view(piece.shape).to(piece.dtype)
                    self._convert(piece, lambda _, state: state.float())
            self._client.step()
        finally:
            for one, stored in widened:
                self._narrow(*one, stored)

    def _narrow(self, piece: Tensor, flat: Flat, held: HeldPiece, stored: Tensor) -> None:
        kept, values = flat.kept, piece.data.view(-1)
        name, start = flat.plan.entries[held.piece.index].spec.name, held.piece.start

        def narrow(what: str, wide: Tensor) -> Tensor:
            if kept.update != "stochastic_rounding":
                return wide
            key = rounding_key(self._seed, self.updates, name, what)
            return stochastically(wide.reshape(-1), key=key, start=start).view(wide.shape)

        piece.grad = None
        piece.data = stored
        if held.gathered is None:
            flat.store(held.low, held.high, narrow("", values))
        else:
            piece.view(-1).copy_(narrow("", values))
        if kept.state == torch.bfloat16:
            self._convert(piece, lambda key, state: narrow(key, state).to(kept.state))

    def _convert(self, piece: Tensor, convert: Callable[[str, Tensor], Tensor]) -> None:
        state = self._client.state.get(piece, {})
        for key, value in state.items():
            if is_element_wise(value, piece):
                state[key] = convert(key, value)


def _wide_value(piece: Tensor, flat: Flat, held: HeldPiece) -> Tensor:
    if flat.rest is not None and held.gathered is None:
        rest = flat.rest[held.low : held.high]
        return join(piece.detach().view(-1), rest).view(piece.shape)
    return piece.data.float()  # an fp32 one as it is
