"""zs-ckpt over zs-comm, no engine: plain torch state comes back on another number of ranks, and the commands answer."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import torch
import zs_ckpt
import zs_comm
from torch import nn
from zs_ckpt.deepspeed import open_deepspeed
from zs_ckpt.exporting import export
from zs_comm.testing import run_ranks

REQUIRES = {"zs-comm", "zs-ckpt"}


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for step in range(steps):
        net(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def saved(group: zs_comm.Group, folder: str) -> None:
    net, optimizer = trained(3)
    zs_ckpt.save(folder, {"model": net, "optimizer": optimizer}, group=group, client_state={"world": group.size})


def test_two_ranks_save_and_one_loads(tmp_path: Path) -> None:
    run_ranks(saved, 2, str(tmp_path / "run"))
    net, optimizer = trained(0)
    assert zs_ckpt.load(tmp_path / "run", {"model": net, "optimizer": optimizer}).client_state == {"world": 2}
    expected, states = trained(3)
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(optimizer.state[ours]["exp_avg"], states.state[theirs]["exp_avg"])
    assert zs_ckpt.verify(tmp_path / "run").ok


def test_export_and_commands(tmp_path: Path) -> None:
    zs_ckpt.save(tmp_path / "run", {"model": nn.Linear(3, 3)})
    assert [file.name for file in export(tmp_path / "run", tmp_path / "hf")] == ["model.safetensors"]
    for arguments, expected in ((["verify", "run"], 0), (["ls", "run"], 0), (["verify", "none"], 2)):
        command = [sys.executable, "-P", "-m", "zs_ckpt", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == expected, done.stderr


def test_the_command_is_declared() -> None:
    found = {point.name: point.value for point in entry_points(group="zs_engine.commands")}
    assert found["ckpt"] == "zs_ckpt.cli:main"


def test_deepspeeds_files_need_neither_deepspeed_nor_numpy() -> None:
    fixtures = Path(__file__).parents[2] / "packages/zs-ckpt/tests/deepspeed_fixtures"
    found = open_deepspeed(fixtures / "zero3_bf16")
    assert found.stage == 3 and found.model_state()["embed.weight"].shape == (13, 6)
