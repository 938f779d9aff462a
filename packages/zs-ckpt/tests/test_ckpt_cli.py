"""`zs ckpt`: tables, exit codes, one-line errors, and a bar that is quiet where nobody looks."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zs_ckpt
from safetensors.torch import load_file
from torch import nn
from zs_ckpt.cli import main
from zs_ckpt.reports import Bar, size, table

FIXTURES = Path(__file__).parent / "deepspeed_fixtures"


def folder(tmp_path: Path) -> Path:
    """Two checkpoints."""
    path, model = tmp_path / "run", nn.Linear(4, 3)
    with torch.no_grad():
        for step in (1, 2):
            for parameter in model.parameters():
                parameter.fill_(step)
            zs_ckpt.save(path, {"model": model, "x": {"lr": 0.1 * step}}, tag=f"step{step}", step=step)
    return path


def flip(path: Path, tag: str) -> Path:
    file = next((path / tag).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 8
    file.write_bytes(content)
    return file


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path)
    code, out, err = ran(capsys, "ls", path)
    rows = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert rows[0] == ["tag", "step", "ranks", "tensors", "size", "state"]
    assert rows[1][:5] == ["*", "step2", "2", "1", "2"] and rows[1][-1] == "ok"
    assert rows[2][:4] == ["step1", "1", "1", "2"]
    (path / "step2" / "manifest.json").write_text("{}")
    code, out, _ = ran(capsys, "ls", path)
    assert code == 0 and "checksum" in out
    (path / "latest").unlink()
    assert ran(capsys, "ls", path)[0] == 0
    assert ran(capsys, "ls", tmp_path / "none")[:2] == (0, f"no checkpoint has been committed in {tmp_path / 'none'}\n")


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path)
    code, out, err = ran(capsys, "verify", path)
    assert (code, err) == (0, "") and "step2" in out and out.strip().endswith("ok")
    assert ran(capsys, "verify", path, "--all")[1].count("ok") == 2
    file = flip(path, "step1")
    assert ran(capsys, "verify", path)[0] == 0
    for arguments in ((path, "--tag", "step1"), (path / "step1",), (path, "--all")):
        code, out, _ = ran(capsys, "verify", *arguments)
        assert code == 1 and file.name in out and "tensor 'model/" in out


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path)
    code, out, _ = ran(capsys, "inspect", path)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0] == ["tensor", "shape", "dtype", "size", "pieces", "files"]
    assert ["model/weight", "3", "x", "4", "float32", "48", "B", "1", "1"] in lines
    assert out.splitlines()[-1].startswith("step2: step 2, saved by 1 rank, 2 tensors")
    _, out, _ = ran(capsys, "inspect", path, "--name", "*bias", "--tag", "step1")
    assert "model/bias" in out and "model/weight" not in out and "step1:" in out
    _, out, _ = ran(capsys, "inspect", path / "step2", "--objects")
    assert json.loads(out)["objects"]["x"]["leaves"] == [[["lr"], 0.2]]


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path)
    assert ran(capsys, "diff", path, path) == (0, "no difference\n", "")
    code, out, _ = ran(capsys, "diff", path / "step1", path / "step2")
    rows = dict(line.split(None, 1) for line in out.splitlines()[1:-1])
    assert code == 1 and out.splitlines()[-1] == "3 differences"
    assert rows["model/weight"] == "12 of 12 values, by 1 at most"
    assert rows["objects.x.leaves"] == '[[["lr"], 0.1]] and [[["lr"], 0.2]]'
    zs_ckpt.save(
        tmp_path / "other",
        {"model": {"weight": torch.ones(3, 5), "bias": torch.ones(3).half()}, "n": {"n": torch.ones(1)}},
    )
    code, out, _ = ran(capsys, "diff", path, tmp_path / "other", "--tag-a", "step1")
    assert code == 1 and "shape (3, 4) and (3, 5)" in out and "float32 and float16" in out
    assert f"only in {tmp_path / 'other' / 'checkpoint'}" in out


def test_diff_sees_the_sign_of_zero_and_no_difference_between_nans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = torch.tensor([float("nan"), 0.0, 2.0, float("inf")])
    other = values.clone()
    zs_ckpt.save(tmp_path / "a", {"x": {"v": values}})
    zs_ckpt.save(tmp_path / "b", {"x": {"v": other}})
    assert ran(capsys, "diff", tmp_path / "a", tmp_path / "b")[0] == 0
    other[1] = -0.0
    zs_ckpt.save(tmp_path / "b", {"x": {"v": other}})
    code, out, _ = ran(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1 and "1 of 4 values, by 0 at most" in out
    other[1], other[2], other[0] = 0.0, 2.5, 1.0
    zs_ckpt.save(tmp_path / "b", {"x": {"v": other}})
    code, out, _ = ran(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1 and "2 of 4 values, by 0.5 at most" in out


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path)
    code, out, _ = ran(capsys, "export", path, tmp_path / "hf", "--dtype", "bf16", "--tag", "step1")
    assert code == 0 and out.strip() == str(tmp_path / "hf" / "model.safetensors")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(found["weight"], torch.ones(3, 4).bfloat16())
    assert ran(capsys, "export", path, tmp_path / "hf", "--max-shard-size", "20")[0] == 0
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert ran(capsys, "export", path, tmp_path / "dcp", "--to", "dcp")[0] == 0
    assert ran(capsys, "import-dcp", tmp_path / "dcp", tmp_path / "back", "--tag", "t")[0] == 0
    assert torch.equal(zs_ckpt.read(tmp_path / "back", tag="t")["model/weight"], torch.full((3, 4), 2.0))


def test_import_deepspeed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, out, err = ran(capsys, "import-deepspeed", FIXTURES / "zero3_bf16", tmp_path / "ours")
    assert "import [" in err and "100 % of" in err
    assert code == 0 and out.startswith(str(tmp_path / "ours" / "global_step3"))
    assert zs_ckpt.read(tmp_path / "ours")["model/embed.weight"].dtype == torch.float32
    assert ran(capsys, "verify", tmp_path / "ours")[0] == 0
    code, _, err = ran(capsys, "import-deepspeed", tmp_path, tmp_path / "ours")
    assert code == 2 and err.startswith("zs ckpt: ") and err.count("\n") == 1


def test_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path)
    assert ran(capsys, "prune", path, "--keep", 2) == (0, "nothing to remove\n", "")
    assert ran(capsys, "prune", path, "--keep", 1) == (0, "removed step1\n", "")
    assert zs_ckpt.read(path)["model/bias"].tolist() == [2, 2, 2]
    code, _, err = ran(capsys, "prune", path, "--keep", 0)
    assert code == 2 and "keep" in err


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_errors_are_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ran(capsys, command, tmp_path / "none")
    assert (code, out) == (2, "") and err.count("\n") == 1 and str(tmp_path / "none") in err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for name in ("ls", "verify", "inspect", "diff", "export", "import-deepspeed", "import-dcp", "prune"):
        assert f"\n    {name}" in out
    with pytest.raises(SystemExit) as caught:
        main(["nothing"])
    assert caught.value.code == 2


def test_python_dash_m(tmp_path: Path) -> None:
    path = folder(tmp_path)
    flip(path, "step2")
    done = subprocess.run(
        [sys.executable, "-m", "zs_ckpt", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "model/" in done.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_quiet_where_nobody_looks() -> None:
    for stream, loud in ((io.StringIO(), False), (Terminal(), True)):
        with Bar("export", stream) as bar:
            for done in range(1001):
                bar(done, 1000)
        shown = stream.getvalue()
        assert bool(shown) == loud
        if loud:
            assert shown.count("\rexport") == 101 and "100 % of 1.00 kB" in shown and shown.endswith("\r\x1b[K")


def test_sizes_and_tables() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_300_000_000, 5 * 10**15)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.30 GB",
        "5000.00 TB",
    ]
    assert table(("a", "bb"), [("x", "1"), ("long", "22")], right="bb") == "a     bb\nx      1\nlong  22"
