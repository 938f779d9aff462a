"""A memory limit around a process: what counts, what does not, what happens beyond it, what is left behind."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
from zs_comm import Group
from zs_comm.testing import limits, run_ranks
from zs_comm.testing.limits import PREFIX, Kind, collect, kinds, limited, run_limited

MIB = 1 << 20
KINDS = kinds()
GROUPS = [kind for kind in KINDS if kind != "rlimit"]


def in_a_process(fn, *args):  # type: ignore[no-untyped-def]
    """The harness's own processes have imported everything already."""
    return run_ranks(fn, 1, *args)[0]


def mine() -> list[Path]:
    return [group for group in limits._groups(f"{PREFIX}*") if group.name.endswith(f"-{os.getpid()}")]


def used(group: Group, kind: Kind, before: int, inside: int, limit: int) -> tuple[int, int, int]:
    ballast = bytearray(before)
    with limited(limit, kind=kind) as memory:
        content = bytearray(inside)  # zeroes that calloc gave: touched below
        content[::4096] = b"\1" * len(range(0, inside, 4096))
        here = len(mine())
    assert memory.nbytes == limit and memory.kind == kind
    assert not mine()
    bytearray(len(ballast) + limit)[::4096] = b"\1" * len(range(0, len(ballast) + limit, 4096))  # the limit is lifted
    return memory.peak_nbytes, memory.peak_resident_nbytes, here


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_used_inside_counts_and_nothing_else(kind: Kind) -> None:
    peak, resident, groups = in_a_process(used, kind, 96 * MIB, 32 * MIB, 64 * MIB)
    assert 32 * MIB <= peak < 40 * MIB
    assert 32 * MIB <= resident < 40 * MIB
    assert groups == (kind != "rlimit")


def mapped(group: Group, kind: Kind, folder: Path) -> int:
    path = folder / "file"
    path.write_bytes(bytes(48 * MIB))
    with limited(64 * MIB, kind=kind) as memory:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            sum(content[::4096])
            before = memory.peak_resident_nbytes
            allocated = bytearray(16 * MIB)
            allocated[::4096] = b"\1" * len(range(0, len(allocated), 4096))
            found = memory.peak_resident_nbytes
        assert before < 8 * MIB
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_mapped_are_not_what_was_allocated(kind: Kind, tmp_path: Path) -> None:
    assert 16 * MIB <= in_a_process(mapped, kind, tmp_path) < 24 * MIB


def beyond(group: Group, kind: Kind) -> str:
    with limited(48 * MIB, kind=kind):
        try:
            content = bytearray(64 * MIB)
        except MemoryError:
            return "MemoryError"
        content[::4096] = b"\1" * len(range(0, len(content), 4096))
    return "nothing happened"


def test_beyond_the_data_limit_is_an_error() -> None:
    assert in_a_process(beyond, "rlimit") == "MemoryError"


SCRIPT = """
import sys
from zs_comm.testing.limits import limited
with limited(48 << 20, kind=sys.argv[1]) as limit:
    content = bytearray(int(sys.argv[2]))
    content[::4096] = b"1" * len(range(0, len(content), 4096))
print(limit.peak_nbytes)
"""


@pytest.mark.parametrize("kind", GROUPS)
def test_beyond_a_group_the_kernel_kills_and_it_is_said(kind: Kind) -> None:
    done = run_limited([sys.executable, "-c", SCRIPT, kind, str(64 * MIB)], timeout_s=60)
    assert done.returncode == -9 and done.kills >= 1
    assert done.peak_nbytes is not None and 40 * MIB < done.peak_nbytes <= 48 * MIB
    assert not [group for group in limits._groups(f"{PREFIX}*") if group.name.startswith(f"{PREFIX}probe")]


def test_within_the_limit_nothing_is_said() -> None:
    done = run_limited([sys.executable, "-c", SCRIPT, KINDS[0], str(16 * MIB)], timeout_s=60)
    assert (done.returncode, done.kills, done.peak_nbytes) == (0, 0, None), done.stderr
    assert 16 * MIB <= int(done.stdout) < 24 * MIB


def test_a_command_that_does_not_end() -> None:
    with pytest.raises(TimeoutError, match="within 0.2 s"):
        run_limited([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2)


def written(group: Group, kind: Kind, folder: Path) -> int:
    with limited(32 * MIB, kind=kind) as memory, open(folder / "file", "wb") as file:
        for _ in range(96):
            file.write(os.urandom(MIB))
    return memory.peak_nbytes


@pytest.mark.parametrize("kind", GROUPS)
def test_page_cache_counts_and_gives_way(kind: Kind, tmp_path: Path) -> None:
    peak = in_a_process(written, kind, tmp_path)
    assert 24 * MIB < peak <= 32 * MIB
    assert (tmp_path / "file").stat().st_size == 96 * MIB


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_of_the_dead_are_collected(kind: Kind) -> None:
    left = limits._create(kind, f"{PREFIX}{2**22 + 1}")  # above the highest process id there is
    alive = limits._create(kind, f"{PREFIX}{os.getppid()}")
    assert collect() >= 1
    assert not left.exists() and alive.exists()
    alive.rmdir()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_limit_is_positive(nbytes: int) -> None:
    with pytest.raises(ValueError, match="above 0"), limited(nbytes):
        pass


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="cgroup1, cgroup2 or rlimit"), limited(MIB, kind="ulimit"):  # type: ignore[arg-type]
        pass


def test_the_strictest_comes_first() -> None:
    assert KINDS[-1] == "rlimit"
    assert len(set(KINDS)) == len(KINDS)
