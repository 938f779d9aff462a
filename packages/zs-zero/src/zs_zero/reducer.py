"""Gradients: from the parameters into pooled flat buffers, summed over the ranks, kept as this rank's shard.

    backward      |  head  |  block 2  |  block 1  |  embed  | end
    fill buffer   ---fff------fff---------fff---------fff
    reduce              [--head--][-block 2-][-block 1-][-embed-]
    wait for it                   ^ when the next is issued

Reductions are issued in one order, the reverse of the plan's, on every rank. Which parameters to wait for is agreed:
those that took part last time on any rank. Whatever else turns up is reduced at the end of the backward, after the
ranks told each other. So a parameter used on one rank only is an ordinary case, and "already reduced" does not exist.

Where units are gathered in the backward too (stage 3), a rank without some gradient must not wait for values that come
only from ranks that wait for its share of that reduction. So a unit whose backward is `over` is reduced with what there
is, before this rank asks for the next unit's values. Then, of the ranks that have come the least far, one can go on.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from zs_comm import Group, agree, all_reduce, same_everywhere

from .flat import Flat
from .reductions import Reductions
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
    over: bool = False  # nothing more comes in this backward


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
        self._reductions = Reductions(
            groups, pre_factor=pre_factor, post_factor=post_factor, arrived=lambda flat, part: self._arrived(flat, part)
        )
        self._cursor = 0
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

    def over(self, flats: Iterable[Flat]) -> None:
        """The backward is through with these flats; reduces what is complete, on all ranks at the latest now."""
        for flat in flats:
            bucket = self._bucket_of.get(id(flat))
            if bucket is not None:
                bucket.over = True
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
            bucket.fired, bucket.issued, bucket.over = set(), False, False
        self._cursor = 0

    def _issue_complete(self) -> None:
        while self._cursor < len(self._order):
            bucket = self._order[self._cursor]
            if bucket.expected and not bucket.issued:
                if not (bucket.over or bucket.expected <= bucket.filled):
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
            self._reductions.forget_spare()
            return
        used, _ = self._agree_on_use(standing, settings)
        room = 0  # bytes of gradients that are gone, less those of the shards that came for them
        for bucket in self._step_order:
            if used[id(bucket)]:
                # one more buffer only in the room that others left: whole gradients stand around here
                flat = bucket.flat
                nbytes = flat.plan.padded_numel * self._wire_dtype(flat).itemsize
                self._reductions.ahead = int(room >= 2 * nbytes)
                self._reductions.make_room()
                room += nbytes - flat.held_numel * flat.grad_dtype.itemsize
                self._fill_standing(bucket)
                self._issue(bucket)
                bucket.issued = False
                bucket.flat.used |= used[id(bucket)]
        self.finish_issued()

    def finish_issued(self) -> None:
        """Waits for the reductions under way: what is reduced stands in the flats' `grad`."""
        self._reductions.ahead = 0  # nothing is filled any more
        self._reductions.forget_spare()
        self._reductions.finish()
        self._reductions.ahead = 1

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
        self._reductions.drop(wait=wait)
        self._cursor = 0
        for bucket in self.buckets:
            bucket.buffer, bucket.issued, bucket.over = None, False, False
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
        return self._reductions.take(flat.plan.padded_numel, self._wire_dtype(flat), flat.whole.device)

    def _wire_dtype(self, flat: Flat) -> torch.dtype:
        wire = flat.plan.wire or self._reduce_dtype
        return flat.plan.dtype if wire is None or flat.plan.dtype.is_complex else wire

    def _travels_as_is(self, flat: Flat, grad: Tensor) -> bool:
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
                self._reductions.give(buffer)
            return
        self._reductions.issue(flat, buffer)

    def _arrived(self, flat: Flat, result: Tensor, *, only: set[int] | None = None) -> None:
        flat.take_reduced(result, only=only)
        if self.on_arrival is not None:
            bucket = self._bucket_of[id(flat)]
            self.on_arrival(flat, bucket.expected | bucket.fired | flat.used)

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
