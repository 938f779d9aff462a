"""The sums of gradients that are under way, and the buffers they travel in.

With two axes of data parallelism a sum goes along the shard axis first, as the whole flat, and then, as this rank's
part of it, along the replicate axis:

    issue               1       2       3       4
    shard axis          |---1---|---2---|---3---|
    replicate axis              |---1---|---2---|
    arrived                             1       2

This rank waits where it issues, and nowhere else, for what was issued before. So whoever issued the same has waited for
the same: no rank waits for one that is yet to come to its own wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from zs_comm import Work, all_reduce, reduce_scatter

from .flat import Flat

if TYPE_CHECKING:
    from .reducer import Groups


class Reductions:
    """Issues sums over the ranks and hands over what this rank keeps of them: `arrived`, in the order of issue."""

    def __init__(
        self, groups: Groups, *, pre_factor: float | None, post_factor: float, arrived: Callable[[Flat, Tensor], None]
    ) -> None:
        self.groups = groups
        self.ahead = 1  # sums under way while the next buffer is being filled
        self._pre_factor, self._post_factor = pre_factor, post_factor
        self._arrived = arrived
        self._two_axes = groups.shard.size > 1 and groups.replicate.size > 1
        self._in_flight: deque[tuple[Flat, Tensor, Work]] = deque()  # (flat, buffer, its sum over the first axis)
        self._replicating: deque[tuple[Flat, Tensor, Work]] = deque()  # (flat, this rank's part, its sum)
        self._spare: list[Tensor] = []

    # -- buffers ------------------------------------------------------------------------------------------------------
    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer (numel,), its content undefined."""
        for position, spare in enumerate(self._spare):
            if spare.numel() == numel and spare.dtype == dtype:
                return self._spare.pop(position)
        self._spare.clear()  # blocks of one size follow one another; what does not fit now rarely does soon
        return torch.empty(numel, dtype=dtype, device=device)

    def give(self, buffer: Tensor) -> None:
        """`buffer` may be taken again."""
        self._spare = [buffer]

    def forget_spare(self) -> None:
        self._spare.clear()

    # -- sums ---------------------------------------------------------------------------------------------------------
    def issue(self, flat: Flat, buffer: Tensor) -> None:
        """Starts the sum of `buffer` (padded_numel,) over the ranks, which all come with the same flats in order."""
        if flat.plan.rows:
            self._arrived(flat, self._sum_rows(flat, buffer))
            return
        if self.groups.shard.size == 1:
            work = all_reduce(
                buffer, self.groups.replicate, op="sum", pre_factor=self._pre_factor, post_factor=self._post_factor,
                label=flat.name, async_op=True,
            )  # fmt: skip
        else:
            work = reduce_scatter(
                buffer, self.groups.shard, op="sum", pre_factor=self._pre_factor,
                post_factor=self._post_factors(buffer.dtype)[0], label=flat.name, async_op=True,
            )  # fmt: skip
        self._in_flight.append((flat, buffer, work))
        self.make_room()

    def make_room(self) -> None:
        """Waits until at most `ahead` buffers are under way. Where all ranks have issued the same."""
        self._advance_to(self.ahead)

    def finish(self) -> None:
        """Waits for everything under way. Where all ranks have issued the same."""
        self._advance_to(0)
        while self._replicating:
            self._finish_replicated()

    def drop(self, *, wait: bool) -> None:
        """Forgets everything under way; `wait`: until it is over."""
        for under_way in (self._in_flight, self._replicating):
            while under_way:
                work = under_way.popleft()[2]
                if wait:
                    work.wait()
        self._spare.clear()

    def _advance_to(self, count: int) -> None:
        while len(self._in_flight) > count:
            flat, buffer, work = self._in_flight.popleft()
            reduced = work.wait()
            result = buffer if reduced is None else reduced
            if self.ahead and result is not buffer:
                self._spare = [*self._spare[-1:], buffer]  # gradients that were buffers themselves come here too
            del work, buffer, reduced
            if not self._two_axes:
                self._arrived(flat, result)
                continue
            factor = self._post_factors(result.dtype)[1]
            after = all_reduce(
                result, self.groups.replicate, op="sum", post_factor=factor, label=flat.name, async_op=True
            )
            self._replicating.append((flat, result, after))
            while len(self._replicating) > self.ahead:
                self._finish_replicated()

    def _finish_replicated(self) -> None:
        flat, result, work = self._replicating.popleft()
        work.wait()
        self._arrived(flat, result)

    def _sum_rows(self, flat: Flat, buffer: Tensor) -> Tensor:
        """This rank's part of the sum, of which only the rows travel that any rank touched: elsewhere it is 0.

        The same arithmetic as for all rows, so the same bits.
        """
        shard, replicate = self.groups.shard, self.groups.replicate
        tables = [buffer[entry.offset : entry.stop].view(entry.spec.shape) for entry in flat.plan.entries]
        touched = torch.cat([(table != 0).any(1) for table in tables]).to(torch.uint8)
        all_reduce(touched, self.groups.dp, op="max", label=f"{flat.name} rows")
        rows = [flags.nonzero().view(-1) for flags in touched.split([len(table) for table in tables])]
        packed = [table[index] for table, index in zip(tables, rows, strict=True)]
        post, after = self._post_factors(buffer.dtype) if shard.size > 1 else (self._post_factor, None)
        all_reduce(
            packed, shard if shard.size > 1 else replicate, op="sum", pre_factor=self._pre_factor, post_factor=post,
            label=flat.name,
        )  # fmt: skip
        if self._two_axes:
            all_reduce(packed, replicate, op="sum", post_factor=after, label=flat.name)
        for table, index, part in zip(tables, rows, packed, strict=True):
            table[index] = part
        low = shard.rank * flat.plan.shard_numel
        return buffer[low : low + flat.plan.shard_numel].clone() if shard.size > 1 else buffer

    def _post_factors(self, wire: torch.dtype) -> tuple[float | None, float | None]:
        """After the sum over the shard axis, and after that over the replicate axis where there is one.

        What is between them is rounded to the wire's dtype. In fp16 a sum may overflow there whose mean does not.
        """
        if self.groups.replicate.size == 1 or wire == torch.float16:
            return self._post_factor, None
        return None, self._post_factor
