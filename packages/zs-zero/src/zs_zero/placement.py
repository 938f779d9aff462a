"""Parameters that the optimizer needs whole: each is brought to one rank for its update, and its pieces go back.

    shards         |a a a|a b b|b c c|        the plan's slices: where masters and gradients stay
    all-to-all     a -> rank 1    b -> rank 0    c -> rank 2      the plan's owners, of about equal load
    update         whole matrices, with the states that the optimizer keeps of them
    all-to-all     the new values back into the slices' masters

Storage, memory between steps and what the rest of the runtime sees stay those of ZeRO; only the optimizer's states lie
on the owner. On the wire a rank sends and receives its share of values, of gradients and of new values: 3 numel / world
elements where loads are equal (messages are padded to the longest). Nothing is held between steps but the states.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zs_comm import Group, all_gather, all_to_all, broadcast, exchange

from .flat import Flat
from .flat_pieces import HeldPiece
from .plan import Move, Piece, Plan, moves_of
from .precision import Kept


@dataclass(frozen=True)
class _Placed:
    """A whole parameter on the rank that updates it."""

    flat: Flat
    held: HeldPiece  # its `gathered` is `gradient`
    value: Tensor  # in the parameter's shape and `kept.value`; both have no memory between steps
    gradient: Tensor  # (numel,) in `kept.grad`


class Placement:
    """The whole parameters of one sharded model."""

    def __init__(self, plan: Plan, flats: Sequence[Flat], group: Group) -> None:
        self._group = group
        self._flats = flats  # in the plan's order
        self._owners: dict[int, int] = {}
        self._placed: dict[int, _Placed] = {}  # those that this rank updates, by their parameter
        self._moves: list[Move] = []
        owners = plan.owners if group.size > 1 else {}
        for flat in flats if owners else ():
            for index, entry in enumerate(flat.plan.entries):
                owner = owners.get(entry.spec.name)
                if owner is not None:
                    self._owners[id(flat.params[index])] = owner
                    if owner == group.rank:
                        self._placed[id(flat.params[index])] = _make(flat, index)
        if owners:
            self._moves = moves_of(plan)

    def owner(self, param: nn.Parameter) -> int | None:
        """Which position of the shard group updates `param` whole; None where every rank updates its pieces."""
        return self._owners.get(id(param))

    def pieces(self) -> Iterator[tuple[Tensor, Flat, HeldPiece]]:
        """The parameters that this rank updates whole: tensors in their shapes, with memory during a step only."""
        for one in self._placed.values():
            yield one.value, one.flat, one.held

    def clear(self) -> None:
        """Forgets all parameters: nothing is brought anywhere any more."""
        self._owners, self._placed, self._moves = {}, {}, []

    @torch.no_grad()
    def bring(self) -> None:
        """Values and reduced gradients of all placed parameters to their owners. Collective."""
        for one in self._placed.values():
            for tensor in (one.value, one.gradient):
                tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
        self._to_owners("whole parameters", Flat.values, lambda one: one.value, lambda k: k.value)
        self._to_owners("their gradients", lambda flat: flat.reduced(), lambda one: one.gradient, lambda k: k.grad)

    def _to_owners(
        self,
        label: str,
        source: Callable[[Flat], Tensor | None],
        target: Callable[[_Placed], Tensor],
        dtype_of: Callable[[Kept], torch.dtype],
    ) -> None:
        for dtype, moves in self._by_dtype(dtype_of):
            sent, last = self._message(moves, dtype), -1
            held: Tensor | None = None
            for move in moves:
                if move.source == self._group.rank:
                    if move.flat != last:  # once for a flat: exact values may have to be made
                        held, last = source(self._flats[move.flat]), move.flat
                    if held is not None:  # None: no gradient on any rank
                        part = held[move.piece.shard_start : move.piece.shard_stop]
                        sent[move.owner, move.at : move.at + move.piece.numel].copy_(part)
            got = all_to_all(torch.empty_like(sent), sent, self._group, label=label)
            del sent, held
            for move in moves:
                if move.owner == self._group.rank:
                    part = got[move.source, move.at : move.at + move.piece.numel]
                    target(self._of(move)).view(-1)[move.piece.start : move.piece.stop].copy_(part)

    @torch.no_grad()
    def give_back(self) -> None:
        """The updated values to the slices they came from; frees what `bring` took. Collective."""
        for dtype, moves in self._by_dtype(lambda kept: kept.value):
            sent = self._message(moves, dtype)
            for move in moves:
                if move.owner == self._group.rank:
                    part = self._of(move).value.view(-1)[move.piece.start : move.piece.stop]
                    sent[move.source, move.at : move.at + move.piece.numel].copy_(part)
            got = all_to_all(torch.empty_like(sent), sent, self._group, label="whole parameters, back")
            for move in moves:
                if move.source == self._group.rank:
                    part = got[move.owner, move.at : move.at + move.piece.numel]
                    self._flats[move.flat].store(move.piece.shard_start, move.piece.shard_stop, part)
        for one in self._placed.values():
            for tensor in (one.value, one.gradient):
                tensor.untyped_storage().resize_(0)

    def _by_dtype(self, dtype_of: Callable[[Kept], torch.dtype]) -> Iterator[tuple[torch.dtype, list[Move]]]:
        dtypes = [dtype_of(self._flats[move.flat].kept) for move in self._moves]
        for dtype in dict.fromkeys(dtypes):
            yield dtype, [move for move, own in zip(self._moves, dtypes, strict=True) if own == dtype]

    def _message(self, moves: list[Move], dtype: torch.dtype) -> Tensor:
        room = max(move.at + move.piece.numel for move in moves)
        return torch.zeros(self._group.size, room, dtype=dtype, device=self._flats[0].whole.device)

    def _of(self, move: Move) -> _Placed:
        return self._placed[id(self._flats[move.flat].params[move.piece.index])]

    def from_owner(self, value: object, owner: int) -> Tensor | None:
        """A state of any shape (or a number) that `owner` has, to all; None where it has none. Collective."""
        mine = value if isinstance(value, Tensor) else None if value is None else torch.tensor(value)
        said = ""
        if mine is not None and self._group.rank == owner:
            said = f"{str(mine.dtype).removeprefix('torch.')} {','.join(map(str, mine.shape))}"
        dtype, _, shape = exchange(said.encode(), self._group, label="a state")[owner].decode().partition(" ")
        if not dtype:
            return None
        device = self._flats[0].whole.device
        sizes = [int(size) for size in shape.split(",") if size]
        whole = torch.empty(sizes, dtype=getattr(torch, dtype), device=device)
        if mine is not None and self._group.rank == owner:
            whole.copy_(mine)
        return broadcast(whole, self._group, src=owner, label="a state")


class PieceSums:
    """The function that an optimizer which asks for norms is given: sums over pieces to sums over parameters."""

    def __init__(self, pieces: Sequence[tuple[Tensor, Flat, HeldPiece]], flats: Sequence[Flat], group: Group) -> None:
        first, count = {}, 0
        for flat in flats:
            first[id(flat)] = count
            count += len(flat.params)
        self._rows = {id(piece): first[id(flat)] + held.piece.index for piece, flat, held in pieces}
        self._count, self._group = count, group

    def __call__(self, pieces: Sequence[Tensor], sums: Tensor) -> Tensor:
        """From (len(pieces), k) fp64 to the same shape, summed over the ranks in their order. Collective."""
        shared = [position for position, piece in enumerate(pieces) if id(piece) in self._rows]  # the rest is local
        rows = [self._rows[id(pieces[position])] for position in shared]
        table = torch.zeros(self._group.size, self._count, sums.shape[1], dtype=torch.float64)
        table[self._group.rank, rows] = sums[shared]
        all_gather(table.view(-1), self._group, label="norms of parameters")
        total = torch.zeros_like(table[0])
        for one in table:
            total += one
        result = sums.clone()
        result[shared] = total[rows]
        return result


def _make(flat: Flat, index: int) -> _Placed:
    spec, device = flat.plan.entries[index].spec, flat.whole.device
    value = torch.empty(spec.shape, dtype=flat.kept.value, device=device)
    gradient = torch.empty(spec.numel, dtype=flat.kept.grad, device=device)
    for tensor in (value, gradient):
        tensor.untyped_storage().resize_(0)
    held = HeldPiece(flat.params[index], Piece(index, 0, spec.numel, 0), 0, spec.numel, gradient)
    return _Placed(flat, held, value, gradient)
