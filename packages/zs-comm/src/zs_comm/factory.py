"""Sections `{"type": ..., "params": {...}}` that name a class, and the callable that makes its object."""

from __future__ import annotations

import abc
import collections.abc
import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from pydantic import Field

from .config import Problem, config_error, did_you_mean, shown, within
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

    @abc.abstractmethod
    def factory(self) -> Callable[[Any], Any] | None:
        """`callable(first)`, which makes the object; None where no type is given."""

    def ready(self, section: str) -> Callable[[Any], Any] | None:
        """`factory()` for use now: its errors, and those of what it returns, have paths that begin with `section`.

        Raises:
            ConfigError: as `factory`; and for a parameter without a default that still is "auto".
        """
        with within(section):
            make = self.factory()
            required = self.model_copy(update={"params": self.given})._required() if self.type else ()
            text = '"auto" has to be filled in by the caller (it has no default)'
            found = [Problem(("params", key), text) for key in self.params or {} if key in required]
            if found:
                raise config_error(found)
        return make and within(section)(make)

    def problems(self, first: Callable[[], Any], *rules: Callable[[Any], object]) -> Iterator[Problem]:
        """What is wrong, with paths in this section: of each parameter alone, or else of them together.

        `rules` see what is made of `first()`, which gives a new one at each call. A parameter that is "auto" has its
        default then, or a large number where it has none.
        """
        if self.type is None:
            return
        found = self._refused(self.factory)
        yield from found
        if any(len(problem.path) < 2 for problem in found):
            return
        bad = {problem.path[1] for problem in found}
        given = {key: value for key, value in self.given.items() if key not in bad}
        trial = functools.partial(self._trial, first=first, rules=rules)
        together = trial(given)
        if any(problem.path != ("params",) for problem in together):
            yield from together
            return
        for key in given if together else ():
            alone = trial({key: given[key]})
            if alone and [problem.text for problem in alone] != [problem.text for problem in trial({})]:
                bad.add(key)
        # what needs a sibling to be right fails alone too: it is right where all but the others that fail are beside it
        wrong = [key for key in given if key in bad and trial({k: v for k, v in given.items() if k not in bad - {key}})]
        for key in wrong:
            yield from (self._at(key, problem) for problem in trial({key: given[key]}))
        given = {key: value for key, value in given.items() if key not in wrong}
        together = trial(given)
        if together and not (wrong and trial({})):
            others = {key: {name: value for name, value in given.items() if name != key} for key in given}
            blamed = next((key for key in given if not trial(others[key])), None)
            yield from (self._at(blamed, problem) if blamed else problem for problem in together)

    def _trial(
        self, params: Mapping[str, Any], first: Callable[[], Any], rules: Sequence[Callable[[Any], object]]
    ) -> list[Problem]:
        """What is wrong with these parameters; others that are required are filled in."""

        def made() -> None:
            missing = dict.fromkeys(self.model_copy(update={"params": dict(params)})._required(), _FILLED)
            make = self.model_copy(update={"params": {**params, **missing}}).factory()
            result = make(first()) if make is not None else None
            for rule in rules if make is not None else ():
                rule(result)

        return self._refused(made)

    def _required(self) -> Sequence[str]:
        """The parameters without which there is no object."""
        return [str(problem.path[-1]) for problem in self._refused(self.factory) if problem.text.endswith(_REQUIRED)]

    @staticmethod
    def _refused(call: Callable[[], object]) -> list[Problem]:
        """The problems of the ConfigError that a call raises."""
        try:
            call()
        except ConfigError as error:
            return [problem for problem in error.problems if isinstance(problem, Problem)] or [Problem((), str(error))]
        return []

    def _at(self, key: str, problem: Problem) -> Problem:
        """A problem of some parameter, known to be this one's."""
        got = "" if "(got " in problem.text else f" (got {shown(self.given[key])})"
        text = problem.text.replace(f" {key}: ", " ", 1) + got
        return dataclasses.replace(problem, path=("params", key), text=text)

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
            default = known[key].default
            kinds = _kinds(hints.get(key), default)
            value = [value] if value is _FILLED and kinds == {list} else value
            wanted = _wanted(kinds, default, value)
            whole = isinstance(value, float) and int in kinds and float not in kinds and not wanted
            values[key] = tuple(value) if isinstance(value, list) else int(value) if whole else value
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
            except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
                raise _problem(f"{name}: {error}", "params") from error

        return make


def _hints(made: Any) -> Mapping[str, Any]:
    source = typing.cast(Any, made).__init__ if isinstance(made, type) else made
    try:
        return typing.get_type_hints(source, localns=vars(collections.abc))
    except (AttributeError, NameError, TypeError):
        return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kinds(hint: Any, default: Any = None) -> set[Any]:
    """The classes of an annotation (of a union's members; those of its constants), or of a default where it has none.

    Any: it cannot be said.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is None:
        kinds: dict[type, set[Any]] = {
            bool: {bool},
            int: {float},
            float: {float},
            str: {str},
            tuple: {list},
            list: {list},
        }
        return {float, list} if default is inspect.Parameter.empty else kinds.get(type(default), {Any})
    if origin is typing.Annotated:
        return _kinds(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return {kind for part in arguments for kind in _kinds(part)}
    if origin is typing.Literal:
        return set(map(type, arguments))
    kind = hint if origin is None else origin
    return {list} if kind in (tuple, Sequence, Iterable) else {kind if isinstance(kind, type) else Any}


def _wanted(kinds: set[Any], default: Any, value: Any) -> str:
    """What a parameter of these kinds takes, where the value is plainly something else."""
    fixed = default if isinstance(default, tuple) else ()
    if Any in kinds or (value is None and default is None) or (isinstance(value, float) and value == default):
        return ""
    if isinstance(value, list | tuple) and list in kinds:
        numbers = [one for one in value if one is not None or None not in fixed]
        count = f"{len(fixed)} " if fixed else ""
        fits = all(map(_is_number, numbers)) and len(value) == (len(fixed) or len(value))
        finite = "" if not fits or all(map(math.isfinite, numbers)) else "finite "
        return "" if fits and not finite else f"an array of {count}{finite}numbers"
    if _is_number(value) and kinds & {int, float}:
        if not -math.inf < value < math.inf:
            return "a finite number"
        return "" if float in kinds or value == int(value) else "a whole number"
    if isinstance(value, tuple(kinds - {int, float, list})):
        return ""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "an array"}
    names |= {list: f"an array of {len(fixed)} numbers"} if fixed else {}
    return " or ".join(name for kind, name in names.items() if kind in kinds) or "left out: no JSON value can be one"


def _problem(text: str, *path: str) -> ConfigError:
    return config_error([Problem(path, text)])
