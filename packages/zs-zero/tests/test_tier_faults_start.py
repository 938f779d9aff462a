"""What is wrong with folders, disks and limits is found by `shard`, which then leaves the model as it was."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import ConfigError, Group
from zs_zero.testing import Fault
from zs_zero.tiers.folder import FolderInUse

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tier_fault_runs import AWAY, FILES, LAYOUTS, Layout, Training, differing, model, reference  # noqa: E402

ALL = LAYOUTS["everything"]
KINDS = ("parameters", "optimizer", "gradients")


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.exists())


def check_ordinary(net: nn.Module) -> None:
    """It has its values, and trains as a model that was never sharded."""
    fresh = model()
    for one in (net, fresh):
        client = torch.optim.AdamW(one.parameters(), lr=1e-2)
        for _ in range(2):
            one(torch.ones(3, 12)).square().mean().backward()
            client.step()
            client.zero_grad()
    assert differing(net.state_dict(), fresh.state_dict()) == []
    assert not hasattr(net, "_zs_runtime")


def refused(folder: Path, error: type[Exception], match: str, layout: Layout = ALL, **options: Any) -> BaseException:
    net = model()
    with pytest.raises(error, match=match) as caught:
        Training(folder, Group.single(), layout, net=net, **options)
    check_ordinary(net)
    return caught.value


@pytest.mark.parametrize("layout", [ALL, LAYOUTS["states"], LAYOUTS["parameters"]], ids=["all", "states", "parameters"])
def test_folders_that_are_none(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"somebody's")
    for path, error in (
        (tmp_path / "not" / "mounted", FileNotFoundError),
        (tmp_path / "file", NotADirectoryError),
        (tmp_path / "file" / "below", OSError),
    ):
        refused(path, error, str(tmp_path / path.relative_to(tmp_path).parts[0]), layout)
    assert left(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_folders_that_cannot_be_written(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.mkdir

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        if str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        make(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        caught = refused(tmp_path, OSError, str(tmp_path))
    assert isinstance(caught, OSError) and caught.errno == number
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_is_found_before_training(kind: str, number: int, tmp_path: Path) -> None:
    fault = Fault(op="reserve", number=number, error=errno.ENOSPC)
    caught = refused(tmp_path, OSError, f"bytes for .* blocks of {kind}.*offset.*{kind}.blocks", faults={kind: fault})
    assert isinstance(caught, OSError) and caught.errno == errno.ENOSPC
    assert left(tmp_path) == [], "files are given back"


@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize("kind", ["parameters", "optimizer"])
def test_the_first_writes_fail(kind: str, place: int, tmp_path: Path) -> None:
    """Of values that leave memory: the model has them all again."""
    probe = Training(tmp_path, Group.single(), LAYOUTS["everything, fp32" if kind == "parameters" else "everything"])
    number = range(probe.stores[kind].count("write"))[place]
    layout = probe.layout
    probe.close()
    net = model()
    with pytest.raises(OSError, match=f"writing {kind} block .* at offset .*{kind}.blocks"):
        Training(tmp_path, Group.single(), layout, net=net, faults={kind: Fault(op="write", number=number)})
    assert left(tmp_path) == []
    if layout.options:
        return  # it has another dtype by then
    check_ordinary(net)


def test_a_folder_that_vanishes_while_training(tmp_path: Path) -> None:
    """The files are open: what is removed is their names, and training never notices."""
    known = reference(tmp_path, Group.single(), ALL, 3)
    training = Training(tmp_path / "disk", Group.single(), ALL)
    for window in range(3):
        if window == 1:
            shutil.rmtree(tmp_path / "disk")
        training.window(window)
        assert differing(training.state(), known.states[window + 1]) == []
    training.optimizer.close()
    assert not (tmp_path / "disk").exists()


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from tier_fault_runs import *
training = Training({folder!r}, Group.single(), LAYOUTS["everything"], job="mine")
training.window(0)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_job_that_runs_is_refused_and_one_that_was_killed_is_collected(tmp_path: Path) -> None:
    code = CHILD.format(tests=str(HERE), folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            held = {path for path in left(tmp_path) if path.endswith(".blocks")}
            assert len(held) == 3
            caught = refused(tmp_path, FolderInUse, f"process {child.pid} .* holds this folder", job="mine")
            assert isinstance(caught, FolderInUse) and caught.pid == child.pid
            other = Training(tmp_path, Group.single(), ALL, job="another")
            other.window(0)
            other.close()
            assert held <= set(left(tmp_path)), "another job took them away"
        finally:
            child.send_signal(signal.SIGKILL)
    assert held <= set(left(tmp_path)), "who could have removed them?"
    again = Training(tmp_path, Group.single(), ALL, job="new")
    assert not held & set(left(tmp_path))
    again.window(0)
    again.close()
    assert left(tmp_path) == []


@pytest.mark.parametrize("layout", [ALL, LAYOUTS["states"], LAYOUTS["parameters"]], ids=["all", "states", "parameters"])
def test_a_limit_that_cannot_be_met_is_refused_with_the_sum(layout: Layout, tmp_path: Path) -> None:
    limited = Layout(layout.optimizer, layout.parameters, layout.stage, {**layout.options, "host_memory_limit": "8MiB"})
    text = str(refused(tmp_path, ConfigError, "host_memory_limit cannot be met", limited))
    found = re.search(r"be met: (.*) = ([\d.,]+ \S+) > ([\d.,]+ \S+);", text)
    assert found is not None, text
    parts = [nbytes(re.sub(r"^.*? (?=[\d.,]+ (MiB|B)$)", "", part)) for part in found[1].split(" + ")]
    total, limit = nbytes(found[2]), nbytes(found[3])
    assert limit == 8 << 20 < total
    assert abs(sum(parts) - total) <= len(parts) * (1 << 20) * 0.05 + 1
    assert left(tmp_path) == []


def nbytes(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * {"MiB": 1 << 20, "B": 1}[unit]


@pytest.mark.parametrize(
    ("stage", "options", "match"),
    [
        (0, {"offload_optimizer": FILES}, "offload_optimizer.device.*stage"),
        (0, {"offload_optimizer": {"device": "cpu"}}, "offload_optimizer.device.*stage"),
        (2, {"offload_param": AWAY}, "offload_param.device.*stage"),
        (1, {"offload_param": {"device": "cpu"}}, "offload_param.device.*stage"),
        (3, {"offload_optimizer": {"device": "none", "zs_gradients": "nvme"}}, "zs_gradients"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "nvme_path"),
        (3, {"offload_param": {"device": "nvme"}}, "nvme_path"),
    ],
)
def test_options_at_a_stage_without_a_use_for_them(
    stage: int, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    net = model()
    at: dict[str, Any] = {
        key: {**value, "nvme_path": str(tmp_path)} if match != "nvme_path" else value for key, value in options.items()
    }
    with pytest.raises(ConfigError, match=match):
        zs_zero.shard(net, torch.optim.AdamW(net.parameters()), stage=stage, **at)
    check_ordinary(net)
    assert left(tmp_path) == []
