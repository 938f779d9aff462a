"""The command line in processes of its own: what it prints, what it leaves, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from zs_offload_aio.report import Progress, parse_size, show_size, table
from zs_offload_aio.tune import Point, best

MIB = 1 << 20


def run(*arguments, **options):
    command = [sys.executable, "-m", "zs_offload_aio", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def refused(done, code, *texts):
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("zs_offload_aio: error: ")
    for text in texts:
        assert str(text) in line
    return done.stdout == ""


@pytest.fixture
def no_fio(tmp_path):
    """An environment in which no program is found."""
    return {**os.environ, "PATH": str(tmp_path)}


@pytest.fixture
def fake_fio(tmp_path_factory):
    """An environment with a fio that answers what a file beside it says and keeps its arguments."""
    folder = tmp_path_factory.mktemp("bin")
    answer = {"jobs": [{"error": 0, "read": {"io_bytes": 4 * 10**9, "runtime": 1000}, "write": {"io_bytes": 0}}]}
    (folder / "answer").write_text(json.dumps(answer))
    script = folder / "fio"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n/bin/cat {folder}/answer\n')
    script.chmod(0o755)
    return folder, {**os.environ, "PATH": str(folder)}


def rates(text):
    """{operation: numbers} of bench's table."""
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    names = ("first write", "write", "read", "mixed")
    return {cells[0]: [float(cell) for cell in cells[1:] if cell != "-"] for cells in lines if cells[0] in names}


def test_bench_in_a_folder_leaves_nothing(tmp_path, no_fio):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = run("bench", folder, "--size", "3M", "--rounds", 1, env=no_fio)
    assert (done.returncode, done.stderr) == (0, "")
    found = rates(done.stdout)
    assert list(found) == ["first write", "write", "read", "mixed"]
    assert all(len(values) == 1 and values[0] > 0 for values in found.values())
    assert "fio is not installed" in done.stdout and "3 MiB" in done.stdout
    assert list(folder.iterdir()) == []


def test_bench_reads_a_file_and_does_not_write_it(tmp_path, no_fio):
    path = tmp_path / "mine"
    content = os.urandom(2 * MIB + 777)
    path.write_bytes(content)
    path.chmod(0o400)
    done = run("bench", path, "--rounds", 1, env=no_fio)
    assert done.returncode == 0 and list(rates(done.stdout)) == ["read"]
    refused(run("bench", path, "--operations", "read,write", env=no_fio), 2, path, "--write")
    refused(run("bench", path, "--size", "3M", env=no_fio), 2, path, len(content))
    assert path.read_bytes() == content
    path.chmod(0o600)
    done = run("bench", path, "--write", "--rounds", 1, "--operations", "write", env=no_fio)
    assert done.returncode == 0 and list(rates(done.stdout)) == ["write"]
    after = path.read_bytes()
    assert after[: 2 * MIB] != content[: 2 * MIB] and after[2 * MIB :] == content[2 * MIB :]


def test_bench_stands_beside_fio(tmp_path, fake_fio):
    folder, env = fake_fio
    path = tmp_path / "a:b"
    path.write_bytes(bytes(2 * MIB))
    done = run("bench", path, "--rounds", 2, "--chunk", "512k", "--depth", 4, "--backend", "libaio", env=env)
    assert done.returncode == 0
    (ours, theirs, ratio) = rates(done.stdout)["read"]
    assert theirs == 4.0 and ratio == pytest.approx(ours / theirs, abs=0.02)
    calls = (folder / "calls").read_text().splitlines()
    assert len(calls) == 2
    for text in ("--ioengine=libaio", "--rw=read", "--bs=524288", "--iodepth=4", "--size=2097152", "--readonly"):
        assert text in calls[0].split()
    assert rf"--filename={tmp_path}/a\:b" in calls[0].split()
    (folder / "answer").write_text("fio: broken")
    done = run("bench", path, "--rounds", 2, env=env)
    assert done.returncode == 0 and "fio failed: fio: broken" in done.stdout
    assert len(rates(done.stdout)["read"]) == 1
    assert "zs / fio" not in run("bench", path, "--rounds", 1, "--no-fio", env=env).stdout


@pytest.mark.parametrize("backend", ["io_uring", "libaio", "threads", "plain"])
def test_bench_on_a_forced_backend(tmp_path, no_fio, backend):
    done = run("bench", tmp_path, "--size", "1M", "--rounds", 1, "--backend", backend, env=no_fio)
    assert done.returncode == 0 and backend in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["bench", "missing"], 1, "missing"),
        (["bench", ".", "--size", "3x"], 2, "'3x' is no size"),
        (["bench", ".", "--size", "0"], 2, "is no size"),
        (["bench", ".", "--size", "4k"], 2, "too few"),
        (["bench", ".", "--size", "1M", "--chunk", "1000"], 2, "chunk_nbytes 1000"),
        (["bench", ".", "--size", "1M", "--depth", "0"], 2, "depth"),
        (["bench", ".", "--operations", "erase"], 2, "erase"),
        (["bench", ".", "--backend", "floppy"], 2, "floppy"),
        (["bench", "empty"], 2, "too few"),
        (["tune", "missing"], 1, "missing"),
        (["tune", "empty"], 1, "empty"),
        (["tune", ".", "--merge"], 2, "--output"),
        (["tune", ".", "--rounds", "0"], 2, "'0'"),
        (["info", "missing"], 1, "missing"),
        (["eat"], 2, "eat"),
        ([], 2, "required"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, code, text):
    (tmp_path / "empty").touch()
    assert refused(run(*arguments, cwd=tmp_path), code, text)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, no_fio, command):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))

    refused(run(command, tmp_path, "--size", "16M", env=no_fio, preexec_fn=limit), 1, tmp_path, "EFBIG")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_bench_removes_its_file(tmp_path, no_fio, number):
    command = [sys.executable, "-m", "zs_offload_aio", "bench", str(tmp_path), "--size", "2M", "--rounds", "1000000"]
    process = subprocess.Popen(command, env=no_fio, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == 2 * MIB for path in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "zs_offload_aio: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


KEYS = {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events"}


def test_tune_prints_a_section_that_can_be_redirected(tmp_path):
    done = run("tune", tmp_path, "--size", "1M", "--rounds", 1)
    assert done.returncode == 0
    section = json.loads(done.stdout)["aio"]
    assert set(section) == KEYS
    assert section["block_size"] % 4096 == 0 and 1 <= section["queue_depth"] <= 256
    assert section["single_submit"] is False and section["overlap_events"] is True
    rows = [line for line in done.stderr.splitlines() if "KiB" in line or "MiB" in line]
    assert len(rows) == 12 and sum("best" in row for row in rows) == 1  # chunks up to 1 MiB, four depths
    assert list(tmp_path.iterdir()) == []


def test_tune_writes_and_merges_only_when_told(tmp_path):
    disk, config = tmp_path / "disk", tmp_path / "ds.json"
    disk.mkdir()
    tuned = ("tune", disk, "--size", "1M", "--rounds", 1, "--output", config)
    done = run(*tuned)
    assert done.returncode == 0 and f"written: {config}" in done.stdout and done.stderr == ""
    assert set(json.loads(config.read_text())["aio"]) == KEYS
    mine = {"train_batch_size": 8, "aio": {"use_gds": False, "queue_depth": 8192}, "zero_optimization": {"stage": 3}}
    config.write_text(json.dumps(mine))
    refused(run(*tuned), 2, config, "--merge")
    assert json.loads(config.read_text()) == mine
    assert run(*tuned, "--merge").returncode == 0
    merged = json.loads(config.read_text())
    assert merged["aio"].pop("use_gds") is False
    assert set(merged["aio"]) == KEYS and merged["aio"]["queue_depth"] <= 256
    assert {**merged, "aio": mine["aio"]} == mine
    for broken in ("{", "[]", '{"aio": 3}'):
        config.write_text(broken)
        refused(run(*tuned, "--merge"), 2, config)
        assert config.read_text() == broken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "ds.json"] and list(disk.iterdir()) == []


def test_the_best_is_the_fastest_or_as_good_with_less_in_flight():
    points = [Point(1 << 20, 32, 2.0, 2.0), Point(1 << 20, 8, 1.99, 1.99), Point(4096, 4, 1.0, 4.0)]
    assert best(points) is points[1]
    assert best([*points, Point(4 << 20, 32, 3.0, 3.0)]).both == 3.0


def test_info(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "file"):
        done = run("info", path, env={**os.environ, "ZS_AIO_BACKEND": "threads"})
        assert (done.returncode, done.stderr) == (0, "")
        found = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
        for name in ("io_uring", "libaio", "threads", "plain"):
            assert found[f"backend {name}"].startswith(("works", "does not work: "))
        assert found["backend plain"] == "works" and found["used"] == "threads (ZS_AIO_BACKEND)"
        assert found["path"] == str(path)
        assert found["transfers"].startswith(("direct", "buffered: "))
        assert {"kernel", "limit of memlock", "limit of open files", "huge pages", "aio-max-nr"} <= set(found)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "transfers" not in run("info").stdout
    nowhere = run("info", "/proc/self")
    assert nowhere.returncode == 0 and "unknown: no file can be made there" in nowhere.stdout


def test_sizes_as_people_write_them():
    sizes = {"4096": 4096, "64k": 65536, "1M": MIB, "1MiB": MIB, "2 GB".replace(" ", ""): 2 << 30, " 3g ": 3 << 30}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "x", "-1", "1.5M", "0k", "1kk", "9" * 30):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)
    assert [show_size(n) for n in (1, 4096, 3 * MIB, MIB + 1, 2 << 30)] == [
        "1 B", "4 KiB", "3 MiB", "1048577 B", "2 GiB",
    ]  # fmt: skip


def test_tables_line_up():
    assert table(["name", "n"], [["a", 5], ["long name", "123"]]) == (
        "name       n\n---------  ---\na            5\nlong name  123"
    )


class Stream:
    def __init__(self, terminal):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_quiet_unless_somebody_looks(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("zs_offload_aio.report.monotonic", lambda: next(clock))
    for terminal in (False, True):
        stream = Stream(terminal)
        bar = Progress("read", 4 * 10**9, stream)
        bar.add(2 * 10**9)
        bar.add(3 * 10**9)
        bar.close()
        if terminal:
            assert " 50%" in stream.text and "100%" in stream.text and "2.00 GB/s" in stream.text
            assert stream.text.endswith("\r") and "\n" not in stream.text
        else:
            assert stream.text == ""
