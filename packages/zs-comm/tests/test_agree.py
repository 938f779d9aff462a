"""Agreement: one rank's error is everyone's."""

from __future__ import annotations

import pytest
from zs_comm import Group, RankDisagreement, agree, agreed, same_everywhere
from zs_comm.testing import run_ranks


def one_fails(group: Group) -> str:
    agree(group, what="nothing wrong")
    try:
        with agreed(group, "reading the index"):
            if group.rank == 1:
                raise FileNotFoundError("no such file: index.json")
    except (FileNotFoundError, RankDisagreement) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


@pytest.mark.parametrize("world", [2, 3])
def test_an_error_on_one_rank_is_an_error_on_all(world: int) -> None:
    texts = run_ranks(one_fails, world)
    assert texts.pop(1) == "FileNotFoundError: no such file: index.json"
    told = "RankDisagreement: reading the index: rank 1 failed with FileNotFoundError: no such file: index.json"
    assert texts == [told] * (world - 1)


def two_fail(group: Group) -> str:
    try:
        agree(group, ValueError(f"value {group.rank}") if group.rank else None, what="step")
    except (ValueError, RankDisagreement) as error:
        return str(error)
    return "fine"


def test_all_failures_are_named() -> None:
    first, *others = run_ranks(two_fail, 3)
    assert first == "step: rank 1 failed with ValueError: value 1; rank 2 failed with ValueError: value 2"
    assert others == ["value 1", "value 2"]


def values(group: Group, same: bool, length: int) -> str:
    try:
        same_everywhere(("shape " + ("same" if same else str(group.rank))).ljust(length, "."), group, what="the model")
        same_everywhere(b"\xff\x00", group, what="raw bytes")
    except RankDisagreement as error:
        return str(error)
    return "fine"


def test_same_everywhere() -> None:
    assert run_ranks(values, 3, True, 10_000) == ["fine"] * 3
    expected = "the model differs between the ranks of axis world:\n  rank 0: shape 0\n  rank 1: shape 1"
    assert run_ranks(values, 2, False, 7) == [expected] * 2
    assert "... (9,000 characters)" in run_ranks(values, 2, False, 9_000)[0]


def test_alone_an_error_is_just_raised() -> None:
    group = Group.single()
    agree(group)
    same_everywhere("x", group, what="x")
    with pytest.raises(KeyError), agreed(group, "alone"):
        raise KeyError("x")
