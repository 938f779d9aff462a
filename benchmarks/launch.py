"""Runs one measurement in fresh processes, one thread per rank, and collects what its ranks report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RUN = Path(__file__).resolve().parent / "run.py"

Record = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The records of all ranks in rank order, or the reason why there are none."""

    records: list[Record]
    error: str | None = None


def launch(
    job: str,
    task: Any,  # a dataclass of plain values
    *,
    ranks: int,
    threads: int = 1,
    python: str = sys.executable,
    timeout_s: float = 900.0,
) -> Outcome:
    """Run `job` once under torchrun on loopback."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(RUN), "worker", job, json.dumps(asdict(task)), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(
                command, env=environment, timeout=timeout_s, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except subprocess.TimeoutExpired:
            return Outcome([], f"no result within {timeout_s:.0f} s")
        if done.returncode != 0:
            return Outcome([], _reason(done.stdout))
        return Outcome([json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)])


def report(folder: str, rank: int, record: Record) -> None:
    """Called by a worker: leaves its record where `launch` looks for it."""
    (Path(folder) / f"{rank}.json").write_text(json.dumps(record))


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout stays the table."""
    print(text, file=sys.stderr, flush=True)


def _reason(log: str) -> str:
    if os.environ.get("BENCH_VERBOSE"):
        say(log)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # of another rank's error; and the line of a traceback that raises it, whose text comes below
    consequences = ("ChildFailed", "Connection closed by peer", "PeerLost", " raise ")
    errors = [line for line in lines if "Error" in line and not any(word in line for word in consequences)]
    return (errors[:1] or lines[-1:] or ["no output"])[0][:300]
