"""Writes the golden checkpoints of the format's current version: `python make.py`. Once for each version.

What is there already is never written again: a checkpoint of an old version is the proof that it still loads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import zs_ckpt
import zs_comm
from zs_ckpt.manifest import VERSION
from zs_comm.testing import run_ranks

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import values  # noqa: E402


def save(group: zs_comm.Group, folder: str) -> None:
    state = {"loose": values.loose(), "cut": values.Cut(group.rank, group.size, values.cut(), values.own(group.rank))}
    tag = values.TAGS[group.size - 1]
    zs_ckpt.save(folder, state, tag=tag, group=group, client_state=values.values(), step=values.STEP, io="threads")


def main() -> None:
    folder = HERE / f"v{VERSION}"
    if folder.exists():
        raise SystemExit(f"{folder} is there already")
    for world in range(1, values.WORLD + 1):
        run_ranks(save, world, str(folder))
    for lock in folder.glob("*/lock"):
        lock.unlink()


if __name__ == "__main__":
    main()
