"""Bounded waits, peers that die, ranks that take different paths: one typed error on every rank, with the facts."""

from __future__ import annotations

import os
import pickle
import signal
import time

import pytest
import torch
from zs_comm import (
    CommTimeout,
    Group,
    PeerLost,
    RankDisagreement,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    reduce_scatter,
    shutdown,
)
from zs_comm.errors import CommError, CommFacts
from zs_comm.testing import run_ranks


def outcome(call) -> tuple[str, str, float, CommFacts | None]:  # type: ignore[no-untyped-def]
    start = time.monotonic()
    try:
        call()
    except (CommError, RankDisagreement) as error:
        return type(error).__name__, str(error), time.monotonic() - start, getattr(error, "facts", None)
    return "fine", "", 0.0, None


def absent(group: Group) -> tuple[str, str, float, CommFacts | None]:
    barrier(group, label="before")
    if group.rank == group.size - 1:
        time.sleep(2.7)
        return "absent", "", 0.0, None
    result = outcome(lambda: all_gather(torch.ones(group.size * 256), group, label="blocks.3"))
    with pytest.raises(CommTimeout, match="failed before"):
        barrier(group)
    shutdown()
    shutdown()
    return result


def test_a_timeout_says_who_arrived_and_what_each_called_last() -> None:
    results = run_ranks(absent, 3, comm_timeout_s=0.5)
    for rank, (kind, text, seconds, facts) in enumerate(results[:2]):
        assert kind == "CommTimeout"
        assert text.startswith("all_gather 'blocks.3' of 3,072 bytes on axis world (members 0, 1, 2): ")
        assert "rank 2" in text
        assert "  rank 2: no word" in text
        for reporter in (0, 1):
            line = next(line for line in text.splitlines() if line.startswith(f"  rank {reporter}: "))
            assert "barrier 'before'" in line
            assert line.endswith("all_gather 'blocks.3' 3,072 bytes on world #1")
        assert seconds < 0.5 + 3.0
        assert facts is not None
        assert facts.arrived == (1 - rank,)
        assert 2 in facts.missing
    assert any(f"rank {1 - rank} had arrived, rank 2 had not" in results[rank][1] for rank in (0, 1))
    assert any("not finished in " in results[rank][1] for rank in (0, 1))  # the seconds it took vary


def late(group: Group) -> tuple[str, str, float, CommFacts | None]:
    if group.rank == 1:
        time.sleep(1.0)
    return outcome(lambda: reduce_scatter(torch.ones(64), group, label="head"))


def test_the_late_one_hears_that_it_was_given_up_on() -> None:
    for rank, (kind, text, seconds, _) in enumerate(run_ranks(late, 2, comm_timeout_s=0.5)):
        assert kind == "CommTimeout"
        assert seconds < 3.5
        assert "reduce_scatter 'head' of 256 bytes" in text
        if rank == 1:
            assert (
                "rank 0 gave up after 0.5 s in reduce_scatter 'head' 256 bytes on world #0, waiting for rank 1" in text
            )


def dying(group: Group, how: str) -> tuple[str, str, float, CommFacts | None]:
    barrier(group)
    if group.rank == 1:
        time.sleep(0.2)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    return outcome(lambda: all_reduce(torch.ones(100_000), group, label="grads"))


@pytest.mark.parametrize("how", ["killed", "left"])
def test_a_peer_that_dies_is_named_at_once(how: str) -> None:
    result = run_ranks(dying, 3, how, comm_timeout_s=20.0, timeout_s=30.0, expect_exit=True)
    for rank in (0, 2):
        kind, text, seconds, facts = result.outcomes[rank].value
        assert kind == "PeerLost"
        assert (
            "all_reduce 'grads' of 400,000 bytes on axis world (members 0, 1, 2): the connection to rank 1 closed"
            in text
        )
        assert "  rank 1: no word" in text
        assert seconds < 3.5
        assert facts.lost == (1,)


def bystander(group: Group) -> tuple[str, str, float, CommFacts | None]:
    barrier(group)
    if group.rank == 2:
        os._exit(1)
    # rank 1 waits for rank 0 only, and rank 0 for rank 2
    src = 2 if group.rank == 0 else 0
    result = outcome(lambda: broadcast(torch.ones(3), group, src=src, label=f"from {src}"))
    time.sleep(0.5)
    return result


def test_a_rank_that_waits_for_one_that_lost_its_peer_learns_of_it() -> None:
    result = run_ranks(bystander, 3, comm_timeout_s=20.0, timeout_s=30.0, expect_exit=True)
    for rank in (0, 1):
        kind, text, seconds, _ = result.outcomes[rank].value
        assert kind == "PeerLost"
        assert "the connection to rank 2 closed" in text
        assert seconds < 4.0


def uncaught(group: Group) -> None:
    if group.rank == 1:
        raise ValueError("this rank's own mistake")
    all_reduce(torch.ones(10), group)


def test_an_exception_on_one_rank_ends_the_others() -> None:
    result = run_ranks(uncaught, 2, comm_timeout_s=20.0, timeout_s=30.0, expect_exit=True)
    assert [o.error_type for o in result.outcomes] == ["PeerLost", "ValueError"]
    assert result.seconds < 5.0


def different_sizes_unchecked(group: Group) -> tuple[str, str, float, CommFacts | None]:
    return outcome(lambda: all_gather(torch.ones(group.size * (1 + group.rank)), group, label="unit"))


def test_different_sizes_never_pair_up() -> None:
    """gloo would end the process here."""
    for kind, text, _, _ in run_ranks(different_sizes_unchecked, 2, comm_timeout_s=0.3):
        assert kind == "CommTimeout"
        assert "rank 0: all_gather 'unit' 8 bytes on world #0" in text
        assert "rank 1: all_gather 'unit' 16 bytes on world #0" in text
        assert "the ranks made different calls" in text


def diverging(group: Group, how: str) -> tuple[str, str, float, CommFacts | None]:
    group.checked = True
    odd = group.rank == group.size - 1
    barrier(group, label="start")

    def step() -> None:
        flat = torch.ones(group.size * 4)
        if how == "op" and odd:
            reduce_scatter(flat, group, label="a")
        elif how == "label" and odd:
            all_gather(flat, group, label="b")
        elif how == "size" and odd:
            all_gather(torch.ones(group.size * 5), group, label="a")
        elif how == "dtype" and odd:
            all_gather(flat.int(), group, label="a")
        elif how == "order":
            works = [all_gather(flat.clone(), group, label=x, async_op=True) for x in ("ba" if odd else "ab")]
            for work in works:
                work.wait()
        elif how == "extra" and odd:
            all_gather(flat, group, label="extra")
            all_gather(flat, group, label="a")
        else:
            all_gather(flat, group, label="a")

    return outcome(step)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("how", ["op", "label", "size", "dtype", "order", "extra"])
def test_a_checked_group_finds_different_calls_on_every_rank(how: str, world: int) -> None:
    for kind, text, seconds, _ in run_ranks(diverging, world, how):
        assert kind == "RankDisagreement"
        assert "the ranks made different calls" in text
        for rank in range(world):
            assert f"  rank {rank}: barrier 'start' 0 bytes on world #0; " in text
        assert seconds < 2.0


def extra_at_the_end(group: Group) -> tuple[str, str, float, CommFacts | None]:
    group.checked = True
    all_reduce(torch.ones(2), group, label="same")
    if group.rank == 1:
        return outcome(lambda: all_reduce(torch.ones(2), group, label="extra"))
    time.sleep(2.6)
    return "fine", "", 0.0, None


def test_an_extra_call_at_the_end_runs_into_the_bound() -> None:
    kind, text, _, _ = run_ranks(extra_at_the_end, 2, comm_timeout_s=0.3)[1]
    assert kind == "CommTimeout"
    assert "all_reduce 'extra'" in text


def recovers(group: Group) -> float:
    group.checked = True
    with pytest.raises(RankDisagreement):
        barrier(group, label=str(group.rank))
    return float(all_reduce(torch.tensor([float(group.rank)]), group, op="sum"))


def test_the_group_is_of_use_after_a_disagreement() -> None:
    assert run_ranks(recovers, 3) == [3.0] * 3


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(CommTimeout("text", CommFacts(op="barrier", missing=(1,)))))
    assert str(error) == "text"
    assert error.facts.missing == (1,)
    assert isinstance(error, TimeoutError)
    assert issubclass(PeerLost, ConnectionError)
