"""The two sides of the `aio` benchmark: a resident worker, and fio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairs import Run

WORKER = Path(__file__).resolve().parent / "aio_worker.py"
SMALL = 64 << 10


class Unavailable(Exception):
    """This side cannot be measured here; the text is the reason."""


def small_nbytes(nbytes: int) -> int:
    """Of a file of `nbytes`: whole batches of 1000 small requests."""
    return nbytes // SMALL // 1000 * 1000 * SMALL


def moved_nbytes(op: str, nbytes: int) -> int:
    return small_nbytes(nbytes) if op.startswith("small") else nbytes


class Worker:
    """`aio_worker.py` in an interpreter, alive until `close`. Raises `Unavailable` where it cannot start."""

    def __init__(self, side: str, nbytes: int, python: str = sys.executable) -> None:
        self._nbytes = nbytes
        folder = os.path.dirname(os.path.abspath(python))
        environment = {**os.environ, "PATH": folder + os.pathsep + os.environ.get("PATH", "")}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        command = [python, str(WORKER), side, str(nbytes)]
        try:
            self._process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except OSError as error:
            raise Unavailable(str(error)) from error
        self._answer()

    def ask(self, op: str, path: str = "", memory: str = "pinned", **options: Any) -> Any:
        """The worker's answer as it is."""
        stream = self._process.stdin
        if stream is None:
            raise Unavailable("the worker has no stdin")
        stream.write(json.dumps({"op": op, "path": path, "memory": memory, **options}) + "\n")
        stream.flush()
        return self._answer()

    def run(self, op: str, path: str, memory: str = "pinned", **options: Any) -> Run:
        """One run: GB/s, and CPU seconds per GB."""
        answer, moved = self.ask(op, path, memory, **options), moved_nbytes(op, self._nbytes) / 1e9
        return {"rate": moved / answer["seconds"], "cpu": answer["cpu"] / moved}

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            self._process.wait(60)
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise Unavailable(said[-1][:300] if said else f"exit code {self._process.returncode}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise Unavailable(answer["error"])
        return answer


class Fio:
    """fio on one file. Rates are by its own clock, without its start; CPU time is that of the whole process, io-wq
    threads included, less what a run of one block needs."""

    def __init__(self, path: str, nbytes: int, options: list[str]) -> None:
        found = shutil.which("fio")
        if found is None:
            raise Unavailable("fio is not installed")
        self._program, self._path, self._nbytes, self._options = found, path, nbytes, options
        self._start_cpu: dict[tuple[Any, ...], float] = {}

    @property
    def version(self) -> str:
        return subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True).stdout.strip()

    def run(self, op: str, block: int, depth: int, engine: str = "io_uring") -> Run:
        key = (op, block, depth, engine)
        if key not in self._start_cpu:
            self._start_cpu[key] = min(self._measure(op, block, depth, engine, block)[1] for _ in range(3))
        moved = moved_nbytes(op, self._nbytes)
        job, cpu = self._measure(op, block, depth, engine, moved)
        sides = [job[side] for side in ("read", "write") if job[side]["io_bytes"]]
        milliseconds = max(side["runtime"] for side in sides)
        done = sum(side["io_bytes"] for side in sides) / 1e9
        return {"rate": done / milliseconds * 1e3, "cpu": max(cpu - self._start_cpu[key], 0.0) / done}

    def _measure(self, op: str, block: int, depth: int, engine: str, nbytes: int) -> tuple[dict[str, Any], float]:
        kind = {"first": "write", "mixed": "rw", "small read": "read", "small write": "write"}.get(op, op)
        command = [self._program, "--name=j", f"--filename={self._path}", f"--rw={kind}", f"--bs={block}"]
        command += [f"--ioengine={engine}", f"--iodepth={depth}", f"--io_size={nbytes}", f"--size={self._nbytes}"]
        command += ["--direct=1", "--thread", "--invalidate=1", "--allow_file_create=0", "--fallocate=none"]
        command += ["--output-format=json", *self._options]
        if op == "first":
            command.append("--end_fsync=1")
        elif kind != "read":
            command.append("--overwrite=1")
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            text = out.read()
            if process.returncode or "{" not in text:
                err.seek(0)
                said = (err.read() or text).strip().splitlines()
                raise Unavailable(f"fio: {said[-1] if said else process.returncode}")
        return json.loads(text[text.index("{") :])["jobs"][0], used.ru_utime + used.ru_stime


def fresh(path: str, nbytes: int) -> None:
    """A file whose space is taken and never written."""
    if os.path.exists(path):
        os.unlink(path)
    with open(path, "xb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        os.fsync(file.fileno())


def on_fresh(path: str, nbytes: int, run: Callable[[], Run]) -> Callable[[], Run]:
    def measured() -> Run:
        fresh(path, nbytes)
        return run()

    return measured
