"""Laws: bytes on the wire and bytes in memory are the theory's, for each stage."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import zs_zero
from torch import nn
from zs_comm import CollectiveLog, barrier
from zs_comm.memory import StorageMeter, live_tensor_nbytes
from zs_comm.testing import loopback_nbytes, run_ranks, socket_nbytes
from zs_zero.flat_reading import ParamState
from zs_zero.gatherer import Gatherer

sys.path.insert(0, str(Path(__file__).parent))

from zoo import Branching, Detours

WIDTH, BLOCKS, VOCAB = 128, 8, 512


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids):
        x = self.tok(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), ids.flatten())


def build(group, stage, dtype):
    torch.manual_seed(0)
    model = Net()
    client = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return model, zs_zero.shard(model, client, stage=stage, mesh=group, dtype=dtype)


def window(model, optimizer, accumulation, rank):
    for micro in range(accumulation):
        ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(rank + 7 * micro))
        (model(ids) / accumulation).backward()
    optimizer.step()
    optimizer.zero_grad()


def wire(group, stage, accumulation, dtype):
    model, optimizer = build(group, stage, dtype)
    for _ in range(4):
        window(model, optimizer, accumulation, group.rank)
    log = CollectiveLog()
    group.observers.add(log)
    barrier(group)
    log.reset()
    barrier(group)
    device, sockets = loopback_nbytes(), socket_nbytes()
    for _ in range(3):
        window(model, optimizer, accumulation, group.rank)
    barrier(group)
    device, sockets = loopback_nbytes() - device, socket_nbytes() - sockets
    plan = optimizer.plan
    kept = plan.units[-1].flats[0].padded_numel  # the last unit stays whole from forward to backward
    return log.total_wire_nbytes / 3, sockets / 3, device / 3, plan.padded_numel, kept, plan.numel


def due(stage, accumulation, numel, kept, itemsize, world):
    """Bytes one rank sends: ring terms (W - 1) / W, a gather or a reduce-scatter each once over the elements."""
    share = (world - 1) / world * itemsize
    if stage in (0, 1):
        return 2 * numel * share  # accumulated locally, reduced once
    if stage == 2:
        return (accumulation + 1) * numel * share
    return accumulation * (3 * numel - kept) * share


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_bytes_on_the_wire_are_the_theorys(accumulation, dtype):
    itemsize = 2 if dtype else 4
    for world in (2, 4) if accumulation == 1 and dtype is None else (2,):
        for stage in (0, 1, 2, 3):
            results = run_ranks(wire, world, stage, accumulation, dtype)
            for logged, sockets, device, padded, kept, numel in results:
                assert padded <= 1.01 * numel
                expected = due(stage, accumulation, padded, kept, itemsize, world)
                assert logged == pytest.approx(expected, rel=0.01), (stage, world)
                assert sockets == pytest.approx(logged, rel=0.03), (stage, world)  # by the kernel, for this process
                # the device sees every rank's bytes, their headers and everybody else's traffic
                assert device >= 0.97 * sum(r[0] for r in results), (stage, world)


def held_bytes(stage, world, dtype):
    """Bytes per element between steps with Adam: ZeRO, section 5, figure 1; fp32 needs no second master."""
    if dtype is None:
        return {0: 12, 1: 4 + 8 / world, 2: 4 + 8 / world, 3: 12 / world}[stage]
    return {0: 14, 1: 2 + 12 / world, 2: 2 + 12 / world, 3: 14 / world}[stage]


def peak_bytes(stage, world, dtype, numel, units):
    """What a step adds: gradients reduced at the step stand whole, in fp32 once reduced (the masters' dtype); shards of
    gradients are fp32 too; at stages 2 and 3 two units of gradients, at stage 3 two whole units of parameters."""
    itemsize = 2 if dtype else 4
    gradient = 4 * numel if stage == 0 or world == 1 else max(itemsize, 4 / world) * numel
    two = sum(sorted(units)[-2:])
    if stage in (0, 1) or world == 1:
        return gradient
    return 4 / world * numel + two * itemsize * (1 if stage == 2 else 2)


def activations(dtype, rank):
    """The same step in plain torch: its peak above parameters, gradients and inputs."""
    torch.manual_seed(0)
    model = Net().to(dtype or torch.float32)
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(rank))
    for param in model.parameters():  # gradients stand already: what remains is activations
        param.grad = torch.zeros_like(param)
    with StorageMeter() as meter:
        model(ids).backward()
    return meter.peak_nbytes - meter.start_nbytes


def memory(group, stage, dtype):
    base = live_tensor_nbytes()
    model, optimizer = build(group, stage, dtype)
    for _ in range(2):
        window(model, optimizer, 1, group.rank)
    held = live_tensor_nbytes() - base
    with StorageMeter() as meter:
        window(model, optimizer, 1, group.rank)
    peak = meter.peak_nbytes - meter.start_nbytes
    units = [unit.numel for unit in optimizer.plan.units]
    return held, peak, activations(dtype, group.rank), optimizer.plan.numel, units


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_memory_is_the_formula(world, dtype):
    for stage in (0, 1, 2, 3):
        for held, peak, activation, numel, units in run_ranks(memory, world, stage, dtype):
            expected = held_bytes(stage, world, dtype) * numel
            assert held <= 1.02 * expected, (stage, held / expected)
            most = expected + peak_bytes(stage, world, dtype, numel, units)
            assert held + peak - activation <= 1.02 * most, (stage, (held + peak - activation) / most)


def most_whole(group, recompute, detours):
    """Units of parameters that are whole at once in a forward and backward, at the most; the first two are warm-up."""
    model = Detours(10, recompute=recompute)
    optimizer = zs_zero.shard(
        model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, units=[Branching], mesh=group
    )
    most, need = 0, Gatherer.need

    def counted(gatherer, unit, phase):
        nonlocal most
        need(gatherer, unit, phase)
        most = max(most, sum(other.state is not ParamState.RELEASED for other in gatherer.units))

    with mock.patch.object(Gatherer, "need", counted):
        for _ in range(3):
            most = 0
            model(torch.randn(4, 16), [detours] * 10).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return most


@pytest.mark.parametrize("detours", [True, False], ids=["all used", "some unused"])
@pytest.mark.parametrize("recompute", [0, 1, 2, 5])
def test_few_units_are_whole_at_once(recompute, detours):
    """The root, the unit that runs and the next; with checkpoints, those that are computed again together."""
    for most in run_ranks(most_whole, 2, recompute, detours):
        assert most <= max(recompute, 1) + 2
