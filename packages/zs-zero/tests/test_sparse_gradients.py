"""Gradients of embeddings of which only the touched rows travel: the numbers are those of dense ones."""

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import CollectiveLog, ConfigError, Group, Mesh
from zs_comm.testing import run_ranks

VOCAB, WIDTH = 200, 8


class Net(nn.Module):
    """Two tables of different width in one unit, one in another; with `tied` all rows of one are touched."""

    def __init__(self, sparse, tied):
        super().__init__()
        self.tok, self.kind = nn.Embedding(VOCAB, WIDTH, sparse=sparse), nn.Embedding(40, 4, sparse=sparse)
        self.bag = nn.Sequential(nn.EmbeddingBag(VOCAB, WIDTH, sparse=sparse, mode="sum"))
        self.unused = nn.Embedding(30, WIDTH, sparse=sparse)
        self.mix, self.head = nn.Linear(WIDTH + 4, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, ids):
        x = torch.cat([self.tok(ids), self.kind(ids % 40)], dim=-1)
        return self.head(self.mix(x).tanh() + self.bag(ids)[:, None])


def trained(group, stage, how, options, steps=3, micros=2):
    """Weights after the steps, and the bytes that reductions sent."""
    torch.manual_seed(0)
    model = Net(sparse=how == "layout", tied=options.get("tied", False))
    client = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    more = {key: value for key, value in options.items() if key not in ("tied", "mesh", "micros")}
    mesh = Mesh.build(world=group, replicate=2) if options.get("mesh") else group
    optimizer = zs_zero.shard(model, client, stage=stage, mesh=mesh, sparse_gradients=how == "key", **more)
    log, norms = CollectiveLog(), []
    group.observers.add(log)
    for step in range(steps):
        for micro in range(options.get("micros", micros)):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + group.rank)
            ids = torch.randint(VOCAB, (2, 3), generator=generator)
            model(ids).float().square().mean().backward()
        norms.append(float(optimizer.grad_norm()))
        optimizer.step()
        optimizer.zero_grad()
    group.observers.remove(log)
    sent = sum(count.wire_nbytes for (op, _), count in log.counts.items() if op in ("all_reduce", "reduce_scatter"))
    return zs_zero.full_state_dict(model, masters=True) | {"norms": torch.tensor(norms)}, sent


def same(one, other):
    """Bit for bit; the norm adds its pieces in another order, tables being in buffers of their own."""
    norms = torch.allclose(one.pop("norms"), other.pop("norms"), rtol=1e-6, atol=0)
    return norms and all(torch.equal(one[name], value) for name, value in other.items())


def compared(group, how, options):
    """Whether each stage gives the dense numbers bit for bit, and the share of bytes that travel."""
    found = []
    for stage in (0, 1):
        dense, much = trained(group, stage, "dense", options)
        sparse, little = trained(group, stage, how, options)
        found.append((same(dense, sparse), little / much))
    return found


CASES = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16 on the wire": {"reduce_dtype": torch.float16, "prescale": True},
    "predivided": {"predivide_factor": 1.5},
}


@pytest.mark.parametrize("case", CASES)
def test_rows_only_give_the_dense_numbers(case):
    for results in run_ranks(compared, 2, "key", CASES[case]):
        assert [exact for exact, _ in results] == [True, True]
        assert all(share < 0.65 for _, share in results), results  # the head is dense, and nearly half of it all


def test_embeddings_built_for_sparse_gradients_need_no_switch():
    # in one backward each row's terms are added in the same order; over several, torch adds them in another
    for results in run_ranks(compared, 2, "layout", {"micros": 1}):
        assert [exact for exact, _ in results] == [True, True] and all(share < 0.65 for _, share in results)


def test_a_tied_table_is_dense_and_still_exact():
    for results in run_ranks(compared, 2, "key", {"tied": True}):
        assert [exact for exact, _ in results] == [True, True]


def test_replicate_and_shard():
    for results in run_ranks(compared, 4, "key", {"mesh": True, "dtype": torch.bfloat16}):
        assert [exact for exact, _ in results] == [True, True]


def at_other_stages(group):
    """Embeddings with sparse=True are dense on the wire there, and right."""
    results = []
    for stage in (2, 3):
        dense, _ = trained(group, stage, "dense", {"micros": 1})
        sparse, _ = trained(group, stage, "layout", {"micros": 1})
        results.append(same(dense, sparse))
    return results


def test_stages_2_and_3():
    assert run_ranks(at_other_stages, 2) == [[True, True]] * 2
    for stage in (2, 3):
        model = nn.Embedding(3, 2)
        with pytest.raises(ConfigError, match=rf"sparse_gradients needs whole gradients .*\(stage is {stage}\)"):
            zs_zero.shard(model, stage=stage, mesh=Group.single(), sparse_gradients=True)


def test_one_rank():
    (dense, _), (sparse, _) = (trained(Group.single(), 1, how, {}) for how in ("dense", "key"))
    assert same(dense, sparse)


def infinite(group):
    """A row that is not finite is a touched one."""
    model = nn.Sequential(nn.Embedding(5, 2))
    zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=1.0), stage=1, mesh=group, sparse_gradients=True)
    (model(torch.tensor([group.rank])) * (float("nan") if group.rank else 1.0)).sum().backward()
    return zs_zero.safe_get_full_grad(model[0].weight).isfinite().all(1).tolist()


def test_what_is_not_finite_travels():
    assert run_ranks(infinite, 2) == [[True, False, True, True, True]] * 2
