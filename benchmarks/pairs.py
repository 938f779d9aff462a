"""Two systems that take turns on a device that is never twice the same: A B A B ... A, compared within each pair.

A pair is one run of B and the two runs of A around it; it counts where those two are within `tolerance` of each other,
so that what is compared happened on the same device. The others are discarded, and counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

Run = dict[str, float]  # what a run gives; "rate" (GB/s) is what the two runs of A are held against


@dataclass
class Pairs:
    """The pairs that count, and how many did not."""

    reference: list[Run] = field(default_factory=list)  # the mean of the two runs of A
    subject: list[Run] = field(default_factory=list)
    discarded: int = 0

    def ratios(self, key: str = "rate") -> list[float]:
        """B over A, pair by pair."""
        both = zip(self.subject, self.reference, strict=True)
        return [b[key] / a[key] for b, a in both if a[key] > 0]


def alternate(a: Callable[[], Run], b: Callable[[], Run], *, wanted: int, most: int, tolerance: float) -> Pairs:
    """Take turns until `wanted` pairs count, `most` runs of B at the longest."""
    pairs, before = Pairs(), a()
    for _ in range(most):
        if len(pairs.subject) >= wanted:
            break
        subject, after = b(), a()
        if abs(after["rate"] - before["rate"]) > tolerance * min(after["rate"], before["rate"]):
            pairs.discarded += 1
        else:
            pairs.reference.append({key: (before[key] + after[key]) / 2 for key in before})
            pairs.subject.append(subject)
        before = after
    return pairs


def interval(values: list[float], *, level: float = 0.95, resamples: int = 4000) -> tuple[float, float]:
    """Of the median, by bootstrap; the same for the same values."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(resamples))
    tail = int(resamples * (1 - level) / 2)
    return medians[tail], medians[-1 - tail]
