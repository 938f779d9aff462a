"""What the rank server imports before it forks anything: imports only, never a tensor operation.

A thread pool, an autograd engine or a CUDA context that existed before the fork would be broken in
every rank. Importing is safe, and it is where the seconds are.
"""

from __future__ import annotations

import importlib
import os

# torch._dynamo is what building any torch optimizer imports; pytest is what most test files import.
DEFAULT = ("torch", "torch.distributed", "torch._dynamo", "zs_comm", "zs_comm.testing._rank", "pytest")
OPTIONAL_SIBLINGS = ("zs_zero",)
EXTRA = "ZS_RANKS_PRELOAD"  # comma-separated names of further modules


def preload() -> None:
    extra = tuple(name for name in os.environ.get(EXTRA, "").split(",") if name)
    for name in DEFAULT + OPTIONAL_SIBLINGS + extra:
        try:
            importlib.import_module(name)
        except Exception:  # absent, or broken: the rank that needs it will say so with its own traceback
            continue


preload()
