"""Sections `{"type": ..., "params": {...}}` that name a class, and the callable that makes its object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from pydantic import Field

from .config import Problem, config_error, did_you_mean
from .errors import ConfigError
from .keys import DeepSpeedSection


def classes_of(module: ModuleType, base: type) -> dict[str, type]:
    """The public classes in `module` that derive from `base`, by name."""
    return {
        name: cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and not name.startswith("_")
    }


class TypeAndParams(DeepSpeedSection):
    """A class by its name, and keyword arguments; "auto" among them leaves one out."""

    type: str | None = None
    params: dict[str, Any] | None = Field(default=None, description="the class's keyword arguments")

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that are not "auto"."""
        return {key: value for key, value in (self.params or {}).items() if value != "auto"}

    def factory(self) -> Callable[[Any], Any] | None:
        """`callable(first)`, which makes the object; None where no type is given."""
        raise NotImplementedError

    def problems(self, first: Callable[[], Any], *rules: Callable[[Any], None]) -> Iterator[Problem]:
        """What is wrong, with paths in this section. `rules` see what `first()` makes, unless a value is "auto"."""
        try:
            make = self.factory()
            if make is not None and self.given == (self.params or {}):
                made = make(first())
                for rule in rules:
                    rule(made)
        except ConfigError as error:
            found = [problem for problem in error.problems if isinstance(problem, Problem)]
            yield from found or [Problem((), str(error))]

    def maker(
        self, what: str, classes: Mapping[str, Callable[..., Any]], name: str, params: Mapping[str, Any]
    ) -> Callable[[Any], Any]:
        """`callable(first)`, which makes `classes[name](first, **params)`; lists become tuples.

        `what` it is ("optimizer", "scheduler") is for messages.

        Raises:
            ConfigError: now, for an unknown name or parameter or a missing one ("auto" counts as there); from the
                callable, for values that the class refuses. `problems` name the key in this section.
        """
        if name not in classes:
            raise _problem(f"unknown {what} {name!r}{did_you_mean(name, list(classes))}", "type")
        _first, *accepted = inspect.signature(classes[name]).parameters.values()
        names = [parameter.name for parameter in accepted]
        for key in params:
            if key not in names:
                raise _problem(f"{name} takes no such parameter{did_you_mean(key, names)}", "params", key)
        for parameter in accepted:
            if parameter.default is parameter.empty and parameter.name not in {*params, *(self.params or ())}:
                raise _problem(f"{name} requires it", "params", parameter.name)
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}

        def make(first: Any) -> Any:
            try:
                return classes[name](first, **values)
            except (TypeError, ValueError) as error:
                raise _problem(f"{name}: {error}", "params") from error

        return make


def _problem(text: str, *path: str) -> ConfigError:
    return config_error([Problem(path, text)])
