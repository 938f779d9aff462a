"""Boxes, ranges as boxes, tilings, and who writes what."""

from itertools import pairwise
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import cut
from zs_ckpt import Piece, TensorSpec
from zs_ckpt.boxes import boxes_of_range, intersect, numel, shape_of, whole
from zs_ckpt.plan import parts_of
from zs_ckpt.tiling import tiling_problem

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


def elements(shape, box):
    """The positions of a box's elements in the flattened tensor, in order."""
    index = torch.arange(prod(shape)).reshape(shape)
    return index[tuple(slice(*pair) for pair in box)].flatten().tolist()


@given(shapes, st.data())
def test_boxes_of_a_range_are_its_elements_in_order(shape, data):
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    boxes = list(boxes_of_range(shape, start, stop))
    assert [e for box in boxes for e in elements(shape, box)] == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@given(shapes, st.data())
def test_intersection_is_the_common_elements(shape, data):
    def box():
        pairs = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
        return tuple(map(tuple, pairs))

    a, b = box(), box()
    common = set(elements(shape, a)) & set(elements(shape, b))
    found = intersect(a, b)
    assert (set() if found is None else set(elements(shape, found))) == common


@given(shapes, st.lists(st.integers(0, 100), max_size=5), st.randoms(use_true_random=False))
def test_ranges_tile_and_nothing_less_or_more_does(shape, cuts, random):
    size = prod(shape)
    edges = sorted({0, size, *(edge % (size + 1) for edge in cuts)})
    boxes = [box for start, stop in pairwise(edges) for box in boxes_of_range(shape, start, stop)]
    random.shuffle(boxes)
    assert tiling_problem(shape, boxes) == ""
    if boxes:
        chosen = random.choice(boxes)
        assert tiling_problem(shape, [box for box in boxes if box is not chosen]) != ""
        assert tiling_problem(shape, [*boxes, chosen]) != ""


@given(st.data())
@settings(max_examples=60)
def test_tiling_is_what_counting_elements_says(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    pairs = [st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: tuple(sorted(p))) for n in shape]
    boxes = data.draw(st.lists(st.tuples(*pairs).filter(lambda box: numel(box) > 0), max_size=6))
    counted = sorted(e for box in boxes for e in elements(shape, box))
    assert (tiling_problem(shape, boxes) == "") == (counted == list(range(prod(shape))))


def test_tilings_of_many_boxes_are_checked_quickly():
    """A grid of 300 x 300: comparing every pair would be four billion steps."""
    boxes = [((i, i + 1), (j, j + 1)) for i in range(300) for j in range(300)]
    assert tiling_problem((300, 300), boxes) == ""
    assert "overlap" in tiling_problem((300, 300), [*boxes[:-1], boxes[0]])
    tangled = [((i, i + 3000), (i, i + 3000)) for i in range(3000)]
    assert tiling_problem((6000, 6000), tangled) != ""


def test_tilings_of_scalars_and_of_nothing():
    assert tiling_problem((), [()]) == ""
    assert tiling_problem((), [(), ()]) != ""
    assert tiling_problem((), []) != ""
    assert tiling_problem((0, 3), []) == "" and tiling_problem((0, 3), [((0, 0), (0, 3))]) == ""
    assert tiling_problem((3,), [((0, 4),)]) != "" and tiling_problem((3,), [((2, 1),), ((0, 3),)]) != ""


@given(
    st.lists(st.tuples(shapes, st.sampled_from(["copy", "rows", "flat", "columns", "pairs", "big"])), max_size=6),
    st.sampled_from([1, 2, 3, 4]),
)
def test_parts_tile_every_tensor_and_large_copies_are_shared(tensors, world):
    """Whatever the ranks hold, the parts that they choose to write are each tensor once."""
    written = {}
    for rank in range(world):
        pieces = []
        for index, (shape, how) in enumerate(tensors):
            dtype = torch.float32
            if how == "big":
                shape, how, dtype = (7, 1 << 20), "copy", torch.float64
            if how == "pairs" and world % 2:
                how = "rows"
            boxes, replica, replicas = cut(how, shape, rank, world)
            spec = TensorSpec(f"t{index}", shape, dtype)
            pieces += [(spec.name, Piece(spec, box, torch.empty(0), replica, replicas)) for box in boxes]
        for name, piece, box, (start, stop) in parts_of(pieces, world):
            assert numel(box) == stop - start <= numel(piece.box)
            assert elements_of_part(piece.box, start, stop) == box
            written.setdefault(name, []).append((rank, box, numel(box)))
    for index, (shape, how) in enumerate(tensors):
        shape = (7, 1 << 20) if how == "big" else shape
        parts = written.get(f"t{index}", [])
        assert tiling_problem(shape, [box for _, box, _ in parts]) == ""
        if how == "big":
            loads = [sum(size for by, _, size in parts if by == rank) for rank in range(world)]
            assert max(loads) - min(loads) <= 1 << 20  # a row


def elements_of_part(outer, start, stop):
    """The one box that holds elements [start, stop) of `outer`."""
    (inner,) = list(boxes_of_range(shape_of(outer), start, stop)) or [whole(shape_of(outer))]
    return tuple((low + first, high + first) for (low, high), (first, _) in zip(inner, outer, strict=True))


def test_small_copies_are_spread_by_bytes():
    names = [f"layer{index}.weight" for index in range(40)]
    spec = [TensorSpec(name, (100, 10 + index), torch.float32) for index, name in enumerate(names)]
    loads = []
    for rank in range(4):
        pieces = [(one.name, Piece(one, whole(one.shape), torch.empty(0), rank, 4)) for one in spec]
        loads.append(sum(numel(box) for _, _, box, _ in parts_of(pieces, 4)))
    assert sum(loads) == sum(prod(one.shape) for one in spec)
    assert max(loads) <= 1.15 * min(loads)
