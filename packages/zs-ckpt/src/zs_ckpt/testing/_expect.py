"""Checks that raise under `python -O` too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def expect(condition: object, message: str) -> None:
    """Raise AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


@contextlib.contextmanager
def raises(*kinds: type[BaseException], doing: str) -> Iterator[None]:
    """The body raises one of these."""
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        yield
    except kinds:
        return
    except BaseException as error:
        raise AssertionError(f"{doing} raised {type(error).__name__} ({error}), not {names}") from error
    raise AssertionError(f"{doing} raised nothing; {names} is due")
