"""The command line: what it prints, and what `zs run` passes on."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from zs_engine.cli import main
from zs_engine.config import language


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "SLURM_NODELIST", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip()


# -- lint, schema, report ---------------------------------------------------------------------------------------------


def test_lint_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 8,\n "zero_optimization": {"stage": 3, "overlap_comm": true}}')
    assert main(["lint", str(file), "--world", "2"]) == 0
    lines = [line.split(maxsplit=3) for line in out(capsys).splitlines()]
    assert [line[:3] for line in lines] == [
        ["1:22", "train_batch_size", "honoured"],
        ["2:33", "zero_optimization.stage", "honoured"],
        ["2:52", "zero_optimization.overlap_comm", "equivalent"],
        [f"{file}:", "3", "keys:"],
    ]
    last = ["communication always runs beside the computation", "2 honoured, 1 equivalent; accepted"]
    assert [line[3] for line in lines][2:] == last


def test_lint_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 9,\n "optimiser": {}, "amp": {"enabled": false}}')
    assert main(["lint", str(file), "--world", "2"]) == 1
    text = out(capsys)
    assert "unknown key; did you mean 'optimizer'?" in text
    assert "train_batch_size(9) != train_micro_batch_size_per_gpu(4)" in text
    assert "amp.enabled       harmless    asks for nothing" in text
    assert text.endswith("3 keys: 1 harmless, 1 unknown, 1 invalid; 2 problems")


def test_lint_of_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(tmp_path / "none.json")]) == 2
    assert "cannot read the configuration" in capsys.readouterr().err


def test_lint_of_no_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text("[]")
    assert main(["lint", str(file)]) == 1
    assert "the configuration should be an object" in out(capsys)


def lint_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["lint", "--json", *arguments])
    return code, json.loads(out(capsys))


def test_lint_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text(
        '{"train_batch_size": 8, // samples\n "zero_optimization": {"stage": 7, "overlap_comm": true},\n'
        ' "graph_harvesting": true, "aio": {"queue_depth": 4}, "optimiser": {"type": 1}}'
    )
    code, found = lint_json(capsys, str(file))
    assert code == 1 and found["ok"] is False
    assert [[*list(row.values())[:4], row["message"][:30]] for row in found["keys"]] == [
        ["train_batch_size", 1, 22, "honoured", "samples in an optimizer step, "],
        ["zero_optimization.stage", 2, 33, "invalid", "Input should be 0, 1, 2 or 3 ("],
        ["zero_optimization.overlap_comm", 2, 52, "equivalent", "communication always runs besi"],
        ["graph_harvesting", 3, 22, "refused", "CUDA graphs are not there yet "],
        ["aio.queue_depth", 3, 51, "honoured", "requests in flight, up to 256;"],
        ["optimiser", 3, 55, "unknown", "unknown key; did you mean 'opt"],
        ["optimiser.type", 3, 77, "unknown", "part of optimiser"],
    ]
    assert all(list(row) == ["path", "line", "column", "verdict", "message"] for row in found["keys"])


def test_lint_of_base64_has_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = base64.urlsafe_b64encode(b'{"train_batch_size": 8,\n"x??": ">>>"}').decode()
    code, found = lint_json(capsys, text)
    assert code == 1 and [(row["path"], row["line"]) for row in found["keys"]] == [("train_batch_size", 1), ("x??", 2)]


def test_lint_of_a_text_that_cannot_be_parsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 8,\n "fp16": {"enabled": True}}')
    code, found = lint_json(capsys, str(file))
    (row,) = found["keys"]
    assert (code, found["ok"], row["path"], row["line"], row["column"]) == (1, False, "", 2, 22)
    assert row["verdict"] == "invalid" and row["message"].startswith("JSON writes 'true'")
    file.write_text('{"train_batch_size": 8, "train_batch_size": 4}')
    assert "'train_batch_size' is given twice, first on line 1" in lint_json(capsys, str(file))[1]["keys"][0]["message"]
    assert main(["lint", str(file)]) == 1 and "given twice" in out(capsys)
    file.write_bytes(b'{"train_batch_size": 8,\n "\xe4": 1}')
    (row,) = lint_json(capsys, str(file))[1]["keys"]
    assert (row["line"], row["column"], row["message"]) == (2, 3, "not UTF-8 at byte 26")
    for text in ("[]", "null", "3"):
        file.write_text(text)
        assert lint_json(capsys, str(file), "--world", "1")[0] == 1


def test_lint_lets_unknown_keys_pass_where_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 8, "backend": "nccl"}')
    assert lint_json(capsys, str(file))[0] == 1
    code, found = lint_json(capsys, str(file), "--unknown-keys", "warn")
    assert (code, found["ok"], found["keys"][1]["verdict"]) == (0, True, "unknown")
    file.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": -1, "x": 2}}}')
    code, found = lint_json(capsys, str(file), "--unknown-keys", "warn")
    assert code == 1 and [row["verdict"] for row in found["keys"]] == ["honoured", "invalid", "unknown"]
    file.write_text('{"train_batch_size": "8", "backend": "nccl"}')
    assert lint_json(capsys, str(file), "--unknown-keys", "warn")[0] == 1


def test_lint_has_colours_in_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 8}')
    assert main(["lint", str(file)]) == 0 and "\x1b[" not in out(capsys)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["lint", str(file)]) == 0 and "\x1b[32mhonoured  \x1b[0m" in out(capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["lint", str(file)]) == 0 and "\x1b[" not in out(capsys)


def test_schema_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(out(capsys))
    assert set(schema["properties"]) == {info.alias or name for name, info in language().model_fields.items()}
    assert schema["additionalProperties"] is False
    assert "stage" in schema["$defs"]["ZeroConfig"]["properties"]


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    rows = dict(line.split(maxsplit=1) for line in out(capsys).splitlines())
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["torch"][0].isdigit() and "gloo" in rows["backends"]
    assert "plain" in rows["aio"].split(", ")
    for name in ("zs-comm", "zs-ckpt", "zs-offload-aio", "zs-zero"):
        assert rows[name][0].isdigit() or rows[name] == "not installed"  # run from its sources
    for name in ("zs-pipe", "zs-profile", "zs-tensor", "zs-compress"):
        assert rows[name][0].isdigit() or rows[name] == f"not installed (optional: pip install {name})"


# -- run: what would be started ---------------------------------------------------------------------------------------


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["run", "--dry-run", *arguments]) == 0
    return out(capsys)


def test_one_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(capsys, "-n", "2", "train.py", "--lr", "1") == (
        "torchrun --standalone --nproc-per-node=2 -m zs_comm.record train.py --lr 1"
    )
    assert dry(capsys, "-m", "job.train", "-n", "3").endswith("--nproc-per-node=1 -m zs_comm.record -m job.train -n 3")


def test_several_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("-n", "4", "--nodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "4000")
    assert dry(capsys, *arguments, "train.py") == (
        "torchrun --nnodes=2 --node-rank=1 --master-addr=10.0.0.1 --master-port=4000 --nproc-per-node=4 "
        "-m zs_comm.record train.py"
    )
    assert main(["run", "--nodes", "2", "train.py"]) == 2
    assert "2 nodes need --node-rank and --master-addr" in capsys.readouterr().err


def test_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[08-10]", "SLURM_NODEID": "2", "SLURM_PROCID": "2"}
    for name, value in (step | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_GPUS_ON_NODE": "8"}).items():
        monkeypatch.setenv(name, value)
    assert dry(capsys, "train.py").startswith(
        "torchrun --nnodes=3 --node-rank=2 --master-addr=gpu08 --master-port=15077 --nproc-per-node=8 "
    )


def test_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hosts"
    file.write_text("elsewhere.invalid slots=4\nlocalhost slots=2\n")
    expected = (
        "torchrun --nnodes=2 --node-rank=1 --master-addr=elsewhere.invalid --master-port=29500 --nproc-per-node=2 "
    )
    assert dry(capsys, "--hostfile", str(file), "train.py").startswith(expected)


def test_nothing_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "give a script" in capsys.readouterr().err


# -- run: really ------------------------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    import zs_comm

    group = zs_comm.init_distributed(timeout_s=20)
    sys.stdout.write(f"argument {sys.argv[1]} of {sys.argv[0].rsplit('/')[-1]} name {__name__}\\n")

    def fail():
        if sys.argv[1] == "raise":
            raise ValueError("the cause")
        sys.exit(3)

    if group.rank == 1:
        fail()
    zs_comm.barrier(group)
    zs_comm.shutdown()
"""


@pytest.mark.parametrize(
    ("how", "code", "last"),
    [
        ("exit", 3, "zs run: rank 1 failed first, with exit code 3"),
        ("raise", 1, "ValueError: the cause"),
    ],
)
def test_exit_code_and_traceback_of_the_first_failure(tmp_path: Path, how: str, code: int, last: str) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [
        sys.executable,
        "-c",
        "import sys, zs_engine.cli; sys.exit(zs_engine.cli.main())",
        "run",
        "-n",
        "2",
        str(script),
        how,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.count(f"argument {how} of job.py name __main__") == 2
    assert done.stderr.strip().endswith(last)
    if how == "raise":
        report = done.stderr[done.stderr.index("zs run: rank 1 failed first, with exit code 1:") :]
        assert 'job.py", line 10, in fail' in report and "runpy" not in report and "PeerLost" not in report


def test_import_is_cheap() -> None:
    code = """
        import sys, time
        import torch
        start = time.perf_counter()
        import zs_engine
        print(time.perf_counter() - start, "torch.distributed.tensor" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    seconds, tensor = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert tensor == "False"
    if float(seconds) > 0.3:  # somebody else had the processor
        seconds = min(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0] for _ in "123"
        )
    assert float(seconds) <= 0.3
