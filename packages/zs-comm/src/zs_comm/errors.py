"""The errors of the zs packages, named by who is at fault.

User mistakes are ``ValueError``; faults of the world are ``TimeoutError`` and ``ConnectionError``. Every message
carries the facts that a reader of one rank's log needs, because that is often the only log there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class ZsError(Exception):
    """Base of every error that the zs packages raise."""


class ConfigError(ZsError, ValueError):
    """A bad value, or a rule between values that does not hold: names the path, the value, and what is allowed."""

    problems: tuple[object, ...] = ()  # one for each thing wrong, where several were found at once (zs_comm.config)
    where: str = ""  # file:line:column of a text that could not be parsed


class MissingPackage(ZsError, ImportError):
    """A feature needs an optional package: says which, and the command that installs it."""

    def __init__(self, feature: str, needs: str, install: str | None = None) -> None:
        self.feature = feature
        self.needs = needs
        self.install = install or f"pip install {needs}"
        super().__init__(
            f"{feature} needs the package {needs}, which is not installed; install it with: {self.install}"
        )

    def __reduce__(self) -> tuple[type[MissingPackage], tuple[str, str, str]]:
        return type(self), (self.feature, self.needs, self.install)


class RankDisagreement(ZsError, RuntimeError):
    """Ranks came with different values, or with different calls: every rank's side of it is in the message."""


@dataclass(frozen=True, kw_only=True)
class CommFacts:
    """What is known about a collective that did not finish. Ranks are global ranks."""

    op: str
    label: str = ""
    axis: str = "world"
    nbytes: int = 0
    members: tuple[int, ...] = ()
    seconds: float = 0.0
    arrived: tuple[int, ...] = ()  # ranks whose part of this collective had come in
    missing: tuple[int, ...] = ()  # ranks whose part had not
    lost: tuple[int, ...] = ()  # ranks whose connection is closed and who left no word
    last_calls: dict[int, tuple[str, ...]] = field(
        default_factory=dict
    )  # by rank; a rank without an entry left no word


class CommError(ZsError):
    """Base of the errors of an unfinished collective; ``facts`` holds what the message says."""

    def __init__(self, message: str, facts: CommFacts | None = None) -> None:
        super().__init__(message, facts)
        self.facts = facts

    def __str__(self) -> str:
        return str(self.args[0])


class CommTimeout(CommError, TimeoutError):
    """A collective did not finish in time: op, axis, bytes, members, seconds, which ranks arrived, the last calls."""


class PeerLost(CommError, ConnectionError):
    """The connection to a peer closed, most often because its process died: same facts as :class:`CommTimeout`."""
