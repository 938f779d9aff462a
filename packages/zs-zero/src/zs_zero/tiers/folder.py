"""A folder for the files of one engine's rank, so that several engines and jobs share a disk.

    <nvme_path>/zs-tiers/.lock                             held while folders are claimed, collected and removed
    <nvme_path>/zs-tiers/<job>/engine<k>/rank<r>/lock      held (flock) for as long as its owner lives
    <nvme_path>/zs-tiers/<job>/engine<k>/rank<r>/...       the owner's files

A lock goes with its process, however that ends, so a folder that is not locked is nobody's: whoever starts next
collects it. Claiming, collecting and removing happen under the tree's own lock, so that none meets another half way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Iterator

from zs_comm import ConfigError, Group, ZsError, agree, agreed, exchange, same_everywhere

log = logging.getLogger("zs_zero")

TREE = "zs-tiers"
_LOCK = "lock"
_CLOSE_S = 10.0  # an end of a process is not held up for longer
_JOB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_ENGINE = re.compile(r"engine(\d{1,9})")
_RANK = re.compile(r"rank(\d{1,9})")


class FolderInUse(ZsError, OSError):
    """A folder of this name is locked by a living process. `filename`: the folder; `pid`: who holds it, where known."""

    pid: int | None = None


class TierFolder:
    """This rank's own folder, empty and locked; every rank of `group` makes one at the same time.

    `path`: an existing folder (the last part of it is created where it is missing), the same for all ranks or not.
    `job`: names what runs, so that two runs of one name refuse each other; None: a name that nobody else has. Engines
    of one process and one job number themselves. Folders below `path` that no living process holds are removed.

    Raises `OSError` with the path (`FileNotFoundError`, `NotADirectoryError`, `PermissionError`, ...), `FolderInUse`,
    or `ConfigError` for a `job` that is no name; what one rank finds is an error on all.
    """

    def __init__(self, path: str, *, job: str | None, group: Group, timeout_s: float = 120.0) -> None:
        _check_job(job, group)
        self.rank = group.members[group.rank]  # the world's: groups of one mesh share a disk
        self.first = group.rank == 0
        self.job = exchange(_own_name().encode(), group, label="tier folder")[0].decode() if job is None else job
        doing = "a folder for offloaded state"  # the same on all ranks, the path may not be
        tree = _Tree(path, timeout_s)
        with agreed(group, doing):
            tree.make()
        self.engine = 0 if job is None else self._number(tree, group, doing)
        held: _Held | None = None
        failure: Exception | None = None
        try:
            with tree.locked():
                tree.collect()
                held = tree.claim(self.job, self.engine, self.rank)
                self._finalizer = weakref.finalize(self, held.release)  # who forgets to close leaves nothing either
        except Exception as error:
            failure = error
        try:
            agree(group, failure, what=doing)
        except Exception:
            if held is not None:
                held.release()
            raise
        if held is None:
            raise RuntimeError("a tier folder was neither claimed nor refused")
        self.path = held.path
        self.said: set[str] = set()  # what was logged once for this engine
        self._held = held

    def _number(self, tree: _Tree, group: Group, doing: str) -> int:
        """The first engine number that no rank's process holds for this job already."""
        number = 0
        while True:
            mine = number
            with agreed(group, doing), tree.locked():
                while tree.held_by_this_process(self.job, mine, self.rank):
                    mine += 1
            votes = [int(vote) for vote in exchange(str(mine).encode(), group, label="tier folder")]
            number = max(votes)
            if len(set(votes)) == 1:
                return number

    def close(self) -> None:
        """Remove the folder, with its empty parents up to `path`, and give up the lock. May be called again.

        Never raises: what cannot be removed is logged, and collected by the next start. In a forked child nothing is
        removed.
        """
        self._finalizer()

    def __enter__(self) -> TierFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Held:
    """A claimed folder: its path and the open lock."""

    def __init__(self, tree: _Tree, path: str, fd: int) -> None:
        self.tree = tree
        self.path = path
        self.fd = fd
        self.owner = os.getpid()
        # a child that outlives this process (a loader's worker) must not keep its lock alive
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(this))

    def drop(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def release(self) -> None:
        if os.getpid() != self.owner:
            return self.drop()
        if self.fd < 0:
            return None
        try:
            for name in os.listdir(self.path):  # the space goes back whoever holds the tree
                if name != _LOCK:
                    _remove(os.path.join(self.path, name))
            with self.tree.locked(_CLOSE_S):
                _remove(self.path)
                self.drop()
                self.tree.prune(os.path.dirname(self.path))
        except OSError as error:  # the disk is gone, or somebody removed the tree
            if error.errno != errno.ENOENT:
                log.warning("%s is not removed: %s", self.path, error)
        finally:
            self.drop()


def _let_go(held: weakref.ref[_Held]) -> None:
    found = held()
    if found is not None:
        found.drop()


class _Tree:
    """All folders below one path."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.parent = os.path.abspath(path)
        self.root = os.path.join(self.parent, TREE)
        self.timeout_s = timeout_s

    def make(self) -> None:
        """Create what may be created, and find out whether files can be made."""
        if not os.path.isdir(self.parent):
            if os.path.lexists(self.parent):
                raise NotADirectoryError(errno.ENOTDIR, "this is no folder", self.parent)
            try:
                os.mkdir(self.parent)
            except FileExistsError:
                pass  # another rank was faster
            except FileNotFoundError as error:
                text = "neither this folder nor the one above it exists: is the disk mounted?"
                raise FileNotFoundError(errno.ENOENT, text, self.parent) from error
        with self.locked():
            pass

    @contextlib.contextmanager
    def locked(self, timeout_s: float | None = None) -> Iterator[None]:
        """Alone in the tree. Its lock is removed when the tree is empty."""
        timeout_s = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        deadline = time.monotonic() + timeout_s
        path = os.path.join(self.root, ".lock")
        while True:
            fd = self._take_lock(path)
            if fd is not None:
                break
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"another process held this lock for {timeout_s} s", path)
            time.sleep(0.005)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(self.root) == [".lock"]:
                    os.unlink(path)
                    os.rmdir(self.root)
            os.close(fd)

    def _take_lock(self, path: str) -> int | None:
        """The tree's open lock, or None where somebody has it, or removed it between our opening and locking it."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.root, 0o700)
        _check_own(self.root)
        try:
            fd = _open_lock(path)
        except FileNotFoundError:
            if not os.path.isdir(self.parent):
                raise
            return None
        try:
            if _take(fd, path) and _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _path(self, job: str, engine: int, rank: int) -> str:
        return os.path.join(self.root, job, f"engine{engine}", f"rank{rank}")

    def held_by_this_process(self, job: str, engine: int, rank: int) -> bool:
        path = os.path.join(self._path(job, engine, rank), _LOCK)
        try:
            fd = _open_lock(path, create=False)
        except OSError:
            return False
        try:
            return not _take(fd, path) and os.read(fd, 4096).decode(errors="replace") == _this_process()
        finally:
            os.close(fd)

    def claim(self, job: str, engine: int, rank: int) -> _Held:
        """A new folder, locked; the tree must be."""
        path = self._path(job, engine, rank)
        at = self.root
        for part in (job, f"engine{engine}", f"rank{rank}"):
            at = os.path.join(at, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(at, 0o700)
            _check_own(at)
        fd = _open_lock(os.path.join(path, _LOCK))
        try:
            if not _take(fd, os.path.join(path, _LOCK)):
                raise _in_use(path, os.read(fd, 4096).decode(errors="replace"))
            os.ftruncate(fd, 0)
            os.pwrite(fd, _this_process().encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return _Held(self, path, fd)

    def collect(self) -> None:
        """Remove every folder that nobody holds; the tree must be locked. What is not ours to remove stays."""
        for job in _folders(self.root, _JOB):
            for engine in _folders(job, _ENGINE):
                for rank in _folders(engine, _RANK):
                    try:
                        self._collect(rank)
                    except OSError as error:
                        log.warning("a dead process left %s, which cannot be removed: %s", rank, error)
                with contextlib.suppress(OSError):
                    os.rmdir(engine)
            with contextlib.suppress(OSError):
                os.rmdir(job)

    def _collect(self, folder: str) -> None:
        path = os.path.join(folder, _LOCK)
        try:
            fd = _open_lock(path, create=False)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EISDIR):
                raise
            return _remove(folder)  # its process died between two calls, or this is no lock that we made
        try:
            if _take(fd, path):
                _remove(folder)
        finally:
            os.close(fd)

    def prune(self, folder: str) -> None:
        """Remove empty folders from here up to the tree's root."""
        while folder.startswith(self.root + os.sep):
            try:
                os.rmdir(folder)
            except OSError:
                return
            folder = os.path.dirname(folder)


def _check_job(job: str | None, group: Group) -> None:
    same_everywhere(repr(job), group, what="the name of the job (aio.zs_job)")
    if job is not None and not _JOB.fullmatch(job):
        raise ConfigError(f"job {job!r}: letters, digits, '.', '_' and '-', at most 128, the first no '.' and no '-'")


def _own_name() -> str:
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64]
    return f"run-{host}-{os.getpid()}-{secrets.token_hex(8)}"


def _this_process() -> str:
    """What a lock's file says of its holder; the start time tells it from a process of the same number elsewhere."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            born = file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        born = "unknown"
    return f"{os.getpid()} {socket.gethostname()} {born}"


def _in_use(path: str, holder: str) -> FolderInUse:
    pid, _, rest = holder.partition(" ")
    host = rest.partition(" ")[0]
    who = f"process {pid} on {host}" if pid.isdigit() else "a living process"
    text = f"{who} holds this folder: end it, or give this run another name (job) or another folder (nvme_path)"
    error = FolderInUse(errno.EBUSY, text, path)
    error.pid = int(pid) if pid.isdigit() else None
    return error


def _open_lock(path: str, *, create: bool = True) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.open(path, flags, 0o600)


def _take(fd: int, path: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(error.errno, f"files here cannot be locked: {error.strerror}", path) from error
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _check_own(path: str) -> None:
    """A link here would make somebody else's folder ours to empty."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "this is no folder (links are not followed here)", path)


def _folders(path: str, pattern: re.Pattern[str]) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [e.path for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _remove(path: str) -> None:
    """What is there, a folder with its content; links are removed, not followed. Nothing happens where it is gone."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
