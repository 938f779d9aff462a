"""A harness for tests that need several ranks, and counters to check their traffic with.

    from zs_comm.testing import run_ranks

    def total(group):
        ...                                   # runs once per rank; `group` is the world's Group
        return group.rank

    def test_total():
        assert run_ranks(total, 2) == [0, 1]

Ranks are forked from one server per process that has imported torch already: after the first call a
two-rank test costs well under 0.15 s. As a pytest plugin (it registers itself) the same function is
the fixture `ranks`.
"""

from zs_comm.testing.loopback import loopback_nbytes, socket_nbytes
from zs_comm.testing.mirror import mirrored_group
from zs_comm.testing.ranks import RankFailed, RankOutcome, RunResult, run_ranks

__all__ = ("RankFailed", "RankOutcome", "RunResult", "loopback_nbytes", "mirrored_group", "run_ranks", "socket_nbytes")
