"""The cases in which engines of this kind are known to lose bytes in silence, or to abort: all of them once more
under `python -O`, where an `assert` is no check.

What is looked for: a full disk, a file-size limit, a tail that is not a multiple of the block, a file shorter than it
should be, a wait with nothing to wait for, a shorter file written over a longer one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults_memory import MIB, pattern
from faults_mounts import free_nbytes

CASES = """
import errno, json, os, resource, signal, sys
from zs_offload_aio import AioError, Engine

folder, full, backend = sys.argv[1:4]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
report = {"debug": __debug__}


def outcome(name, transfer):
    try:
        report[name] = transfer()
    except Exception as error:
        kind = type(error).__name__
        report[name] = [kind, errno.errorcode.get(getattr(error, "errno", None)), getattr(error, "filename", None)]


def pattern(nbytes):
    return bytes(range(251)) * (nbytes // 251) + bytes(nbytes % 251)


with Engine(backend=backend) as engine:

    def tail():
        data, back = pattern((8 << 20) + 1000), bytearray((8 << 20) + 1000)
        with engine.open(f"{folder}/tail", "x") as file:
            file.write(data).wait()
            file.read(back).wait()
        return back == data and os.path.getsize(f"{folder}/tail") == len(data)

    def shorter_over_longer():
        for nbytes in (100_000, 70_001):
            with engine.open(f"{folder}/shorter", "w") as file:
                file.write(pattern(nbytes)).wait()
        with open(f"{folder}/shorter", "rb") as file:
            return file.read() == pattern(70_001)

    def truncated():
        os.truncate(f"{folder}/tail", 4 << 20)
        return engine.read(f"{folder}/tail", bytearray((8 << 20) + 1000)).wait()

    def beyond_the_end():
        return engine.read(f"{folder}/tail", bytearray(4096), 1 << 30).wait()

    def disk_full():
        return engine.write(full, pattern(32 << 20)).wait()

    def nothing_to_wait_for():
        engine.drain()
        return engine.write(f"{folder}/empty", b"").wait()

    def file_size_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return engine.write(f"{folder}/limited", pattern(8 << 20)).wait()

    for case in (
        tail, shorter_over_longer, truncated, beyond_the_end, disk_full, nothing_to_wait_for, file_size_limit
    ):
        outcome(case.__name__, case)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    outcome("lost", lambda: engine.read(f"{folder}/none", bytearray(1)).wait())
print(json.dumps(report))
"""


def run(script: Path, optimise: bool, folder: Path, full: str, backend: str) -> dict[str, object]:
    options = ["-O"] if optimise else []
    command = [sys.executable, *options, os.fspath(script), os.fspath(folder), full, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report.pop("debug") != optimise
    return report


def expected(folder: Path, full: str) -> dict[str, object]:
    tail = f"{folder}/tail"
    return {
        "tail": True,
        "shorter_over_longer": True,
        "truncated": ["ShortRead", "ENODATA", tail],
        "beyond_the_end": ["ShortRead", "ENODATA", tail],
        "disk_full": ["AioError", "ENOSPC", full],
        "nothing_to_wait_for": 0,
        "file_size_limit": ["AioError", "EFBIG", f"{folder}/limited"],
        "lost": ["AioNotFound", "ENOENT", f"{folder}/none"],
    }


@pytest.mark.parametrize("optimise", [False, True])
def test_silent_losses(backend: str, tmp_path: Path, optimise: bool) -> None:
    script, folder = tmp_path / "cases.py", tmp_path / "files"
    script.write_text(CASES)
    folder.mkdir()
    assert run(script, optimise, folder, "/dev/full", backend) == expected(folder, "/dev/full")


@pytest.mark.root
@pytest.mark.parametrize("optimise", [False, True])
def test_silent_losses_on_a_small_disk(backend: str, tmp_path: Path, small_ext4: Path, optimise: bool) -> None:
    """The same with a real full disk: 32 MiB do not fit."""
    script, folder, large = tmp_path / "cases.py", tmp_path / "files", small_ext4 / "large"
    script.write_text(CASES)
    folder.mkdir()
    (small_ext4 / "filler").write_bytes(pattern(MIB) * ((free_nbytes(small_ext4) - 16 * MIB) // MIB))
    try:
        assert run(script, optimise, folder, os.fspath(large), backend) == expected(folder, os.fspath(large))
        assert large.stat().st_size < 32 * MIB
    finally:
        for path in (small_ext4 / "filler", large):
            path.unlink(missing_ok=True)
