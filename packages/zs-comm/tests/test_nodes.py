"""Which node this is, what torchrun is told, and which rank failed first."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from zs_comm import ConfigError, record
from zs_comm.nodes import Node, from_hostfile, from_slurm
from zs_comm.torchrun import Failure, arguments, backends, first_failure

STEP = {"SLURM_JOB_ID": "15007", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_PROCID": "1", "SLURM_NODEID": "1"}


def test_outside_slurm() -> None:
    assert from_slurm({}) is None


def test_slurm_step() -> None:
    environ = STEP | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_GPUS_ON_NODE": "4"}
    assert from_slurm(environ) == Node(count=3, index=1, master_addr="n1", master_port=15007, slots=4)
    chosen = from_slurm(environ | {"MASTER_ADDR": "head", "MASTER_PORT": "99", "SLURM_GPUS_ON_NODE": "0"})
    assert chosen == Node(count=3, index=1, master_addr="head", master_port=99)


def test_one_slurm_node_without_srun() -> None:
    assert from_slurm({"SLURM_JOB_NODELIST": "n7", "SLURM_JOB_ID": "x"}) == Node(master_addr="n7")


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        (
            {"SLURM_JOB_NODELIST": "n[1-2]"},
            "2 nodes, and this process is not one of srun's: start it once on each node",
        ),
        (STEP | {"SLURM_STEP_NUM_TASKS": "12"}, "SLURM runs 12 tasks on 3 nodes: start it once on each node"),
    ],
)
def test_slurm_started_in_another_way(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        from_slurm(environ)


def hostfile(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def test_hostfile(tmp_path: Path) -> None:
    file = hostfile(tmp_path, f"# two\nfirst.invalid slots=8\n\n{socket.gethostname()} slots=2  # here\n")
    assert from_hostfile(file) == Node(count=2, index=1, master_addr="first.invalid", slots=2)
    assert from_hostfile(file, index=0) == Node(count=2, index=0, master_addr="first.invalid", slots=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.invalid slots=2\nb.invalid slots=2\n", r"which host is .* \(none\); give the node's number"),
        ("localhost slots=2\n127.0.0.1 slots=2\n", r"\(localhost, 127\.0\.0\.1\)"),
        ("a slots=2\na slots=2\n", ":2: host 'a' is there twice"),
        ("a\n", ":1: expected 'host slots=N' \\(got 'a'\\)"),
        ("a slots=0\n", ":1: expected 'host slots=N'"),
        ("a 4\n", ":1: expected 'host slots=N'"),
        ("", "which host is"),
    ],
)
def test_bad_hostfiles(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        from_hostfile(hostfile(tmp_path, text))


def test_a_node_that_the_hostfile_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="node number 1 of 1 hosts"):
        from_hostfile(hostfile(tmp_path, "a slots=1\n"), index=1)
    with pytest.raises(ConfigError, match="cannot read the hostfile"):
        from_hostfile(tmp_path / "none")


def test_arguments() -> None:
    assert arguments(["job.py", "-x"], ranks=2) == [
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "zs_comm.record",
        "job.py",
        "-x",
    ]
    node = Node(count=2, index=1, master_addr="a", master_port=5)
    assert arguments(["-m", "job"], ranks=3, node=node) == [
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=a",
        "--master-port=5",
        "--nproc-per-node=3",
        *("-m", "zs_comm.record", "-m", "job"),
    ]


def reports(folder: Path, **ranks: tuple[float, int, bool]) -> Path:
    for name, (when, code, consequence) in ranks.items():
        report: dict[str, Any] = {"time": when, "code": code, "traceback": f"of {name}", "consequence": consequence}
        (folder / f"{name}.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(
    ("codes", "ranks", "expected"),
    [
        # the exit codes of two ranks arrive together: the cause is the one that complains about nobody else
        ({0: 1, 1: 3}, {"rank0": (2.0, 1, True), "rank1": (1.0, 3, False)}, Failure(1, 3, "of rank1")),
        ({0: 1, 1: 3}, {"rank0": (1.0, 1, True), "rank1": (2.0, 3, False)}, Failure(1, 3, "of rank1")),
        ({0: 1, 1: 1}, {"rank0": (5.0, 1, False), "rank1": (4.0, 1, False)}, Failure(1, 1, "of rank1")),
        # a rank killed without a word is the cause of its peers' complaints
        ({0: 1, 1: -9}, {"rank0": (1.0, 1, True)}, Failure(1, 137)),
        ({1: 7}, {}, Failure(1, 7)),
        # a rank that torchrun stopped is none
        ({0: -15, 1: 1}, {"rank1": (1.0, 1, True)}, Failure(1, 1, "of rank1")),
        ({0: -15}, {}, Failure(0, 143)),
    ],
)
def test_first_failure(
    tmp_path: Path, codes: dict[int, int], ranks: dict[str, tuple[float, int, bool]], expected: Failure
) -> None:
    assert first_failure(codes, reports(tmp_path, **ranks)) == expected


def test_failures_read_well() -> None:
    assert str(Failure(1, 137)) == "rank 1 failed first, with exit code 137 (signal SIGKILL)"
    assert str(Failure(None, 3, "Trace\n")) == "the launch failed first, with exit code 3:\nTrace\n"


def test_backends() -> None:
    assert "gloo" in backends()


@pytest.mark.parametrize(
    ("body", "code", "report"),
    [
        ("print(__name__, sys.argv[1:])", 0, None),
        ("sys.exit(0)", 0, None),
        ("sys.exit(4)", 4, {"code": 4, "traceback": ""}),
        ("sys.exit('bad')", 1, {"code": 1, "traceback": "SystemExit: bad\n"}),
    ],
)
def test_record(
    tmp_path: Path, body: str, code: int, report: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "job.py"
    script.write_text(f"import sys\n{body}\n")
    monkeypatch.setenv("ZS_RECORD_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(sys, "argv", ["record", str(script), "a"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    if code == 0 and "exit" not in body:
        record.main()
    else:
        with pytest.raises(SystemExit):
            record.main()
    assert sys.argv == [str(script), "a"] and sys.path[0] == str(tmp_path)
    file = tmp_path / "rank2.json"
    if report is None:
        assert not file.exists()
    else:
        assert json.loads(file.read_text()).items() >= report.items()


def test_record_shows_the_scripts_own_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "job.py"
    script.write_text("def fail():\n    raise ValueError('cause')\nfail()\n")
    monkeypatch.setenv("ZS_RECORD_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["record", str(script)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        record.main()
    assert ended.value.code == 1
    text = capsys.readouterr().err
    assert text.count("File ") == 2 and "runpy" not in text and text.endswith("ValueError: cause\n")
    (file,) = tmp_path.glob("rank*.json")
    assert json.loads(file.read_text())["traceback"] == text
