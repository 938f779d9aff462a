"""Assertions that survive `python -O` and say which behaviour is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

Subject = TypeVar("Subject")


def expect(held: bool, what: str) -> None:
    """Raise `AssertionError(what)` unless `held`."""
    if not held:
        raise AssertionError(what)


@contextmanager
def refused(*kinds: type[Exception], what: str) -> Iterator[None]:
    """The body must raise one of `kinds`."""
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        yield
    except kinds:
        return
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__}({error}), not {names}") from error
    raise AssertionError(f"{what} does not raise {names}")


def run_checks(
    checks: list[Callable[[Subject], None]], fresh: Callable[[], Subject], end: Callable[[Any], None]
) -> None:
    """Run each check on a subject of its own; an `AssertionError` is prefixed with the check's one-line docstring."""
    for check in checks:
        subject = fresh()
        try:
            check(subject)
            end(subject)
        except Exception as error:
            with suppress(Exception):
                end(subject)
            law = (check.__doc__ or check.__name__).strip().splitlines()[0]
            raise AssertionError(f"{type(subject).__name__} breaks the rule {law!r}: {error}") from error
