"""Medians with their range, and Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).resolve().parent / "results"


def spread(values: Iterable[float], digits: int = 3, scale: float = 1.0) -> str:
    """`median (least-most)`, or the one value; a dash when there is none."""
    xs = [value * scale for value in values]
    if not xs:
        return "-"
    middle, least, most = (f"{f(xs):.{digits}f}" for f in (median, min, max))
    return middle if least == most else f"{middle} ({least}-{most})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [_row(header), "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *(_row(row) for row in rows)])


def megabytes(nbytes: float, digits: int = 0) -> str:
    return f"{nbytes / 1e6:.{digits}f}"


def save(name: str, text: str) -> Path:
    """Write `benchmarks/results/<name>.md`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text.rstrip() + "\n")
    return path


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
