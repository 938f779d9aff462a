"""The pipeline over blocks: what is under way at the same time, how much memory it takes, and which way it goes."""

from __future__ import annotations

import errno
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zs_zero.order import Order
from zs_zero.tiers.blocks import Block
from zs_zero.tiers.slots import Slot, slot_nbytes
from zs_zero.tiers.sweep import Sweep

sys.path.insert(0, str(Path(__file__).parent))

from tier_fault_runs import differing
from tier_records import AWAY, BLOCK, LAYERS, NUMEL, STATES, Call, Training, layers, reads, writes

SIZES = {"param": 64}
Blocks = list[Block]


def blocks(count: int) -> Blocks:
    return [Block(0, index, 64 * index, 64 * index + 64, False) for index in range(count)]


def slots(count: int) -> list[Slot]:
    return [Slot(memoryview(bytearray(slot_nbytes(SIZES))), SIZES) for _ in range(count)]


class Clock:
    now = 0.0


class Transfer:
    """Over after `takes`; a wait moves the clock there."""

    def __init__(self, clock: Clock, takes: float, ended: Callable[[], None], error: OSError | None = None) -> None:
        self._clock, self._due, self._ended, self._error = clock, clock.now + takes, ended, error
        self.waited = False

    @property
    def done(self) -> bool:
        return self._clock.now >= self._due

    def wait(self, timeout_s: float = 120.0) -> int:
        self._clock.now = max(self._clock.now, self._due)
        self.waited = True
        self._ended()
        if self._error is not None:
            raise self._error
        return 0


class Disk:
    """A machine whose transfers and updates take a time of one, or of `takes()`; it keeps the order of what happens."""

    def __init__(self, buffers: int, *, takes: Callable[[], float] = lambda: 1.0, ready: object = None) -> None:
        self.clock, self.slots, self.takes = Clock(), slots(buffers), takes
        self.log: list[tuple[str, int]] = []
        self.flying: list[tuple[str, int, Transfer]] = []
        self.faults: dict[tuple[str, int], OSError] = {}
        self.ready: set[int] | None = ready  # type: ignore[assignment]
        self.most = 0
        self.under_way: list[tuple[int, set[tuple[str, int]]]] = []  # at each update
        self.sweep = Sweep(self.slots, start=self.start, update=self.update, ready=self.is_ready)

    def is_ready(self, block: Block) -> bool:
        return self.ready is None or block.index in self.ready

    def transfer(self, op: str, block: Block, slot: Slot) -> None:
        self.log.append((op, block.index))
        ticket = Transfer(self.clock, self.takes(), lambda: None, self.faults.get((op, block.index)))
        self.flying.append((op, block.index, ticket))
        slot.tickets.append(ticket)
        used = {index for _, index, one in self.flying if not one.done}
        self.most = max(self.most, len(used))

    def start(self, block: Block, slot: Slot) -> None:
        assert slot.block == block
        assert not slot.tickets, "a slot is used again while something moves from or to it"
        self.transfer("read", block, slot)

    def update(self, block: Block, slot: Slot) -> None:
        assert slot.block == block and not slot.tickets, "an update before its block is there"
        self.under_way.append((block.index, {(op, index) for op, index, one in self.flying if not one.done}))
        self.log.append(("update", block.index))
        self.clock.now += self.takes()
        self.transfer("write", block, slot)


# -- the pipeline ------------------------------------------------------------------------------------------------------
def test_a_block_is_read_and_another_written_while_one_is_updated() -> None:
    disk = Disk(3)
    disk.sweep.queue(blocks(12))
    disk.sweep.finish()
    for number, under_way in disk.under_way[2:-2]:
        assert under_way == {("read", number + 1), ("write", number - 1)}
    for number in range(11):
        assert disk.log.index(("read", number + 1)) < disk.log.index(("update", number))
    assert disk.clock.now == 1 + 12 + 1, "the first read, all updates, the last write: the rest is hidden"


@pytest.mark.parametrize(("buffers", "time"), [(1, 36), (2, 25), (3, 14), (4, 14), (20, 14)])
def test_any_number_of_buffers(buffers: int, time: int) -> None:
    disk = Disk(buffers)
    disk.sweep.queue(blocks(12))
    disk.sweep.finish()
    assert [index for what, index in disk.log if what == "update"] == list(range(12))
    assert [block.index for block in disk.sweep.done] == list(range(12))
    assert disk.most <= buffers
    assert disk.clock.now <= time
    assert all(one.done for _, _, one in disk.flying)


@settings(deadline=None, max_examples=80)
@given(
    count=st.integers(0, 15), buffers=st.integers(1, 6), seed=st.integers(0, 1000), calls=st.integers(0, 4),
    early=st.integers(0, 15),
)  # fmt: skip
def test_every_block_once_and_in_order_however_long_things_take(
    count: int, buffers: int, seed: int, calls: int, early: int
) -> None:
    source = random.Random(seed)
    disk = Disk(buffers, takes=lambda: source.choice([0.0, 0.5, 1.0, 7.0]), ready=set(range(early)))
    todo = blocks(count)
    disk.sweep.queue(todo[: count // 2])
    for _ in range(calls):
        disk.sweep.advance()
        disk.clock.now += source.random() * 3
    assert {index for what, index in disk.log if what == "update"} <= set(range(early))
    disk.ready = None
    disk.sweep.queue(todo[count // 2 :])
    disk.sweep.finish()
    for op in ("read", "update", "write"):
        assert [index for what, index in disk.log if what == op] == list(range(count))
    assert disk.most <= buffers
    assert all(one.done for _, _, one in disk.flying)


def test_nothing_waits_before_the_step() -> None:
    disk = Disk(3, ready=set())
    disk.sweep.queue(blocks(6))
    disk.sweep.advance()
    assert disk.log == [("read", 0), ("read", 1), ("read", 2)], "read ahead, as far as there are slots"
    disk.ready = {0, 1, 2}
    disk.sweep.advance()
    assert disk.log[3:] == [] and disk.clock.now == 0, "what is on its way is not waited for"
    disk.clock.now = 1
    disk.sweep.advance()
    assert [entry for entry in disk.log if entry[0] == "update"] == [("update", 0), ("update", 1), ("update", 2)]
    assert not any(one.waited for op, _, one in disk.flying if op == "write" and not one.done)


def test_what_never_gets_ready_is_left_out() -> None:
    disk = Disk(2, ready={1, 3, 4})
    disk.sweep.queue(blocks(6))
    disk.sweep.advance()
    disk.sweep.finish()
    assert [block.index for block in disk.sweep.done] == [1, 3, 4]
    assert [index for what, index in disk.log if what == "write"] == [1, 3, 4]


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("number", [0, 3, 5])
@pytest.mark.parametrize("buffers", [1, 3])
def test_an_error_ends_the_sweep_and_leaves_nothing_under_way(op: str, number: int, buffers: int) -> None:
    disk = Disk(buffers)
    disk.faults[op, number] = OSError(errno.EIO, "broken")
    disk.sweep.queue(blocks(6))
    with pytest.raises(OSError, match="broken"):
        disk.sweep.finish()
    disk.sweep.drain()
    assert all(one.done for _, _, one in disk.flying)
    assert all(not slot.tickets for slot in disk.slots)
    assert (op == "read") == (("update", number) not in disk.log)
    again = Sweep(disk.slots, start=disk.start, update=disk.update, ready=disk.is_ready)
    disk.faults.clear()
    again.queue(blocks(6))
    again.finish()
    assert len(again.done) == 6


def test_an_update_that_raises_leaves_nothing_under_way() -> None:
    disk = Disk(3)

    def update(block: Block, slot: Slot) -> None:
        if block.index == 2:
            raise RuntimeError("no")
        disk.update(block, slot)

    sweep = Sweep(disk.slots, start=disk.start, update=update, ready=disk.is_ready)
    sweep.queue(blocks(6))
    with pytest.raises(RuntimeError, match="no"):
        sweep.finish()
    sweep.drain()
    assert all(one.done for _, _, one in disk.flying)


def test_memory_that_something_hangs_on_is_not_used_again() -> None:
    slot = slots(1)[0]

    class Hanging:
        done = False

        def wait(self, timeout_s: float = 120.0) -> int:
            if not self.done:
                raise TimeoutError("it hangs")
            return 0

    ticket, (first, second) = Hanging(), blocks(2)
    slot.take(first)
    slot.tickets.append(ticket)
    with pytest.raises(TimeoutError):
        slot.wait()
    with pytest.raises(TimeoutError):
        slot.take(second)
    assert slot.block == first
    ticket.done = True
    slot.take(second)
    assert slot.block == second


def test_slots_know_what_they_hold() -> None:
    first, second = blocks(2)
    slot = Slot(memoryview(bytearray(slot_nbytes({"a": 100, "b": 5000}))), {"a": 100, "b": 5000})
    assert slot_nbytes({"a": 100, "b": 5000}) == 3 * 4096
    slot.tensor("a", 25, torch.float32).fill_(1)
    slot.tensor("b", 1250, torch.float32).fill_(2)
    assert slot.tensor("a", 25, torch.float32).tolist() == [1] * 25, "regions do not overlap"
    assert bytes(slot.view("b", 4)) == bytes(torch.tensor([2.0]).view(torch.uint8).tolist())
    slot.take(first)
    slot.valid.add("a")
    slot.take(first)
    assert slot.valid == {"a"}
    slot.take(second)
    assert slot.valid == set()


# -- in a training -----------------------------------------------------------------------------------------------------
def per_block(calls: list[Call]) -> list[tuple[int, int]]:
    """Blocks in the order in which their first region moves."""
    return list(dict.fromkeys(call.block for call in calls))


@pytest.mark.parametrize("buffers", [1, 2, 5, 1000])
def test_the_direction_alternates_and_the_last_blocks_are_not_read_again(buffers: int, tmp_path: Path) -> None:
    training = Training(tmp_path, offload_optimizer={**STATES, "buffer_count": buffers})
    training.steps(2)
    every = NUMEL // BLOCK
    before: list[tuple[int, int]] = []
    for step in range(2, 6):
        calls = training.recorded(lambda seed=step: training.steps(1, start=seed))  # type: ignore[misc]
        read, written = per_block(reads(calls, "optimizer")), per_block(writes(calls, "optimizer"))
        assert len(written) == every
        assert written == sorted(written, reverse=written[0] != (0, 0))
        if before:
            assert written == before[::-1]
            kept = min(buffers, every)
            assert read == written[kept:], "all but those that were in slots, which come first"
            assert len(reads(calls, "optimizer")) == 2 * (every - kept), "each region once"
        assert {call.phase for call in calls if call.kind == "optimizer"} == {"step"}
        before = written
    assert len(training.optimizer._tiers.slots) == min(buffers, every)  # type: ignore[union-attr]
    training.close()


@pytest.mark.parametrize("buffers", [3, 4])
def test_reads_are_issued_before_the_update_of_the_block_before(buffers: int, tmp_path: Path) -> None:
    training = Training(tmp_path, offload_optimizer={**STATES, "buffer_count": buffers}, dtype=torch.bfloat16)
    training.steps(2)
    calls = training.recorded(lambda: training.steps(1, start=2))
    order = per_block(writes(calls, "optimizer"))
    first = {(op, block): number for number, (op, block) in enumerate((c.op, c.block) for c in calls[::-1])}
    at = {key: len(calls) - 1 - number for key, number in first.items()}  # the first call of each
    for one, other in zip(order[buffers:], order[buffers + 1 :], strict=False):
        assert at["read", other] < at["write", one], "writes begin when an update ends"
    training.close()


def test_values_set_by_the_user_are_not_taken_from_a_slot(tmp_path: Path) -> None:
    """What a slot keeps from the last step is void where its block was written since."""
    found = []
    for options in ({}, {"offload_optimizer": {**STATES, "buffer_count": 1000}}):
        training = Training(tmp_path, **options)
        training.steps(2)
        param = next(training.model.parameters())
        training.optimizer.set_local_param(param, training.optimizer.local_param(param) * 2)
        training.optimizer.set_local_state(param, "exp_avg", training.optimizer.local_state(param, "exp_avg") * 3)
        training.steps(2, start=2)
        found.append(training.values())
        training.close()
    assert not differing(*found)


# -- units read ahead --------------------------------------------------------------------------------------------------
def test_order_tells_what_comes() -> None:
    order, events = Order(), [(0, "forward"), (1, "forward"), (0, "forward"), (1, "backward"), (0, "backward")]
    assert order.ahead(3) == []
    order.observe(events[0])
    assert order.ahead(3) == []
    for event in events[1:]:
        order.observe(event)
    assert order.ahead(3) == [], "what follows the end was not seen yet"
    for event in events:
        order.observe(event)
    assert order.ahead(0) == []
    assert order.ahead(1) == [events[0]] == [order.predict()]
    assert order.ahead(2) == events[:2]
    assert order.ahead(7) == events + events[:2]
    assert order.turn == {1}
    order.observe(events[0])
    assert order.ahead(2) == events[1:3]
    order.observe((5, "forward"))  # another way
    assert order.changes == 1
    assert order.ahead(3) == []


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
def test_units_are_read_ahead_and_no_more_than_that(depth: int, tmp_path: Path) -> None:
    training = Training(
        tmp_path, model=layers(6), offload_optimizer=STATES, offload_param={**AWAY, "buffer_count": depth}
    )
    training.steps(3)
    calls = training.recorded(lambda: training.backward(3))
    order = [*range(6), *range(5, -1, -1)]
    needs = [number for number, call in enumerate(calls) if call.kind == "need"]
    at = [number for number in needs if calls[number].op == "forward"]
    last = len(at)
    for unit in order[6:]:  # in a backward a unit may be asked for more than once
        at.append(
            next(n for n in needs if calls[n].op == "backward" and calls[n].key == str(unit) and n > at[last - 1])
        )
    assert [int(calls[number].key) for number in at] == order and at == sorted(at)
    blocks_of_unit = NUMEL // LAYERS // BLOCK
    for position, unit in enumerate(order):
        mine = [
            n
            for n, call in enumerate(calls)
            if (call.kind, call.op) == ("parameters", "read") and call.block[0] == unit
        ]
        assert len(mine) == blocks_of_unit * (1 if unit == 5 else 2), (
            "once for forward, once for backward but at the turn"
        )
        if position == 6:
            continue
        begun = mine[:blocks_of_unit] if position < 6 else mine[blocks_of_unit:]
        if position:
            assert max(begun) < at[position], f"unit {unit}, use {position}: not read before it was needed"
            assert max(begun) < at[max(position - depth + 1, 1)] or position > 6, f"unit {unit}: not {depth} ahead"
        if position > depth:
            assert min(begun) > at[position - depth - 1], f"unit {unit}, use {position}: more than {depth} ahead"
    training.close()


def test_evaluation_and_another_order_change_nothing(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers(5)
            self.order = [0, 1, 2, 3, 4]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in self.order:
                x = self.layers[index](x)
            return x

    found = []
    for options in ({}, *({"offload_param": {**AWAY, "buffer_count": n}, "offload_optimizer": STATES} for n in (1, 3))):
        torch.manual_seed(0)
        net = Net()
        training = Training(tmp_path, model=net, **options)
        for step in range(8):
            net.order = [[0, 1, 2, 3, 4], [4, 1, 2], [0, 0, 3, 1], [2]][step // 2 if step < 6 else 0]
            training.steps(1, start=step)
            if step % 3 == 1:
                net.eval()
                with torch.no_grad():
                    training.losses.append(net(torch.ones(1, 64)).sum().item())
                net.train()
                training.losses.append(net(torch.ones(1, 64)).sum().item())  # with a graph, and no backward
        found.append(training.values())
        training.close()
    assert not differing(found[0], found[1])
    assert not differing(found[0], found[2])


def test_parameters_come_once_for_each_use(tmp_path: Path) -> None:
    training = Training(tmp_path, offload_optimizer=STATES, offload_param=AWAY, dtype=torch.bfloat16)
    training.steps(2)
    calls = training.recorded(lambda: training.steps(1, start=2))
    blocks_of_unit = NUMEL // LAYERS // BLOCK
    assert len(reads(calls, "parameters")) == (2 * LAYERS - 1) * blocks_of_unit, "but for the one at the turn"
    assert len(reads(calls, "parameters", "step")) == 0
    assert len(writes(calls, "parameters")) == len(writes(calls, "parameters", "step")) == LAYERS * blocks_of_unit
    training.close()
