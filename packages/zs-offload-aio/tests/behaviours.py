"""What a file engine must do, by number: the rows of the matrix that the suite prints; why one may not apply.

Every row holds for every backend: either the exact bytes, or a typed exception with file, offset and errno.
"""

from __future__ import annotations

BACKENDS = ("io_uring", "libaio", "threads", "plain")

ROWS = {
    1: "no space in the middle of a write",
    2: "no space is found at reserve time",
    3: "short write: completed or raised",
    4: "short read, truncated file",
    5: "EIO on read",
    6: "EIO/ENOSPC on write-back; fsync sticky",
    7: "EINTR, EAGAIN, partial submission",
    8: "O_DIRECT refused at open",
    9: "O_DIRECT accepted but buffered",
    10: "device with 4096-byte sectors",
    11: "backend forbidden: the next one",
    12: "no privileges, 8 MiB memlock",
    13: "any address, offset and length",
    14: "zero and one byte, empty list",
    15: "over 2 and 4 GiB, end of int64",
    16: "non-contiguous memory",
    17: "read into read-only memory",
    18: "a view touches only its bytes",
    19: "source changed during a write",
    20: "buffer, file dropped in flight",
    21: "overlapping transfers are ordered",
    22: "32 threads: exactly once",
    23: "fork with transfers in flight",
    24: "interpreter exit in flight",
    25: "Ctrl-C during wait",
    26: "cancel",
    27: "no leak over 10,000 transfers",
    28: "EMFILE, ENOMEM, aio-max-nr",
    29: "permissions, missing, directory",
    31: "hostile names in the store",
}

# Why a test cannot apply to a backend. Nothing else takes a test out of the matrix.
REASONS = {
    "no batch": "it submits one transfer at a time",
    "same as threads": "it needs what the thread backend needs, so nothing falls back to it",
    "root": "it needs root, and this user is another",
    "left out": "left out with --zs-backends",
}

# (test function, backend) -> key of REASONS
CANNOT_APPLY: dict[tuple[str, str], str] = {
    ("test_partial_submission", "threads"): "no batch",
    ("test_partial_submission", "plain"): "no batch",
    ("test_next_backend_is_chosen", "plain"): "same as threads",
}
