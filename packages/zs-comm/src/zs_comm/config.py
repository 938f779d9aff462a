"""The base of every package's configuration section, and the one way to validate them.

A section is a frozen pydantic model that refuses unknown keys. `validate` reports every problem of a
configuration at once, each with its path and, for a file, its line and column:

    ds_config.json:4:14: zero_optimization.stage: Input should be 0, 1, 2 or 3 (got 4)
    ds_config.json:5:5: zero_optimization.reduce_bucket_sise: unknown key; did you mean 'reduce_bucket_size'?
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, ValidationInfo, field_validator
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from zs_comm.errors import ConfigError
from zs_comm.jsonfile import KeyPath, Source

S = TypeVar("S", bound="Section")
NOT_THERE = "not_there_yet"  # the type of pydantic's error where a value asks for a feature that is not there


class Section(BaseModel):
    """A section of the configuration: frozen, unknown keys refused, defaults checked.

    Values are taken as JSON means them: a whole number may be written 5e8, but "3" is no number, 1 is
    no boolean and true is no number.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_json_means_it(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if any(isinstance(mark, ByteSize) for mark in field.metadata):
            return value
        accepted = _Accepted.by(field.annotation)
        return accepted.taken(value) if accepted else value


@dataclass(frozen=True)
class ByteSize:
    """Field metadata: a number of bytes, an integer or a string such as "2GiB" (1024-based) or "500MB" (1000-based).

    buffer: Annotated[int, ByteSize(), Field(ge=1)] = 2**20
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(byte_size, handler(source))


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?", re.IGNORECASE)


def byte_size(value: Any) -> int:
    """Bytes from an integer or a string: 4096, 1e9, "2GiB", "64 MiB", "500MB", "1.5GiB".

    Raises:
        ValueError: neither.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is not None and (match[2] or not match[3]):
            value = float(match[1]) * (1024 if match[3] else 1000) ** " KMGTP".index(match[2].upper() or " ")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise PydanticCustomError("wrong_type", 'Input should be a number of bytes, or a string such as "2GiB"')
    if abs(value) >= 2**63:
        raise PydanticCustomError("wrong_type", "Input should be a number of bytes below 2**63")
    return value


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration. `str()` is its line in a message.

    kind: "unknown": there is no such key; "refused": the value asks for something that is not there; "invalid": the
    value is wrong, alone or beside others.
    """

    path: KeyPath
    text: str
    where: str = ""  # file:line:column
    kind: Literal["invalid", "refused", "unknown"] = "invalid"

    def __str__(self) -> str:
        name = dotted(self.path)
        return f"{self.where + ': ' if self.where else ''}{name + ': ' if name else ''}{self.text}"


def validate(section: type[S], data: Mapping[str, Any], *, path: str = "", source: Source | None = None) -> S:
    """Build a section from parsed JSON.

    path: dotted path of `data` inside the whole configuration, written before every key in messages.
    source: what `zs_comm.jsonfile.read_json` returned beside the data, for lines and columns.

    Raises:
        ConfigError: lists all problems; they are its `problems` too.
    """
    result, problems = check(section, data, path=path, source=source)
    if result is None:
        raise config_error(problems, source)
    return result


def check(
    section: type[S], data: Mapping[str, Any], *, path: str = "", source: Source | None = None
) -> tuple[S | None, tuple[Problem, ...]]:
    """As `validate`, but returns the problems, for callers that have rules of their own to add."""
    prefix: KeyPath = tuple(path.split(".")) if path else ()
    if not isinstance(data, Mapping):
        where = source.where(prefix) if source else ""
        return None, (Problem(prefix, f"Input should be an object (got {shown(data)})", where),)
    try:
        return section.model_validate(dict(data)), ()
    except ValidationError as error:
        return None, tuple(_problems(section, data, error.errors(include_url=False), prefix, source))


def config_error(problems: Sequence[Problem], source: Source | None = None) -> ConfigError:
    """One ConfigError for all problems, in the order of the file where there is one."""
    if source:
        problems = sorted(problems, key=lambda problem: [int(n) for n in problem.where.split(":")[-2:] if n.isdigit()])
    lines = [str(problem) for problem in problems]
    if len(lines) > 1:
        name = f" in {source.name}" if source else ""
        lines = [f"{len(lines)} problems{name}:", *(f"  {line}" for line in lines)]
    error = ConfigError("\n".join(lines))
    error.problems = tuple(problems)
    return error


@contextlib.contextmanager
def within(*path: str) -> Iterator[None]:
    """Problems of a ConfigError raised inside get `path` before their own; other errors stay what they are."""
    try:
        yield
    except ConfigError as error:
        found = [problem for problem in error.problems if isinstance(problem, Problem)]
        if not found:
            raise
        raise config_error([replace(problem, path=(*path, *problem.path)) for problem in found]) from error


def dotted(path: KeyPath) -> str:
    """`("optimizer", "betas", 0)` as `optimizer.betas[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for a key close to a known one, else an empty text."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(key.lower(), list(lowered), n=1, cutoff=0.7)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def _problems(
    section: type[Section],
    data: Mapping[str, Any],
    errors: Sequence[ErrorDetails],
    prefix: KeyPath,
    source: Source | None,
) -> Iterator[Problem]:
    """One problem per key: what a union's branches said of the same value is joined by "or"."""
    texts: dict[KeyPath, list[str]] = {}
    kinds: dict[KeyPath, Literal["invalid", "refused", "unknown"]] = {}
    got: dict[KeyPath, str] = {}
    for error in errors:
        path = _key_path(error, data)
        text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if error["type"] == "extra_forbidden":
            kinds[path] = "unknown"
            text = "unknown key" + _suggestion(section, path)
        elif error["type"] == "model_type":
            text = "Input should be an object"
            got[path] = f" (got {shown(error['input'])})"
        elif error["type"] == "missing":
            text = "this key is required"
        elif not isinstance(error["input"], Mapping) or text.startswith("Input should be"):
            got[path] = f" (got {shown(error['input'])})"
        if error["type"] == NOT_THERE:
            kinds[path] = "refused"
        heard = texts.setdefault(path, [])
        text = text.removeprefix("Input should be ") if heard else text
        if text not in heard and f"Input should be {text}" not in heard:
            heard.append(text)
    for path, heard in texts.items():
        full = prefix + path
        kind = kinds.get(path, "invalid")
        where = source.where(full, key=kind == "unknown") if source else ""
        yield Problem(full, " or ".join(heard) + got.get(path, ""), where, kind)


def _key_path(error: ErrorDetails, data: Any) -> KeyPath:
    """pydantic's location without the names of union branches and of validators, which are no keys."""
    path: KeyPath = ()
    for index, part in enumerate(error["loc"]):
        last = index == len(error["loc"]) - 1
        is_key = isinstance(data, Mapping) and part in data
        if is_key or (isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)):
            data = data[part]
        elif not (last and error["type"] == "missing"):
            continue
        path += (part,)
    return path


def _suggestion(section: type[Section], path: KeyPath) -> str:
    key = str(path[-1])
    owners: list[Any] = [section]
    for part in path[:-1]:
        owners = [inner for owner in owners for inner in inside(owner, part)]
    owner = next((owner for owner in owners if _is_section(owner)), None)
    if owner is None:
        return ""
    homes = [home for home in _homes(section, key) if home != path[:-1]]
    if () in homes:
        return "; it belongs at the top level"
    if 0 < len(homes) <= 3:  # a key that is everywhere says nothing
        return f"; it belongs in {', '.join(repr(dotted(home)) for home in homes)}"
    return did_you_mean(key, [*known_keys(owner), *owner.model_fields])


def known_keys(section: type[BaseModel]) -> Iterator[str]:
    """The keys a section takes: its fields' aliases, or their names."""
    for name, info in section.model_fields.items():
        yield info.alias or name


def inside(annotation: Any, key: str | int) -> Iterator[Any]:
    """The types that a key's value may have in a section, in a mapping of names to sections, or in a list."""
    if _is_section(annotation):
        for name, info in annotation.model_fields.items():
            if key in (name, info.alias):
                yield from _leaves(info.annotation)
    elif typing.get_origin(annotation) in (dict, list):
        yield from _leaves(typing.get_args(annotation)[-1])


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _homes(section: type[Section], key: str, path: KeyPath = ()) -> Iterator[KeyPath]:
    """This section and those inside it, as far as they have such a key."""
    fields = section.model_fields
    if key in fields or any(key == info.alias for info in fields.values()):
        yield path
    for name, info in fields.items():
        for inner in _leaves(info.annotation):
            if _is_section(inner):
                yield from _homes(inner, key, (*path, info.alias or name))


_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


@dataclass(frozen=True)
class _Accepted:
    """What a field's annotation takes, as far as JSON's scalars go."""

    kinds: frozenset[type]
    constants: tuple[Any, ...]  # of Literal
    others: tuple[str, ...]  # "an object", "an array"

    @classmethod
    def by(cls, annotation: Any) -> _Accepted | None:
        """None when it is pydantic's to say: Any, enums, types with validators of their own."""
        kinds: set[type] = set()
        constants: list[Any] = []
        others: list[str] = []
        for leaf in _leaves(annotation):
            origin = typing.get_origin(leaf) or leaf
            if leaf in _SCALARS:
                kinds.add(leaf)
            elif origin is typing.Literal:
                constants += typing.get_args(leaf)
            elif isinstance(origin, type) and issubclass(origin, BaseModel | Mapping):
                others.append("an object")
            elif isinstance(origin, type) and issubclass(origin, list | tuple | set | frozenset):
                others.append("an array")
            elif leaf is not type(None):
                return None
        return cls(frozenset(kinds), tuple(constants), tuple(others))

    def taken(self, value: Any) -> Any:
        """The value, a whole float as the int it means; raises for one of the wrong kind."""
        if type(value) not in _SCALARS:
            kind = "an object" if isinstance(value, Mapping) else "an array" if isinstance(value, list) else ""
            if not kind or kind in self.others:
                return value
        ints = int in self.kinds or any(type(constant) is int for constant in self.constants)
        if isinstance(value, float) and value.is_integer() and ints and float not in self.kinds:
            value = int(value)
        if type(value) is int and float not in self.kinds and abs(value) >= 2**63:
            raise PydanticCustomError("wrong_type", "Input should be a whole number below 2**63")
        if type(value) in self.kinds or (type(value) is int and float in self.kinds):
            return value
        if any(type(value) is type(constant) and value == constant for constant in self.constants):
            return value
        names = [repr(constant) for constant in self.constants]
        names += [name for kind, name in _SCALARS.items() if kind in self.kinds]
        names += dict.fromkeys(self.others)
        wanted = " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
        raise PydanticCustomError("wrong_type", "Input should be {wanted}", {"wanted": wanted})


def _leaves(annotation: Any) -> Iterator[Any]:
    """The members of a union (nested, optional, annotated), or the annotation itself."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _leaves(part)
    elif origin is typing.Annotated:
        kind, *marks = typing.get_args(annotation)
        if any(isinstance(mark, ByteSize) for mark in marks):
            yield annotation  # reads its values itself
        else:
            yield from _leaves(kind)
    else:
        yield annotation


def shown(value: Any, limit: int = 80) -> str:
    """A value as a message shows it: JSON, cut after `limit` characters."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
