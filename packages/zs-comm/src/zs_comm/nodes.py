"""Which of a job's nodes this is, from SLURM's variables or a hostfile: for launchers that run once on each node."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .hostlist import expand_hostlist
from .launch import DEFAULT_PORT


@dataclass(frozen=True, kw_only=True)
class Node:
    """This node: number `index` of `count`. `slots`: the processes to start here, None where nobody says."""

    count: int = 1
    index: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    slots: int | None = None


def from_slurm(environ: Mapping[str, str] = os.environ) -> Node | None:
    """The node of a SLURM job step, None outside SLURM.

    Raises:
        ConfigError: several nodes and no sign of which one this is, or several tasks of this step on one node.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes:
        return None
    hosts = expand_hostlist(nodes)
    once = "start it once on each node: srun --ntasks-per-node=1 ..."
    if len(hosts) > 1 and "SLURM_PROCID" not in environ:
        raise ConfigError(f"SLURM gave this job {len(hosts)} nodes, and this process is not one of srun's: {once}")
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", len(hosts))) > len(hosts):
        raise ConfigError(f"SLURM runs {environ['SLURM_STEP_NUM_TASKS']} tasks on {len(hosts)} nodes: {once}")
    job, gpus = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_GPUS_ON_NODE", "")
    return Node(
        count=len(hosts),
        index=int(environ.get("SLURM_NODEID", "0")) if "SLURM_PROCID" in environ else 0,
        master_addr=environ.get("MASTER_ADDR") or hosts[0],
        # the nodes of a job agree on it, and two jobs on one node rarely meet
        master_port=int(environ.get("MASTER_PORT") or (15000 + int(job) % 15000 if job.isdigit() else DEFAULT_PORT)),
        slots=int(gpus) if gpus.isdigit() and int(gpus) > 0 else None,
    )


def from_hostfile(path: str | os.PathLike[str], *, index: int | None = None) -> Node:
    """The node that a hostfile (`host slots=N` on each line, `#` comments) calls by a name or address of this machine.

    Args:
        index: this node's number, where no line is recognisable.

    Raises:
        ConfigError: an unreadable line, a host twice, no host, or none (or several) that is this machine.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the hostfile {os.fspath(path)!r}: {error.strerror}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or slots == words[-1] or int(slots) == 0:
            raise ConfigError(f"{os.fspath(path)}:{number}: expected 'host slots=N' (got {line.strip()!r})")
        if words[0] in hosts:
            raise ConfigError(f"{os.fspath(path)}:{number}: host {words[0]!r} is there twice")
        hosts[words[0]] = int(slots)
    names = list(hosts)
    if index is None:
        mine = [number for number, host in enumerate(names) if _is_here(host)]
        if len(mine) != 1:
            found = "none" if not mine else ", ".join(names[number] for number in mine)
            raise ConfigError(
                f"{os.fspath(path)}: which host is {socket.gethostname()!r}? ({found}); give the node's number"
            )
        index = mine[0]
    if not 0 <= index < len(names):
        raise ConfigError(f"{os.fspath(path)}: node number {index} of {len(names)} hosts")
    return Node(count=len(names), index=index, master_addr=names[0], slots=hosts[names[index]])


def _is_here(host: str) -> bool:
    name = socket.gethostname()
    if host in ("localhost", "127.0.0.1", name, name.split(".")[0], socket.getfqdn()):
        return True
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))  # only possible with an address of this machine
    except OSError:
        return False
    return True
