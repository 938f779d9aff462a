"""What is not in memory is cut like what is, and its source is asked for elements of the flattened tensor."""

import pytest
import torch
from zs_zero.parts import TensorSpec, lazy_parts_of, parts_of


class Values:
    def __init__(self, data):
        self.data = data

    def load(self, start, into):
        into.copy_(self.data[start : start + into.numel()])

    def store(self, start, values):
        self.data[start : start + values.numel()] = values


@pytest.mark.parametrize(("start", "stop"), [(0, 120), (7, 113), (24, 48), (31, 31), (5, 6)])
def test_the_pieces_are_those_of_values_in_memory(start, stop):
    spec, whole = TensorSpec("x", (5, 4, 6), torch.float32), torch.arange(120.0)
    there = torch.zeros(120)
    ordinary = list(parts_of(spec, start, whole[start:stop], replica=1, replicas=2))
    lazily = list(lazy_parts_of(spec, start, stop, Values(whole), replica=1, replicas=2))
    places = list(lazy_parts_of(spec, start, stop, Values(there)))
    assert [(p.spec, p.box, p.replica, p.replicas, p.scope) for p in ordinary] == [
        (p.spec, p.box, p.replica, p.replicas, p.scope) for p in lazily
    ]
    for piece, lazy, place in zip(ordinary, lazily, places, strict=True):
        half = piece.data.numel() // 2  # a piece's elements are counted from its first one
        found = torch.empty_like(piece.data)
        lazy.source.load(0, found[:half])
        lazy.source.load(half, found[half:])
        assert torch.equal(found, piece.data)
        place.source.store(half, found[half:])
        place.source.store(0, found[:half])
    assert torch.equal(there[start:stop], whole[start:stop])
    assert there.count_nonzero() == len(range(max(start, 1), stop))  # nothing else was stored


def test_a_scalar():
    (piece,) = lazy_parts_of(TensorSpec("x", (), torch.float32), 0, 1, Values(torch.tensor([7.0])))
    value = torch.zeros(1)
    piece.source.load(0, value)
    assert piece.box == () and value.item() == 7.0
