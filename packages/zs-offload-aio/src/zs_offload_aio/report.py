"""What people see: a progress bar, tables, and sizes as they are written and read."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from time import monotonic
from typing import TextIO

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of `64k`, `1M`, `2GiB`, `4096` (units of 1024). Raises `ValueError` for anything else and for zero."""
    found = re.fullmatch(r"(\d+)([kmgt]?)(ib|b)?", text.strip().lower())
    nbytes = int(found[1]) * _UNITS[found[2]] if found else 0
    if nbytes < 1 or nbytes > 1 << 60:
        raise ValueError(f"{text!r} is no size: write 4096, 64k, 1M or 2G")
    return nbytes


def show_size(nbytes: int) -> str:
    """`1 MiB` for 1048576; in bytes where it is no whole number of units."""
    for name, unit in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as needed; what starts with a digit is to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        shown = [
            cell.rjust(width) if number and cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(shown).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


class Progress:
    """One line that is drawn over itself; nothing at all where the stream is no terminal."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = max(total, 1)  # bytes
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._done = 0
        self._began = self._drawn = monotonic()

    def add(self, nbytes: int) -> None:
        """So many more bytes are done."""
        self._done += nbytes
        now = monotonic()
        if not self._shown or now - self._drawn < 0.1:
            return
        self._drawn = now
        part = min(1.0, self._done / self._total)
        rate = self._done / max(now - self._began, 1e-9) / 1e9
        bar = "#" * round(30 * part)
        self._stream.write(f"\r{self._label:<24} [{bar:<30}] {part:4.0%} {rate:6.2f} GB/s")
        self._stream.flush()

    def close(self) -> None:
        """Leave the line empty."""
        if self._shown:
            self._stream.write("\r" + " " * 80 + "\r")
            self._stream.flush()
