"""Gradients: from the parameters into pooled flat buffers, summed over the ranks, kept as this rank's shard.

    backward      |  head  |  block 2  |  block 1  |  embed  | end
    fill buffer   ---fff------fff---------fff---------fff
    reduce              [--head--][-block 2-][-block 1-][-embed-]
    wait for it                   ^ one reduction later than it was issued

Reductions are issued in one order, the reverse of the plan's, on every rank. Which parameters to wait for is agreed:
those that took part last time on any rank. Whatever else turns up is reduced at the end of the backward, after the
ranks told each other. So a parameter used on one rank only is an ordinary case, and "already reduced" does not exist.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from zs_comm import Group, Work, agree, all_reduce, reduce_scatter, same_everywhere

from .flat import Flat
from .standing import Standing

_DIGEST = 8  # bytes


@dataclass(frozen=True)
class Groups:
    """The ranks of data parallel training: shard x replicate = dp."""

    dp: Group
    shard: Group
    replicate: Group
    # Values travel on a channel of their own: gathers follow the model and reductions the plan, and where a gradient
    # is missing on one rank the two streams interleave differently there.
    gather: Group
    others: tuple[Group, ...] = ()  # axes of more than one rank along which the model itself is spread

    @classmethod
    def of(cls, dp: Group, shard: Group, replicate: Group, others: tuple[Group, ...] = ()) -> "Groups":
        return cls(dp, shard, replicate, shard.channel(1) if shard.size > 1 else shard, others)

    def set_checked(self, checked: bool) -> None:
        for group in (self.dp, self.shard, self.replicate, self.gather):
            group.checked = checked


@dataclass
class Bucket:
    """The gradients of one trainable flat on their way."""

    flat: Flat
    standing: Standing
    expected: set[int]  # the parameters to wait for: those used last time, on any rank
    buffer: Tensor | None = None  # (padded_numel,) in the wire's dtype
    filled: set[int] = field(default_factory=set)  # parameters in `buffer`
    fired: set[int] = field(default_factory=set)  # parameters that got a gradient in this backward
    issued: bool = False


class Reducer:
    """Reduces the trainable flats' gradients; used from hooks during a backward (stages 2, 3) or at the step (0, 1)."""

    def __init__(
        self, flats: Iterable[Flat], groups: Groups, *, reduce_dtype: torch.dtype | None, pre_factor: float | None,
        post_factor: float,
    ) -> None:  # fmt: skip
        self.groups = groups
        self.buckets = [Bucket(flat, Standing(flat), set(range(len(flat.params)))) for flat in flats]
        self._order = list(reversed(self.buckets))
        # at the step whole gradients stand around already: what needs no buffer goes first and makes room for the rest
        self._step_order = sorted(self._order, key=lambda b: (len(b.flat.params) > 1, b.flat.plan.padded_numel))
        self._bucket_of = {id(bucket.flat): bucket for bucket in self.buckets}
        self._reduce_dtype = reduce_dtype
        self._pre_factor = pre_factor
        self._post_factor = post_factor
        self._cursor = 0
        self._in_flight: deque[tuple[Flat, Tensor, Work]] = deque()
        self._spare: list[Tensor] = []
        self._ahead = 1  # reductions under way while the next buffer is being filled
        # told of reduced gradients as they come, and of which parameters they are as far as is known by then
        self.on_arrival: Callable[[Flat, set[int]], None] | None = None

    # -- during a backward --------------------------------------------------------------------------------------------
    def add(self, flat: Flat, index: int, grad: Tensor) -> None:
        """Takes over parameter `index`'s gradient of this backward, and reduces what is complete."""
        bucket = self._bucket_of[id(flat)]
        self._fill(bucket, index, bucket.standing.with_new(index, grad))
        bucket.fired.add(index)
        if not bucket.issued and bucket.expected <= bucket.filled:
            self._issue_complete()

    def finish_backward(self) -> None:
        """Reduces what the backward left incomplete, after the ranks agreed on who took part."""
        for bucket in self._order[self._cursor :]:
            if bucket.expected:
                self._issue(bucket)
        used, late = self._agree_on_use([bucket.fired for bucket in self.buckets])
        for bucket in self._order:
            if used[id(bucket)] and not bucket.issued:
                self._issue(bucket)
        for bucket in self._order:
            if late[id(bucket)]:
                self._issue(bucket)
        for bucket in self.buckets:
            bucket.expected = used[id(bucket)]
            bucket.flat.used |= used[id(bucket)]
            bucket.fired, bucket.issued = set(), False
        self._cursor = 0

    def _issue_complete(self) -> None:
        while self._cursor < len(self._order):
            bucket = self._order[self._cursor]
            if bucket.expected and not bucket.issued:
                if not bucket.expected <= bucket.filled:
                    return
                self._issue(bucket)
            self._cursor += 1

    # -- gradients that were not reduced yet --------------------------------------------------------------------------
    def keep(self, flat: Flat, index: int) -> None:
        """See `Standing.keep`."""
        self._bucket_of[id(flat)].standing.keep(index)

    def standing(self, flat: Flat, index: int) -> Tensor | None:
        """This rank's gradient of parameter `index` that was not reduced yet, in the parameter's shape."""
        return self._bucket_of[id(flat)].standing.get(index)

    def set_standing(self, flat: Flat, index: int, grad: Tensor) -> None:
        """Makes `grad` (in the parameter's shape, or flat) what `standing` gives."""
        self._bucket_of[id(flat)].standing.put(index, grad)

    def take_standing(self) -> list[tuple[Flat, int, Tensor]]:
        """Gives away what `standing` gives, of all parameters."""
        found = []
        for bucket in self.buckets:
            for index, param in enumerate(bucket.flat.params):
                grad = bucket.standing.get(index)
                if grad is not None:
                    found.append((bucket.flat, index, grad))
                param.grad = None
            bucket.standing.clear()
        return found

    # -- at the step --------------------------------------------------------------------------------------------------
    def flush(self, settings: str = "") -> None:
        """Reduces every gradient that still stands here (`standing`), then waits for all reductions.

        Raises RankDisagreement, with nothing changed, unless the ranks come with the same `settings`; and, on all
        ranks, what went wrong on one with gradients that are in files.
        """
        self._flush(settings)
        homes = [bucket.flat.home for bucket in self.buckets]
        if any(home is not None and home.gradients_away for home in homes):
            failures = (bucket.flat.gradient_failure for bucket in self.buckets)
            agree(self.groups.dp, next(filter(None, failures), None), what="moving reduced gradients")

    def _flush(self, settings: str) -> None:
        standing = [bucket.standing.indices() for bucket in self.buckets]
        if self.groups.dp.size == 1:
            for bucket, indices in zip(self.buckets, standing, strict=True):
                self._keep_local(bucket, indices)
            self._spare.clear()
            return
        used, _ = self._agree_on_use(standing, settings)
        room = 0  # bytes of gradients that are gone, less those of the shards that came for them
        for bucket in self._step_order:
            if used[id(bucket)]:
                # one more buffer only in the room that others left: whole gradients stand around here
                flat = bucket.flat
                nbytes = flat.plan.padded_numel * self._wire_dtype(flat).itemsize
                self._ahead = int(room >= 2 * nbytes)
                room += nbytes - flat.held_numel * flat.grad_dtype.itemsize
                self._fill_standing(bucket)
                self._issue(bucket)
                bucket.issued = False
                bucket.flat.used |= used[id(bucket)]
        self.finish_issued()

    def finish_issued(self) -> None:
        """Waits for the reductions under way: what is reduced stands in the flats' `grad`."""
        self._ahead = 0  # nothing is filled any more
        self._spare.clear()
        while self._in_flight:
            self._finish_oldest()
        self._ahead = 1

    def _fill_standing(self, bucket: Bucket) -> None:
        """Everything that stands here into the buffer of a reduction; kept gradients in the wire's dtype are one."""
        flat = bucket.flat
        for index, param in enumerate(flat.params):
            if flat.kept.accumulates:
                bucket.standing.keep(index)
            elif param.grad is not None:
                self._fill(bucket, index, param.grad)
                param.grad = None
        sums = bucket.standing
        if sums.buffer is not None:
            if bucket.buffer is None and sums.buffer.dtype == self._wire_dtype(flat):
                self._make_room()
                bucket.buffer, bucket.filled = sums.buffer, set(sums.inside)
            else:
                for index in sums.inside:
                    self._fill(bucket, index, sums.view(index))
            sums.clear()

    def _keep_local(self, bucket: Bucket, indices: set[int]) -> None:
        """One rank: the sum is the gradient itself. It moves where it is to be in another dtype."""
        flat = bucket.flat
        before, flat.used = flat.used, flat.used | indices
        for index in indices:
            grad = flat.params[index].grad
            if grad is not None and grad.layout != torch.strided:
                flat.params[index].grad = grad.to_dense()
        if flat.leaves_gradients or not indices:
            return
        total = flat.reduced()
        if total is None:
            total = flat.beside(flat.held_numel, flat.grad_dtype)
        for index in indices:
            grad, entry = bucket.standing.get(index), flat.plan.entries[index]
            if grad is not None:
                view = total[entry.offset : entry.stop]
                view.add_(grad.detach().reshape(-1).to(view.device))
                if index in before:
                    view.copy_(view.to(flat.kept.accum))
                flat.params[index].grad = None
        flat.factors = []
        flat.set_reduced(total)
        bucket.standing.clear()

    def drop(self, *, wait: bool = True) -> None:
        """Forgets all gradients: after the step, or when it is aborted (reductions under way are waited for)."""
        while self._in_flight:
            work = self._in_flight.popleft()[2]
            if wait:
                work.wait()
        self._cursor = 0
        self._spare.clear()
        for bucket in self.buckets:
            bucket.buffer, bucket.issued = None, False
            bucket.filled.clear()
            bucket.standing.clear()
            bucket.fired.clear()
            bucket.flat.drop_gradients()

    # -- buffers ------------------------------------------------------------------------------------------------------
    def _fill(self, bucket: Bucket, index: int, grad: Tensor) -> None:
        grad = grad.detach()
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        if index in bucket.filled and self.groups.dp.size == 1:
            self._issue(bucket)  # one rank adds up as autograd does: one by one
        if bucket.buffer is None:
            if grad.numel() == bucket.flat.plan.padded_numel and self._travels_as_is(bucket.flat, grad):
                bucket.buffer = grad.view(-1)  # it is the whole flat: no copy
                bucket.filled.add(index)
                return
            bucket.buffer = self._take(bucket.flat)
        entry = bucket.flat.plan.entries[index]
        view = bucket.buffer[entry.offset : entry.stop].view(entry.spec.shape)
        if index in bucket.filled:
            view.add_(grad)
        else:
            view.copy_(grad)
            bucket.filled.add(index)

    def _take(self, flat: Flat) -> Tensor:
        self._make_room()
        numel, dtype = flat.plan.padded_numel, self._wire_dtype(flat)
        for position, spare in enumerate(self._spare):
            if spare.numel() == numel and spare.dtype == dtype:
                return self._spare.pop(position)
        self._spare.clear()  # blocks of one size follow one another; what does not fit now rarely does soon
        return torch.empty(numel, dtype=dtype, device=flat.whole.device)

    def _wire_dtype(self, flat: Flat) -> torch.dtype:
        wire = flat.plan.wire or self._reduce_dtype
        return flat.plan.dtype if wire is None or flat.plan.dtype.is_complex else wire

    def _make_room(self) -> None:
        while len(self._in_flight) > self._ahead:
            self._finish_oldest()

    def _travels_as_is(self, flat: Flat, grad: Tensor) -> bool:
        self._make_room()
        return grad.is_contiguous() and grad.dtype == self._wire_dtype(flat) and grad.device == flat.whole.device

    # -- the collective -----------------------------------------------------------------------------------------------
    def _issue(self, bucket: Bucket) -> None:
        flat = bucket.flat
        buffer = bucket.buffer if bucket.buffer is not None else self._take(flat)
        for index, entry in enumerate(flat.plan.entries):
            if index not in bucket.filled:  # what an earlier use of the buffer left there must not be added
                buffer[entry.offset : entry.stop].zero_()
        filled = set(bucket.filled)
        bucket.buffer, bucket.issued = None, True
        bucket.filled.clear()
        if self.groups.dp.size == 1:
            self._arrived(flat, buffer, only=filled)
            if flat.grad is not buffer:
                self._spare = [buffer]
            return
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

    def _finish_oldest(self) -> None:
        flat, buffer, work = self._in_flight.popleft()
        reduced = work.wait()
        result = buffer if reduced is None else reduced
        if self.groups.shard.size > 1 and self.groups.replicate.size > 1:
            factor = self._post_factors(result.dtype)[1]
            all_reduce(result, self.groups.replicate, op="sum", post_factor=factor, label=flat.name)
        if self._ahead and result is not buffer:
            self._spare = [*self._spare[-1:], buffer]  # gradients that were buffers themselves come here too
        del work, buffer, reduced
        self._arrived(flat, result)

    def _arrived(self, flat: Flat, result: Tensor, *, only: set[int] | None = None) -> None:
        flat.take_reduced(result, only=only)
        if self.on_arrival is not None:
            bucket = self._bucket_of[id(flat)]
            self.on_arrival(flat, bucket.expected | bucket.fired | flat.used)

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
        if shard.size > 1 and replicate.size > 1:
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

    # -- agreement ----------------------------------------------------------------------------------------------------
    def _agree_on_use(self, mine: list[set[int]], settings: str = "") -> tuple[dict[int, set[int]], dict[int, bool]]:
        """The union over the ranks of the parameters used, and which buckets have gradients that came after theirs.

        The same message says whether `settings` are the same everywhere: the largest and the smallest digest are.
        """
        counts = [len(bucket.flat.params) for bucket in self.buckets]
        message = torch.zeros(sum(counts) + len(self.buckets) + 2 * _DIGEST, dtype=torch.uint8)
        if settings:
            digest = torch.tensor(list(hashlib.blake2b(settings.encode(), digest_size=_DIGEST).digest()))
            message[-2 * _DIGEST :] = torch.cat([digest, 255 - digest])
        base = 0
        for bucket, indices, count in zip(self.buckets, mine, counts, strict=True):
            for index in indices:
                message[base + index] = 1
            message[base + count] = bucket.issued and bool(bucket.filled)
            base += count + 1
        all_reduce(message, self.groups.dp, op="max", label="parameters used")
        flags = message.tolist()
        most, least = flags[-2 * _DIGEST : -_DIGEST], flags[-_DIGEST:]  # the latter as 255 - it
        if settings and any(high + low != 255 for high, low in zip(most, least, strict=True)):
            same_everywhere(settings, self.groups.dp, what="a setting of the optimizer's param_groups")
        used, late, base = {}, {}, 0
        for bucket, count in zip(self.buckets, counts, strict=True):
            used[id(bucket)] = {index for index in range(count) if flags[base + index]}
            late[id(bucket)] = bool(flags[base + count])
            base += count + 1
        return used, late
