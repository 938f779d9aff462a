"""The space of a store's file: nothing overlaps, nothing is lost, what is free is whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from zs_offload_aio.extents import Extents


@given(st.lists(st.lists(st.integers(0, 20_000), max_size=5), max_size=12), st.randoms(use_true_random=False))
def test_no_two_extents_overlap_and_the_holes_are_the_rest(batches, random):
    extents, held = Extents(4096), {}
    for number, sizes in enumerate(batches):
        placement = extents.place(sizes)
        extents.take(placement)
        for index, (offset, size) in enumerate(zip(placement.offsets, sizes, strict=True)):
            if size:
                held[number, index] = (offset, size)
        for key in random.sample(sorted(held), len(held) // 2):
            extents.give(*held.pop(key))
        ranges = sorted((offset, offset + extents.padded(size)) for offset, size in held.values())
        assert all(offset % 4096 == 0 for offset, _ in ranges)
        gaps, at = [], 0
        for start, end in ranges:
            assert start >= at
            if start > at:
                gaps.append((at, start - at))
            at = end
        if extents.end > at:
            gaps.append((at, extents.end - at))
        assert extents._holes == gaps
        assert extents.free_nbytes == sum(nbytes for _, nbytes in gaps)


def test_what_is_not_taken_changes_nothing():
    extents = Extents(4096)
    extents.take(extents.place([10_000]))
    extents.place([5, 5_000_000])
    assert (extents.end, extents.free_nbytes) == (12_288, 0)


def test_the_smallest_hole_that_fits_is_used_and_the_end_is_not_allocated_twice():
    extents = Extents(4096)
    offsets = extents.place([4 * 4096, 4096, 2 * 4096, 4096, 4096]).offsets
    extents.take(extents.place([4 * 4096, 4096, 2 * 4096, 4096, 4096]))
    for offset, pages in ((offsets[0], 4), (offsets[2], 2), (offsets[4], 1)):
        extents.give(offset, pages * 4096)
    placement = extents.place([2 * 4096])
    assert placement.offsets == [offsets[2]]
    extents.take(placement)
    placement = extents.place([5 * 4096])
    assert placement.offsets == [offsets[4]] and placement.end == offsets[4] + 5 * 4096
