"""What the command line shows: tables, sizes, a bar, and the comparison of two checkpoints."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

import torch
from zs_comm import ZsError

from .boxes import Box
from .dtypes import dtype_name
from .latest import newest, serials
from .manifest import Manifest, StoredTensor, parse_manifest
from .names import MANIFEST
from .retention import invalid
from .sealed import read_sealed
from .snapshot import Snapshot

_CHUNK = 16 << 20  # bytes of a tensor that are compared at a time


class Bar:
    """A line on stderr that shows how far it is; nothing where that is no terminal. A context manager."""

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self._what, self._stream = what, sys.stderr if stream is None else stream
        self._shown = -1
        self._on = self._stream.isatty()

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        if self._on and percent != self._shown:
            self._shown = percent
            filled = "#" * (percent * 30 // 100)
            self._stream.write(f"\r{self._what} [{filled:<30}] {percent:3d} % of {size(total)}")
            self._stream.flush()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown >= 0:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def size(nbytes: int) -> str:
    """`1.30 GB`: powers of ten, as disks are sold."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns as wide as their widest cell; those named in `right` are aligned to the right."""
    lines = [list(head), *(list(map(str, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = [">" if name in right.split() else "<" for name in head]
    made = ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(line, aligned, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(made)


def listing(root: Path) -> list[tuple[str, ...]]:
    """A row for each tag, newest first; damaged ones say what is wrong."""
    committed, first = serials(root), ""
    with contextlib.suppress(ZsError):  # a damaged one may be the newest: there is none to mark then
        first = newest(root)
    rows = []
    for tag in committed:
        problem = invalid(root / tag)
        cells: tuple[str, ...] = ("", "", "", "")
        try:
            path = root / tag / MANIFEST
            manifest = parse_manifest(read_sealed(path)[0], path)
            count = len(manifest.tensors) + sum(map(len, manifest.rank_tensors))
            step = "" if manifest.step is None else str(manifest.step)
            cells = (step, str(manifest.world), str(count), size(manifest.nbytes))
        except (ValueError, OSError) as error:
            problem = problem or error
        rows.append(("*" if tag == first else "", tag, *cells, "ok" if problem is None else str(problem)))
    return rows


def tensors(manifest: Manifest, pattern: str | None = None) -> list[tuple[str, ...]]:
    """A row for each tensor, those of one rank alone behind the others."""
    rows: list[tuple[str, ...]] = []
    for name, stored in _all(manifest):
        if pattern is None or fnmatchcase(name, pattern):
            files = len({piece.file for piece in stored.pieces})
            shape = " x ".join(map(str, stored.spec.shape)) or "scalar"
            dtype = dtype_name(stored.spec.dtype)
            rows.append((name, shape, dtype, size(stored.nbytes), str(len(stored.pieces)), str(files)))
    return rows


def summary(manifest: Manifest) -> str:
    """The last line of `inspect`."""
    step = "" if manifest.step is None else f"step {manifest.step}, "
    objects = f"objects: {', '.join(manifest.objects) or 'none'}"
    count = len(manifest.tensors) + sum(map(len, manifest.rank_tensors))
    ranks = "1 rank" if manifest.world == 1 else f"{manifest.world} ranks"
    return f"{manifest.tag}: {step}saved by {ranks}, {count} tensors, {size(manifest.nbytes)}; {objects}"


def differences(a: Snapshot, b: Snapshot, bar: Bar) -> list[tuple[str, str]]:
    """What the checkpoints do not have in common: names, shapes, dtypes, values, objects. Not how they are cut."""
    mine, theirs = dict(_all(a.manifest)), dict(_all(b.manifest))
    rows = [(name, f"only in {a.folder}") for name in mine if name not in theirs]
    rows += [(name, f"only in {b.folder}") for name in theirs if name not in mine]
    both = [name for name in mine if name in theirs]
    done, total = 0, sum(mine[name].nbytes for name in both)
    for name in both:
        left, right = mine[name].spec, theirs[name].spec
        if left.shape != right.shape:
            rows.append((name, f"shape {left.shape} and {right.shape}"))
        else:
            rows += [(name, text) for text in _values(a, b, name, mine[name], theirs[name])]
        done += mine[name].nbytes
        bar(done, total)
    for what in ("objects", "client_state"):
        rows += _parts(what, getattr(a.manifest, what), getattr(b.manifest, what))
    return rows


def _all(manifest: Manifest) -> Iterator[tuple[str, StoredTensor]]:
    yield from manifest.tensors.items()
    for rank, own in enumerate(manifest.rank_tensors):
        for name, stored in own.items():
            yield f"rank{rank}/{name}", stored


def _values(a: Snapshot, b: Snapshot, name: str, left: StoredTensor, right: StoredTensor) -> Iterator[str]:
    if left.spec.dtype != right.spec.dtype:
        yield f"{dtype_name(left.spec.dtype)} and {dtype_name(right.spec.dtype)}"
        return
    rank = int(name.partition("/")[0].removeprefix("rank")) if name not in a.manifest.tensors else None
    unequal, most = 0, 0.0
    for box in _chunks(left):
        one = a.read(left.spec.name, box, rank=rank).reshape(-1)
        two = b.read(right.spec.name, box, rank=rank).reshape(-1)
        bits = [value.view(torch.uint8).view(-1, value.dtype.itemsize) for value in (one, two)]
        other = (bits[0] != bits[1]).any(dim=1)  # bit by bit: a zero has a sign, and a NaN is itself
        unequal += int(other.sum())
        gap = (one[other].to(torch.complex128) - two[other].to(torch.complex128)).abs()
        most = max([most, *gap[~gap.isnan()].tolist()])
    if unequal:
        yield f"{unequal} of {left.nbytes // left.spec.dtype.itemsize} values, by {most:.3g} at most"


def _chunks(stored: StoredTensor) -> Iterator[Box]:
    """The tensor in boxes of whole rows, of about 16 MiB each."""
    shape = stored.spec.shape
    if not shape or not stored.nbytes:
        yield tuple((0, extent) for extent in shape)
        return
    rows = max(1, _CHUNK * shape[0] // stored.nbytes)
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *((0, extent) for extent in shape[1:]))


def _parts(path: str, left: Any, right: Any) -> list[tuple[str, str]]:
    """The places where two JSON values differ."""
    if type(left) is type(right) and isinstance(left, dict):
        found = []
        for key in sorted({*left, *right}):
            if key not in left or key not in right:
                found.append((f"{path}.{key}", "only in the " + ("first" if key in left else "second")))
            else:
                found += _parts(f"{path}.{key}", left[key], right[key])
        return found
    if left == right:
        return []
    return [(path, f"{_short(left)} and {_short(right)}")]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
