"""A short sweep of chunk size and depth, and the `aio` section that comes out of it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from .bench import Buffers, Rate, fill, run, scratch_file
from .engine import Engine

CHUNKS = (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20)
DEPTHS = (4, 8, 16, 32)
_CLOSE = 0.98  # of the best: the disk's own noise


@dataclass(frozen=True)
class Point:
    """One setting and how it did, in GB/s."""

    chunk_nbytes: int
    depth: int
    read: float
    write: float

    @property
    def both(self) -> float:
        """GB/s where as much is written as is read, one after the other."""
        return 2 / (1 / self.read + 1 / self.write)


def sweep(
    folder: str, nbytes: int, rounds: int, backend: str | None, say: Callable[[str, int], Callable[[int], None]]
) -> list[Point]:
    """Measure every setting on one file in the folder, in `rounds` passes over all of them, so that what else the disk
    does falls on each alike. `say(label, nbytes)` is called before each measurement, its result with bytes done."""
    settings = [(chunk, depth) for chunk in CHUNKS for depth in DEPTHS if chunk <= nbytes]
    settings = settings or [(CHUNKS[0], DEPTHS[0])]
    rates: dict[tuple[int, int], dict[str, list[Rate]]] = {setting: {"read": [], "write": []} for setting in settings}
    buffers = Buffers(nbytes)
    with scratch_file(folder) as path:
        with Engine(backend=backend) as engine:
            fill(engine, path, nbytes, buffers, say("preparing", nbytes))
        for _ in range(rounds):
            for chunk, depth in settings:
                with (
                    Engine(backend=backend, chunk_nbytes=chunk, depth=depth) as engine,
                    engine.open(path, "r+") as file,
                ):
                    for operation in ("read", "write"):
                        label = f"{operation} {chunk >> 10} KiB x {depth}"
                        rate = run(file, operation, nbytes, buffers, say(label, nbytes))
                        rates[chunk, depth][operation].append(rate)
    return [
        Point(chunk, depth, *(median(rate.gb_per_s for rate in found[side]) for side in ("read", "write")))
        for (chunk, depth), found in rates.items()
    ]


def best(points: list[Point]) -> Point:
    """The fastest; of those that are as good as it, the one with the fewest bytes in flight."""
    most = max(point.both for point in points)
    return min(
        (point for point in points if point.both >= _CLOSE * most),
        key=lambda point: (point.chunk_nbytes * point.depth, point.depth),
    )


def section(point: Point) -> dict[str, int | bool]:
    """With DeepSpeed's keys, bytes and numbers."""
    return {
        "block_size": point.chunk_nbytes,
        "queue_depth": point.depth,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
    }


def load_config(path: str, *, merge: bool) -> dict[str, Any]:
    """What is in the file that the section is to go into; nothing where there is no file.

    Raises `ValueError` where there is one and `merge` is not asked for, or where it is no JSON object.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder")
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        if not os.access(folder, os.W_OK | os.X_OK):  # found out now, not after the sweep
            raise ValueError(f"{path}: the folder {folder} is missing or not writable")
        return {}
    if not merge:
        raise ValueError(f"{path} exists: --merge puts the aio section into it")
    with open(path, encoding="utf-8") as file:
        try:
            found = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("aio", {}), dict):
        raise ValueError(f"{path} is no DeepSpeed configuration: an object is needed, its aio section an object too")
    return found


def dump(config: dict[str, Any], found: dict[str, int | bool]) -> str:
    """`config` with the section; keys of it that are not tuned stay."""
    return json.dumps({**config, "aio": {**config.get("aio", {}), **found}}, indent=2) + "\n"


def save(path: str, text: str) -> None:
    """Replace the file in one step: an interrupted run leaves the old one."""
    beside = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
