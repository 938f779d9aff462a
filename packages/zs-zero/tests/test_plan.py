"""The plan: every element has exactly one owner, on any number of slices."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zs_zero.plan import ALIGN_NBYTES, ParamSpec, make_plan, moves_of, plan_flat

shapes = st.lists(st.integers(0, 37), min_size=0, max_size=3).map(tuple)


@given(st.lists(shapes, min_size=1, max_size=12), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_pieces_partition_every_parameter(shapes, slices, dtype):
    flat = plan_flat([ParamSpec(f"p{i}", shape, dtype) for i, shape in enumerate(shapes)], slices=slices)
    owned = [set() for _ in shapes]
    for index in range(slices):
        end = 0
        for piece in flat.pieces(index):
            assert end <= piece.shard_start < piece.shard_stop <= flat.shard_numel
            end = piece.shard_stop
            entry = flat.entries[piece.index]
            assert index * flat.shard_numel + piece.shard_start == entry.offset + piece.start
            elements = set(range(piece.start, piece.stop))
            assert not owned[piece.index] & elements
            owned[piece.index] |= elements
    assert [len(elements) for elements in owned] == [prod(shape) for shape in shapes]


@given(st.lists(shapes, min_size=1, max_size=12), st.integers(1, 9))
def test_parameters_and_shards_start_on_cache_lines(shapes, slices):
    flat = plan_flat([ParamSpec(f"p{i}", shape, torch.float32) for i, shape in enumerate(shapes)], slices=slices)
    assert all(entry.offset * 4 % ALIGN_NBYTES == 0 for entry in flat.entries)
    assert flat.shard_numel * 4 % ALIGN_NBYTES == 0
    # at most a line for each parameter and for each slice
    assert flat.padded_numel - flat.numel <= 16 * (len(shapes) + slices + 1)


def test_padding_of_a_gpt_is_under_one_percent():
    block = [(512,), (512,), (1536, 512), (1536,), (512, 512), (512,), (2048, 512), (2048,), (512, 2048), (512,)]
    for world in (1, 2, 3, 4, 8, 64, 1024):
        plan = make_plan(
            [(f"b{i}", [], [ParamSpec(f"b{i}.{j}", s, torch.float32) for j, s in enumerate(block)]) for i in range(8)],
            slices=world,
        )
        assert plan.padded_numel <= 1.01 * plan.numel


def test_a_unit_has_a_flat_per_dtype_and_trainability():
    specs = [
        ParamSpec("a", (3,), torch.float32),
        ParamSpec("b", (3,), torch.bfloat16),
        ParamSpec("c", (3,), torch.float32, trainable=False),
        ParamSpec("d", (5,), torch.float32),
    ]
    plan = make_plan([("u", ["u"], specs)], slices=2)
    assert [[e.spec.name for e in flat.entries] for flat in plan.flats()] == [["a", "d"], ["b"], ["c"]]
    assert "3 + 5" not in str(plan) and "14" in str(plan)


def test_a_parameter_in_two_units_is_refused():
    spec = ParamSpec("a", (3,), torch.float32)
    with pytest.raises(ValueError, match="'a' is in two units"):
        make_plan([("u", [], [spec]), ("v", [], [spec])], slices=1)


def test_mixed_dtypes_in_one_flat_are_refused():
    with pytest.raises(ValueError, match="one dtype"):
        plan_flat([ParamSpec("a", (1,), torch.float32), ParamSpec("b", (1,), torch.bfloat16)], slices=1)


@given(
    st.lists(st.tuples(shapes, st.booleans(), st.booleans()), min_size=1, max_size=10),
    st.integers(1, 7),
    st.integers(1, 4),
)
def test_whole_parameters_reach_one_owner_and_no_message_overlaps(params, slices, per_unit):
    specs = [ParamSpec(f"p{i}", shape, torch.float32, live, whole=w) for i, (shape, live, w) in enumerate(params)]
    units = [(f"u{i}", [], specs[i : i + per_unit]) for i in range(0, len(specs), per_unit)]
    plan = make_plan(units, slices=slices)
    wanted = {spec.name for spec in specs if spec.whole and spec.trainable}
    assert plan.owners.keys() == wanted
    flats, arrived, messages = list(plan.flats()), {name: set() for name in wanted}, {}
    for move in moves_of(plan):
        spec = flats[move.flat].entries[move.piece.index].spec
        assert plan.owners[spec.name] == move.owner
        assert move.piece in flats[move.flat].pieces(move.source)
        assert not arrived[spec.name] & set(range(move.piece.start, move.piece.stop))
        arrived[spec.name] |= set(range(move.piece.start, move.piece.stop))
        place = set(range(move.at, move.at + move.piece.numel))
        assert not messages.setdefault((move.source, move.owner), set()) & place
        messages[move.source, move.owner] |= place
    assert all(arrived[spec.name] == set(range(spec.numel)) for spec in specs if spec.name in wanted)
    loads = [sum(s.numel for s in specs if plan.owners.get(s.name) == index) for index in range(slices)]
    largest = max((spec.numel for spec in specs if spec.name in wanted), default=0)
    assert max(loads) <= sum(loads) / slices + largest


def test_owners_of_a_gpts_matrices_are_balanced():
    block = [(1536, 512), (512, 512), (2048, 512), (512, 2048)]
    units = [(f"b{i}", [], [ParamSpec(f"b{i}.{j}", s, torch.float32, whole=True) for j, s in enumerate(block)])
             for i in range(24)]  # fmt: skip
    for world in (2, 8, 24):
        plan = make_plan(units, slices=world)
        loads = [sum(e.spec.numel for f in plan.flats() for e in f.entries if plan.owners[e.spec.name] == rank)
                 for rank in range(world)]  # fmt: skip
        assert max(loads) <= 1.04 * plan.numel / world
