"""Which rank this process is, from the environment, and the process group to go with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from .errors import CommFacts, CommTimeout, ConfigError
from .group import DEFAULT_TIMEOUT_S, Group, as_group
from .hostlist import expand_hostlist, expand_tasks_per_node

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """This process's place among the ranks of a job.

    ``local_rank`` and ``local_world`` count the processes on this host. ``master_addr`` and ``master_port`` name the
    rendezvous; None where the environment does not say.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    source: Literal["torchrun", "slurm", "openmpi", "none"] = "none"
    master_addr: str | None = None
    master_port: int | None = None


def discover(environ: Mapping[str, str] = os.environ) -> RankEnv:
    """Read this process's rank from the variables of torchrun, SLURM (``srun``) or OpenMPI (``mpirun``), in that order.

    Without any of them this is rank 0 of 1.

    Raises:
        ConfigError: the variables contradict each other or are incomplete; the message names them.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _torchrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        return _openmpi(environ)
    # inside salloc, SLURM_NTASKS is set although nothing was started by srun: the rank decides
    if "SLURM_PROCID" in environ:
        return _slurm(environ)
    return RankEnv()


def init_distributed(
    backend: str | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    init_method: str | None = None,
    store: Store | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> Group:
    """Join the ranks of this job; returns the group of all of them.

    A process group that exists is used as it is. One process without rank variables needs none and gets none. With CUDA
    the device of this process is set from its local rank.

    Args:
        backend: default "cpu:gloo,cuda:nccl" with a GPU, otherwise "gloo".
        timeout_s: the bound of the rendezvous and of every later wait in the group.
        init_method: torch's URL, where the environment does not say ("tcp://host:port", "file:///...").
        store: a rendezvous store instead; needs ``rank`` and ``world``.
        rank: this process's rank; default from the environment.
        world: the number of ranks; default from the environment.

    Raises:
        ConfigError: rank variables or arguments that contradict each other.
        CommTimeout: not all ranks came in time.
    """
    if dist.is_initialized():
        return as_group(None, "world", timeout_s=timeout_s)
    if (rank is None) != (world is None):
        raise ConfigError(f"rank is {rank} and world is {world}: give both or neither")
    env = discover() if rank is None else None
    if env is not None:
        rank, world = env.rank, env.world
        if torch.cuda.is_available() and env.source != "none":
            torch.cuda.set_device(env.local_rank % torch.cuda.device_count())
    if rank is None or world is None:
        raise ConfigError("the rank is unknown")
    _check_rank(rank, world, "rank", "world")
    if env is not None and world == 1 and store is None and init_method is None:
        return Group("world", timeout_s=timeout_s)
    if store is None and init_method is None:
        init_method = _init_method(env)
    _join(backend, init_method, store, rank, world, timeout_s)
    return as_group(None, "world", timeout_s=timeout_s)


def shutdown() -> None:
    """Leave the process group, if there is one. Safe to call twice, and after an error."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _join(
    backend: str | None, init_method: str | None, store: Store | None, rank: int, world: int, timeout_s: float
) -> None:
    where: dict[str, Any] = {"init_method": init_method} if store is None else {"store": store}
    if init_method != "env://":
        where |= {"rank": rank, "world_size": world}
    try:
        dist.init_process_group(
            backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"),
            timeout=timedelta(seconds=timeout_s),
            **where,
        )
    except (dist.DistError, RuntimeError) as error:
        text = str(error)
        if not any(sign in text.lower() for sign in ("timed out", "timeout", "clients joined")):
            raise
        raise CommTimeout(
            f"init_distributed: not all of the {world} ranks came in {timeout_s:.0f} s (this is rank {rank}): {text}",
            CommFacts(op="init_distributed", members=tuple(range(world)), seconds=timeout_s),
        ) from error


def _init_method(env: RankEnv | None) -> str:
    if env is None:
        raise ConfigError("rank and world are given without a store or an init_method to meet at")
    if env.source == "torchrun":
        if env.master_addr is None or env.master_port is None:
            missing = [
                name
                for name, value in (("MASTER_ADDR", env.master_addr), ("MASTER_PORT", env.master_port))
                if value is None
            ]
            raise ConfigError(f"WORLD_SIZE is {env.world} but {' and '.join(missing)} not set; start with torchrun")
        return "env://"  # and so torchrun's own store is used, where it offers one
    if env.master_addr is None:
        raise ConfigError(
            f"{env.source}: {env.world} ranks on several hosts and no MASTER_ADDR; pass it on "
            "(mpirun -x MASTER_ADDR=host)"
        )
    return f"tcp://{env.master_addr}:{env.master_port or DEFAULT_PORT}"


def _torchrun(environ: Mapping[str, str]) -> RankEnv:
    rank, world = _pair(environ, "RANK", "WORLD_SIZE")
    local_rank, local_world = rank, world
    if "LOCAL_RANK" in environ:
        local_rank = _integer(environ, "LOCAL_RANK")
        local_world = _integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else max(local_rank + 1, 1)
        _check_rank(local_rank, local_world, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return RankEnv(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        source="torchrun",
        master_addr=environ.get("MASTER_ADDR"),
        master_port=_port(environ),
    )


def _openmpi(environ: Mapping[str, str]) -> RankEnv:
    rank, world = _pair(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    local_rank, local_world = rank, world
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environ or "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        local_rank, local_world = _pair(environ, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return RankEnv(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        source="openmpi",
        master_addr=environ.get("MASTER_ADDR") or ("127.0.0.1" if local_world == world else None),
        master_port=_port(environ) or DEFAULT_PORT,
    )


def _slurm(environ: Mapping[str, str]) -> RankEnv:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    rank, world = _pair(environ, "SLURM_PROCID", size_name)
    local_rank = _integer(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else 0
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return RankEnv(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=max(_slurm_local_world(environ, world), local_rank + 1),
        source="slurm",
        master_addr=environ.get("MASTER_ADDR") or (expand_hostlist(nodes)[0] if nodes else "127.0.0.1"),
        master_port=_port(environ) or _slurm_port(environ),
    )


def _slurm_local_world(environ: Mapping[str, str], world: int) -> int:
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if counts:
        tasks = expand_tasks_per_node(counts)
        node = int(environ.get("SLURM_NODEID", "0"))
        return tasks[node] if node < len(tasks) else tasks[-1]
    if environ.get("SLURM_NTASKS_PER_NODE", "").isdigit():
        return int(environ["SLURM_NTASKS_PER_NODE"])
    return world if environ.get("SLURM_NNODES", "1") == "1" else 1


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port that all tasks of a job agree on and that differs between the jobs of a host."""
    job = environ.get("SLURM_JOB_ID", "")
    return 15000 + int(job) % 15000 if job.isdigit() else DEFAULT_PORT


def _pair(environ: Mapping[str, str], rank_name: str, world_name: str) -> tuple[int, int]:
    for name, other in ((rank_name, world_name), (world_name, rank_name)):
        if name not in environ:
            raise ConfigError(f"{other}={environ[other]} is set but {name} is not; ranks need both")
    rank, world = _integer(environ, rank_name), _integer(environ, world_name)
    _check_rank(rank, world, rank_name, world_name)
    return rank, world


def _check_rank(rank: int, world: int, rank_name: str, world_name: str) -> None:
    if not 0 <= rank < world:
        raise ConfigError(f"{rank_name}={rank} is not a rank of {world_name}={world}")


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name}={environ[name]!r} is not a whole number") from None


def _port(environ: Mapping[str, str]) -> int | None:
    if "MASTER_PORT" not in environ:
        return None
    port = _integer(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT={port} is not a port (1 to 65535)")
    return port
