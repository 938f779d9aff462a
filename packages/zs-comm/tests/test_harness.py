"""run_ranks: results, failures and deaths of ranks, and the time it takes."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zs_comm import Group
from zs_comm.testing import RankFailed, loopback_nbytes, run_ranks


@dataclass
class Box:
    """A class of the test's own file: it must unpickle on both sides."""

    value: Tensor


def place(group: Group) -> tuple[int, int]:
    return group.rank, group.size


@pytest.mark.parametrize("world", [1, 2, 3])
def test_one_result_per_rank_in_order(world: int) -> None:
    assert run_ranks(place, world) == [(rank, world) for rank in range(world)]


def scaled(group: Group, box: Box, *, factor: float) -> Box:
    return Box(box.value * (group.rank + 1) * factor)


def test_arguments_and_results_travel_by_value() -> None:
    first, second = run_ranks(scaled, 2, Box(torch.arange(3.0)), factor=2.0)
    assert type(first) is Box
    assert first.value.tolist() == [0.0, 2.0, 4.0]
    assert second.value.tolist() == [0.0, 4.0, 8.0]


def tensors(group: Group) -> list[Any]:
    base = torch.arange(1000.0)
    bf16 = torch.tensor([[1.0, -0.5]], dtype=torch.bfloat16, requires_grad=True)
    return [base[10:12], bf16, torch.empty(0, 3), torch.tensor(True), nn.Parameter(torch.ones(2)), torch.ones(3, 2).t()]


def test_tensors_keep_what_they_are() -> None:
    view, bf16, empty, boolean, parameter, transposed = run_ranks(tensors, 1)[0]
    assert view.tolist() == [10.0, 11.0]
    assert view.untyped_storage().nbytes() == 8
    assert bf16.dtype == torch.bfloat16
    assert bf16.requires_grad
    assert bf16.tolist() == [[1.0, -0.5]]
    assert empty.shape == (0, 3)
    assert boolean.item() is True
    assert type(parameter) is nn.Parameter
    assert transposed.shape == (2, 3)


def large(group: Group) -> Tensor:
    return torch.full((4_000_000,), float(group.rank))


def test_results_larger_than_a_pipe() -> None:
    assert [result[-1].item() for result in run_ranks(large, 2)] == [0.0, 1.0]


def second_raises(group: Group) -> None:
    print("about to start on", group.rank)
    if group.rank == 1:
        found = 6 * 9
        assert found == 42
    time.sleep(30)


def test_a_failure_ends_the_others_and_shows_its_traceback() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed) as failure:
        run_ranks(second_raises, 2, grace_s=0.3)
    assert time.monotonic() - started < 10
    text = str(failure.value)
    assert text.index("rank 1 raised AssertionError") < text.index("rank 0 was killed")
    assert "assert found == 42" in text
    assert "found = 54" in text  # the locals, in place of rewritten asserts
    assert "about to start on 1" in text
    assert "_rank.py" not in text.split("--- rank 0")[0]  # none of the harness's own frames
    assert [outcome.kind for outcome in failure.value.outcomes] == ["killed", "raised"]


def sleeps(group: Group) -> None:
    if group.rank == 1:
        time.sleep(100)


def test_the_deadline_shows_every_stack() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 still running after timeout_s=1") as failure:
        run_ranks(sleeps, 2, timeout_s=1.0)
    assert time.monotonic() - started < 8
    assert "in sleeps" in failure.value.outcomes[1].stacks
    assert failure.value.outcomes[0].kind == "returned"


def ends(group: Group) -> str:
    if group.rank == 1:
        os._exit(3)
    if group.rank == 2:
        sys.exit(4)
    if group.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if group.rank == 4:
        raise FileNotFoundError("no such thing")
    return "fine"


def test_how_each_rank_ended() -> None:
    result = run_ranks(ends, 5, expect_exit=True)
    kinds = [(outcome.kind, outcome.exit_code) for outcome in result.outcomes]
    assert kinds == [("returned", None), ("died", 3), ("died", 4), ("died", -9), ("raised", None)]
    assert result.outcomes[0].value == "fine"
    raised = result.outcomes[4]
    assert (raised.error_type, raised.text) == ("FileNotFoundError", "no such thing")
    assert "OSError" in raised.error_types


def test_a_death_is_a_failure_unless_expected() -> None:
    with pytest.raises(RankFailed, match="rank 1 died with exit code 3"):
        run_ranks(ends, 2)


def unpicklable(group: Group) -> Any:
    return lambda: None


def test_a_result_that_cannot_travel_is_the_ranks_error() -> None:
    with pytest.raises(RankFailed, match="rank 0 raised"):
        run_ranks(unpicklable, 1)


def test_functions_that_no_other_process_can_find() -> None:
    def local(group: Group) -> None: ...

    with pytest.raises(ValueError, match="module-level function"):
        run_ranks(lambda group: None, 2)
    with pytest.raises(ValueError, match="local to another function"):
        run_ranks(local, 2)
    with pytest.raises(ValueError, match="at least one rank"):
        run_ranks(place, 0)


def surroundings(group: Group) -> tuple[str | None, str | None, str, int]:
    return os.environ.get("ZS_OUTER"), os.environ.get("ZS_INNER"), os.getcwd(), torch.get_num_threads()


def test_environment_folder_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZS_OUTER", "1")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(surroundings, 1, env={"ZS_INNER": "2"}) == [("1", "2", str(tmp_path), 1)]
    monkeypatch.delenv("ZS_OUTER")
    assert run_ranks(surroundings, 1)[0][:2] == (None, None)


def warns(group: Group) -> None:
    warnings.warn("something is old", FutureWarning, stacklevel=1)


def test_what_is_an_error_here_is_one_in_a_rank() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with pytest.raises(RankFailed, match="something is old"):
            run_ranks(warns, 1)
        warnings.filterwarnings("ignore", "something is", FutureWarning)
        run_ranks(warns, 1)


def prints(group: Group) -> int:
    print("hello\nfrom", group.rank)
    os.write(2, b"and from below\n")
    return os.getpid()


def test_output_is_passed_on(capsys: pytest.CaptureFixture[str], ranks: Any) -> None:
    pids = ranks(prints, 2)
    out = capsys.readouterr().out
    assert "[rank 0] hello\n[rank 0] from 0\n[rank 0] and from below\n[rank 1] hello" in out
    for pid in pids:  # nothing is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def main_module(group: Group) -> str:
    return str(getattr(sys.modules["__main__"], "__file__", None))


def test_the_test_program_does_not_run_again_in_a_rank() -> None:
    assert "pytest" not in run_ranks(main_module, 1)[0]
    assert sys.modules["__main__"].__name__ == "__main__"


def test_from_a_script(tmp_path: Path) -> None:
    """Without pytest, and without the guard that multiprocessing asks for."""
    import subprocess

    script = tmp_path / "script.py"
    script.write_text(
        "from zs_comm.testing import run_ranks\n"
        "class Box: pass\n"
        "def work(group):\n    box = Box(); box.rank = group.rank; return box\n"
        "if __name__ == '__main__':\n    print([box.rank for box in run_ranks(work, 2)])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[0, 1]\n", done.stderr


def test_a_long_temporary_folder(tmp_path: Path) -> None:
    """As nox makes them, below the name of a session: longer than the path of a socket may be."""
    import subprocess

    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_harness as t; t.print_places()"
    environ = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[(0, 2), (1, 2)]\n", done.stderr
    assert not list(folder.glob("zs-ranks-*"))


def print_places() -> None:
    print(run_ranks(place, 2))


def build_optimizer(group: Group) -> float:
    started = time.monotonic()
    torch.optim.AdamW(nn.Linear(2, 2).parameters())
    return time.monotonic() - started


def test_a_run_is_quick_once_the_server_is_there() -> None:
    """0.06 to 0.08 s on an idle core; the bound leaves room for a busy machine."""
    run_ranks(place, 2)
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        run_ranks(place, 2)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.5
    assert max(run_ranks(build_optimizer, 1)) < 1.0  # what it imports was imported by the server


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/net/dev")
def test_loopback_counts_what_ranks_send() -> None:
    before = loopback_nbytes()
    run_ranks(broadcast, 2, 4_000_000)
    assert loopback_nbytes() - before >= 4_000_000


def broadcast(group: Group, nbytes: int) -> None:
    torch.distributed.broadcast(torch.zeros(nbytes, dtype=torch.uint8), src=0)
