"""What is tortured: saves of a step into a folder, and loads that say which step is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Nothing(Exception):
    """The folder has no checkpoint."""


@dataclass(frozen=True)
class Scenario:
    """One way to save; `keep` and `io` are zs_ckpt's."""

    name: str
    tag: str = "checkpoint"  # with {step}: a new one each time
    first: bool = False  # nothing was saved before
    asynchronous: bool = False
    keep: int | None = None
    io: str = "threads"
    world: int = 1

    def long(self, step: int) -> bool:
        """Saves that are killed are of odd steps, and shorter than what they replace."""
        return step % 2 == 0


class System(Protocol):
    name: str
    commit: str  # the file whose rename is the commit; "" where there is none
    scenarios: Sequence[Scenario]

    def prepare(self) -> None:
        """In the child, before the save begins."""

    def save(self, folder: Path, step: int, scenario: Scenario, group: Any = None) -> None: ...

    def load(self, folder: Path) -> int:
        """The step found there. Raises `Nothing`, `Torn`, or what the system raises for damage."""

    def valid(self, folder: Path) -> int:
        """How many checkpoints in the folder load."""

    def leftovers(self, folder: Path) -> list[str]:
        """Files that belong to no committed checkpoint."""


def make(name: str) -> System:
    """A system by name; the peers are in `peers.py`."""
    if name == "zs":
        from .ours import Zs

        return Zs()
    from . import peers

    return peers.SYSTEMS[name]()
