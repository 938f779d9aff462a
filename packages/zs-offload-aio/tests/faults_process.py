"""Faults that stick to a process, so each is injected in a forked child: forbidden system calls, limits, another user.

    answer = in_child(work, argument)      runs work(argument) in a fork; its exception fails the test here

A child of a process with threads may only use what it makes itself: never an engine of its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import platform
import resource
import select
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

NOBODY = 65534

_LIBC = ctypes.CDLL(None, use_errno=True)
_AARCH64 = platform.machine() == "aarch64"
SYSCALLS = {  # x86_64, aarch64
    name: numbers[_AARCH64]
    for name, numbers in {
        "io_uring_setup": (425, 425),
        "io_setup": (206, 0),
        "fsync": (74, 82),
        "fdatasync": (75, 83),
        "clone": (56, 220),
        "clone3": (435, 435),
        "statx": (332, 291),
        "fallocate": (285, 47),
    }.items()
}


class ChildFailed(AssertionError):
    """What went wrong in a forked child: its traceback, or how it died."""


def fork() -> int:
    """`os.fork`, without the warning that newer Pythons give where the process has threads (torch's, say)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(work: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> Any:
    """What `work(*arguments)` returns in a forked child. Raises `ChildFailed` where it raised, died or hangs."""
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(reader)
        _run_and_exit(work, arguments, writer)
    os.close(writer)
    try:
        answer = _receive(reader, timeout_s)
    finally:
        os.close(reader)
    if answer is None and not _ended(pid, 1.0):
        os.kill(pid, signal.SIGABRT)  # pytest's faulthandler then says where each thread was
        if not _ended(pid, 2.0):
            os.kill(pid, signal.SIGKILL)
            _ended(pid, 5.0)
        raise ChildFailed(f"the child hung for {timeout_s} s")
    status = _status(pid)
    if answer is None:
        raise ChildFailed(f"the child died: {_describe(status)}")
    done, result = pickle.loads(answer)
    if not done:
        raise ChildFailed(f"in the child:\n{result}")
    if status:
        raise ChildFailed(f"the child did its work, then died: {_describe(status)}")
    return result


def _run_and_exit(work: Callable[..., Any], arguments: tuple[Any, ...], writer: int) -> None:
    try:
        answer = pickle.dumps((True, work(*arguments)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    payload = struct.pack("q", len(answer)) + answer
    while payload:
        payload = payload[os.write(writer, payload) :]
    os._exit(0)


def _receive(reader: int, timeout_s: float) -> bytes | None:
    """The child's answer; None where the pipe ends or the time is up before it is there."""
    deadline, received = time.monotonic() + timeout_s, b""
    while len(received) < 8 or len(received) < 8 + struct.unpack("q", received[:8])[0]:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(reader, 1 << 20) if ready else b""
        if not piece:
            return None
        received += piece
    return received[8:]


_STATUS: dict[int, int] = {}


def _ended(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while pid not in _STATUS:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _STATUS[pid] = status
        elif time.monotonic() > deadline:
            return False
        else:
            time.sleep(0.002)
    return True


def _status(pid: int) -> int:
    if pid not in _STATUS:
        return os.waitpid(pid, 0)[1]
    return _STATUS.pop(pid)


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# ---- to be called in a child: they cannot be taken back ----


def forbid(**answers: int) -> None:
    """Every later call of these system calls by this thread and its new threads is answered by an errno.

    `forbid(io_uring_setup=errno.EPERM)`: what a container's seccomp profile does, with a filter of our own.
    """
    load, jump_equal, answer, allow = 0x20, 0x15, 0x06, 0x7FFF0000
    program = [struct.pack("HBBI", load, 0, 0, 0)]  # the system call's number
    for name, number in answers.items():
        program.append(struct.pack("HBBI", jump_equal, 0, 1, SYSCALLS[name]))
        program.append(struct.pack("HBBI", answer, 0, 0, 0x00050000 | number))
    program.append(struct.pack("HBBI", answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _must(_LIBC.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _must(_LIBC.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0), "PR_SET_SECCOMP")


def forbid_threads() -> None:
    """No later thread and no later process; glibc then reports EAGAIN for `pthread_create`."""
    forbid(clone3=errno.ENOSYS, clone=errno.EAGAIN)


def limit_file_size(nbytes: int) -> None:
    """Files cannot grow past this: what a full disk looks like. The signal that would come with it is ignored."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def become_nobody(memlock_nbytes: int = 8 << 20) -> None:
    """Drop root: an ordinary user with the usual limit on locked memory."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock_nbytes, memlock_nbytes))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def exhaust_files(left: int = 0) -> list[int]:
    """Open descriptors until only `left` are free."""
    soft = len(os.listdir("/proc/self/fd")) + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    taken: list[int] = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    for _ in range(left):
        os.close(taken.pop())
    return taken


def limit_memory(more_nbytes: int) -> None:
    """At most this much more address space than there is now."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_nbytes, now + more_nbytes))


def exhaust_aio_contexts() -> list[int]:
    """Take the machine's last Linux AIO contexts (`aio-max-nr`); they come back when the process ends."""
    taken: list[int] = []
    nr_events = 32768
    while nr_events:
        context = ctypes.c_ulong(0)
        if _LIBC.syscall(SYSCALLS["io_setup"], nr_events, ctypes.byref(context)) == 0:
            taken.append(context.value)
        elif ctypes.get_errno() == errno.EAGAIN:
            nr_events //= 2
        else:
            raise OSError(ctypes.get_errno(), "io_setup")
    return taken


@contextlib.contextmanager
def signal_storm(interval_s: float = 0.0005) -> Iterator[list[int]]:
    """SIGALRM over and over, to the whole process; yields the list that holds the number of those that came."""
    came = [0]

    def handler(_number: int, _frame: object) -> None:
        came[0] += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, interval_s, interval_s)
    try:
        yield came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _must(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
