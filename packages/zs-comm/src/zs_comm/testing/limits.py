"""A memory limit that the kernel enforces, counted from where a process stands when it enters it.

    with limited(300 << 20) as limit:     # after the imports: what is there already is not counted
        ...
    limit.peak_nbytes

    kind      what is limited                                          beyond it
    cgroup1   all memory first touched inside, and its page cache      page cache is dropped, then SIGKILL
    cgroup2   the same                                                 the same
    rlimit    private writable memory as it is mapped, cache excluded  MemoryError, std::bad_alloc

A control group is a new one below this process's own (beside it, where cgroup v2 allows no other), to which the process
moves. The kernel charges a page to the group of the process that touches it first, and does not take charges along: so
a fresh group begins at zero, with what was allocated and imported before left to the old one. Memory that was freed
before but is still mapped would count for neither; it is given back to the kernel first.

Linux only. Groups need root, or a group that was delegated to the user.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..resident import Resident, reset_peak, resident

Kind = Literal["cgroup1", "cgroup2", "rlimit"]

PREFIX = "zs-limit-"  # and the process's id: whoever started it can find its group


@dataclass
class MemoryLimit:
    """What is enforced, and what was used of it; both peaks stay readable after the limit is lifted."""

    nbytes: int
    kind: Kind
    _group: Path | None = None
    _before: Resident | None = None
    _peaks: tuple[int, int] | None = None  # once lifted

    @property
    def peak_nbytes(self) -> int:
        """The most that counted against the limit at once; of kind "rlimit" the growth of the resident set."""
        return self._read()[0]

    @property
    def peak_resident_nbytes(self) -> int:
        """How far the resident set grew at the most, without page cache and what is mapped from files."""
        return self._read()[1]

    def _read(self) -> tuple[int, int]:
        if self._peaks is not None:
            return self._peaks
        now = resident()
        grown = 0 if now is None or self._before is None else now.growth_since(self._before)
        peak = _peak(self._group) if self._group else None
        return (grown if peak is None else peak), grown


@dataclass(frozen=True)
class Finished:
    """How a command that limits itself came to its end."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    kills: int  # by the kernel, because the command's control group was full
    peak_nbytes: int | None  # of a group whose process never left it


def kinds() -> tuple[Kind, ...]:
    """What can be enforced on this machine by this user, the strictest first."""
    found: list[Kind] = []
    groups: tuple[Kind, ...] = ("cgroup1", "cgroup2")
    for kind in groups:
        with contextlib.suppress(OSError):
            _create(kind, f"{PREFIX}probe-{os.getpid()}").rmdir()
            found.append(kind)
    return (*found, "rlimit")


@contextlib.contextmanager
def limited(nbytes: int, *, kind: Kind | None = None) -> Iterator[MemoryLimit]:
    """This process, all its threads and the processes it starts inside may use `nbytes` more than it has now.

    Args:
        nbytes: bytes above what is in use on entering.
        kind: how (see above); None: the first of `kinds()`.

    Raises:
        ValueError: for a limit that is not positive, or an unknown kind.
        OSError: where the kind is not to be had here.
    """
    if nbytes <= 0:
        raise ValueError(f"a limit is a number of bytes above 0 (got {nbytes})")
    chosen = kinds()[0] if kind is None else kind
    if chosen not in ("cgroup1", "cgroup2", "rlimit"):
        raise ValueError(f"kind is cgroup1, cgroup2 or rlimit (got {kind!r})")
    _trim()
    if chosen == "rlimit":
        yield from _rlimited(nbytes)
        return
    collect()
    group = _create(chosen, f"{PREFIX}{os.getpid()}")
    try:
        _set_limit(group, nbytes)
        before = _own(chosen)
        reset_peak()
        limit = MemoryLimit(nbytes, chosen, group, resident())
        (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield limit
        finally:
            limit._peaks = limit._read()
            (before / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        _remove(group)


def run_limited(command: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command that enters `limited` itself, and say whether the kernel killed it for its memory.

    Raises:
        TimeoutError: with what it printed, after `timeout_s` seconds; it is killed.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise TimeoutError(f"{command[0]} did not end within {timeout_s:g} s:\n{out}{err}") from None
    finally:
        kills, peak = 0, None
        for group in _groups(f"{PREFIX}{process.pid}"):
            kills, peak = _kills(group), _peak(group)
            _remove(group)
    return Finished(process.returncode, out, err, time.monotonic() - began, kills, peak)


def collect() -> int:
    """Remove the groups of processes that are no more; returns how many."""
    removed = 0
    for group in _groups(f"{PREFIX}*"):
        pid = group.name.rpartition("-")[2]
        if not Path("/proc", pid).exists():
            removed += _remove(group)
    return removed


# ---- RLIMIT_DATA ----


def _rlimited(nbytes: int) -> Iterator[MemoryLimit]:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _mapped_data() + nbytes
    reset_peak()
    limit = MemoryLimit(nbytes, "rlimit", None, resident())
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield limit
    finally:
        limit._peaks = limit._read()
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# ---- control groups ----


def _own(kind: str) -> Path:
    """This process's group in the memory hierarchy of that version; OSError where there is none."""
    controller, wanted = ("memory", "cgroup") if kind == "cgroup1" else ("", "cgroup2")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") if controller else number == "0":
            for mount in Path("/proc/self/mounts").read_text().splitlines():
                _, where, system, options = mount.split()[:4]
                if system == wanted and (not controller or controller in options.split(",")):
                    found = Path(where, path.lstrip("/"))
                    # In a container the path may be that of the host, with the mount showing the group itself.
                    return found if found.is_dir() else Path(where)
    raise FileNotFoundError(f"{kind}: no memory controller is mounted")


def _create(kind: str, name: str) -> Path:
    """A group with a memory limit to be set; OSError where that is not allowed."""
    own = _own(kind)
    if kind == "cgroup1":
        group = own / name
        group.mkdir(exist_ok=True)
        return group
    with contextlib.suppress(OSError):  # busy: a group of cgroup v2 with processes in it has no groups with limits
        (own / "cgroup.subtree_control").write_text("+memory")
    for parent in (own, own.parent):
        group = parent / name
        group.mkdir(exist_ok=True)
        if (group / "memory.max").exists():
            return group
        group.rmdir()
    raise PermissionError(f"{kind}: {own} does not hand on its memory controller")


def _set_limit(group: Path, nbytes: int) -> None:
    if (group / "memory.max").exists():
        swap = group / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
        (group / "memory.max").write_text(str(nbytes))
        return
    (group / "memory.limit_in_bytes").write_text(str(nbytes))
    with contextlib.suppress(OSError):  # with swap accounting only: memory and swap together
        (group / "memory.memsw.limit_in_bytes").write_text(str(nbytes))


def _peak(group: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return None  # cgroup v2 before Linux 5.19


def _kills(group: Path) -> int:
    for name in ("memory.oom_control", "memory.events"):
        if (group / name).exists():
            counts = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


def _groups(pattern: str) -> Iterator[Path]:
    for kind in ("cgroup1", "cgroup2"):
        with contextlib.suppress(OSError):
            own = _own(kind)
            yield from [*own.glob(pattern), *own.parent.glob(pattern)]


def _remove(group: Path) -> bool:
    """A process that just ended may still be seen in it for a moment."""
    for _ in range(100):
        try:
            group.rmdir()
        except FileNotFoundError:
            return False
        except OSError:
            time.sleep(0.01)
        else:
            return True
    return False


# ---- this process ----


def _mapped_data() -> int:
    """Bytes that RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))


def _trim() -> None:
    """Free memory of the C library goes back to the kernel, so that using it again is counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
