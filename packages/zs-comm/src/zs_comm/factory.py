"""Sections `{"type": ..., "params": {...}}` that name a class, and the callable that makes its object."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from pydantic import Field

from .config import Problem, config_error, did_you_mean, shown, wrong_kind
from .errors import ConfigError
from .keys import DeepSpeedSection

_FILLED = 1_000_000
_REQUIRED = "requires it"


def classes_of(module: ModuleType, base: type) -> dict[str, type]:
    """The public classes in `module` that derive from `base`, by name."""
    return {
        name: cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and not name.startswith("_")
    }


class TypeAndParams(DeepSpeedSection):
    """A class by its name, and keyword arguments; "auto" among them leaves one out."""

    type: str | None = Field(default=None, description="the class's name")
    params: dict[str, Any] | None = Field(default=None, description="the class's keyword arguments")

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that are not "auto"."""
        return {key: value for key, value in (self.params or {}).items() if value != "auto"}

    def factory(self) -> Callable[[Any], Any] | None:
        """`callable(first)`, which makes the object; None where no type is given."""
        raise NotImplementedError

    def problems(self, first: Callable[[], Any], *rules: Callable[[Any], object]) -> Iterator[Problem]:
        """What is wrong, with paths in this section. `rules` see what `first()` makes.

        A parameter that is "auto" has its default then, or a large number where it has none.
        """
        try:
            self.factory()
            made = self._trial(self.given, first)
            for rule in rules if made is not None else ():
                rule(made)
        except ConfigError as error:
            found = [problem for problem in error.problems if isinstance(problem, Problem)]
            yield from map(functools.partial(self._blamed, first=first), found or [Problem((), str(error))])

    def _trial(self, params: Mapping[str, Any], first: Callable[[], Any]) -> Any:
        """What the factory makes with these parameters."""
        autos = [key for key in self.params or {} if key not in self.given]
        required = self.model_copy(update={"params": dict(params)})._required() if self.type else ()
        filled = {**params, **{key: _FILLED for key in autos if key in required}}
        make = self.model_copy(update={"params": filled}).factory()
        return make(first()) if make is not None else None

    def _required(self) -> Sequence[str]:
        """The parameters without which there is no object."""
        try:
            self.factory()
        except ConfigError as error:
            return [str(p.path[-1]) for p in error.problems if isinstance(p, Problem) and p.text.endswith(_REQUIRED)]
        return ()

    def _blamed(self, problem: Problem, *, first: Callable[[], Any]) -> Problem:
        """The problem at the one parameter without which there is none."""
        if problem.path != ("params",):
            return problem
        for key in self.given:
            try:
                self._trial({name: value for name, value in self.given.items() if name != key}, first)
            except ConfigError:
                continue
            got = "" if "(got " in problem.text else f" (got {shown(self.given[key])})"
            text = problem.text.replace(f" {key}: ", " ", 1) + got
            return dataclasses.replace(problem, path=("params", key), text=text)
        return problem

    def maker(
        self, what: str, classes: Mapping[str, Callable[..., Any]], name: str, params: Mapping[str, Any]
    ) -> Callable[[Any], Any]:
        """`callable(first)`, which makes `classes[name](first, **params)`; lists become tuples.

        `what` it is ("optimizer", "scheduler") is for messages.

        Raises:
            ConfigError: now, for an unknown name, and for every parameter that is unknown, missing ("auto" counts as
                there) or no such value; from the callable, for values that the class refuses. `problems` name the
                key in this section.
        """
        if name not in classes:
            raise _problem(f"unknown {what} {name!r}{did_you_mean(name, list(classes))}", "type")
        _first, *accepted = inspect.signature(classes[name]).parameters.values()
        known = {parameter.name: parameter for parameter in accepted}
        hints = _hints(classes[name])
        found: list[Problem] = []
        values: dict[str, Any] = {}
        autos = [key for key, value in (self.params or {}).items() if value == "auto"]
        for key in [key for key in (*params, *autos) if key not in known]:
            text = f"{name} takes no such parameter{did_you_mean(key, list(known))}"
            found.append(Problem(("params", key), text, kind="unknown"))
        for key, value in params.items():
            if key not in known:
                continue
            values[key] = tuple(value) if isinstance(value, list) else value
            wanted = _wanted(known[key], hints.get(key), value)
            if wanted:
                found.append(Problem(("params", key), f"Input should be {wanted} (got {shown(value)})"))
        there = {*params, *(self.params or ())}
        missing = [one.name for one in accepted if one.default is one.empty and one.name not in there]
        found += [Problem(("params", key), f"{name} {_REQUIRED}") for key in missing]
        if found:
            raise config_error(found)

        def make(first: Any) -> Any:
            try:
                return classes[name](first, **values)
            except (TypeError, ValueError) as error:
                raise _problem(f"{name}: {error}", "params") from error

        return make


def _hints(made: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(made.__init__)
    except (AttributeError, NameError, TypeError):
        return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wanted(parameter: inspect.Parameter, hint: Any, value: Any) -> str:
    """What a parameter takes, where the value is plainly something else; judged by its default, or its annotation."""
    default = parameter.default
    number = _is_number(value)
    if isinstance(value, list) and not all(map(_is_number, value)):
        return "an array of numbers"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float) or default is parameter.empty:
        return "" if number or isinstance(value, list) else "a number"
    if isinstance(default, tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(default)
        return "" if fits else f"an array of {len(default)} numbers"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a string"
    return wrong_kind(hint, value) if hint is not None and value is not None else ""


def _problem(text: str, *path: str) -> ConfigError:
    return config_error([Problem(path, text)])
