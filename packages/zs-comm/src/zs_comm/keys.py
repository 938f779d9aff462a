"""What becomes of each key of a DeepSpeed configuration, so that none is silently ignored.

A key is honoured; equivalent (mapped, with a note); harmless here (accepted, with a note); refused with a reason;
unknown; or invalid. Sections say so field by field, in `Annotated` metadata:

    class ZeroConfig(DeepSpeedSection):
        stage: Literal[0, 1, 2, 3] = 0                                                  # honoured
        overlap_comm: Annotated[bool, Note("equivalent", "communication always overlaps")] = True
        zenflow: Annotated[Any, Later("ZenFlow is not there yet")] = None               # harmless or refused
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from zs_comm.config import NOT_THERE, Problem, Section, check, dotted, inside, shown
from zs_comm.jsonfile import KeyPath, Source

S = TypeVar("S", bound=Section)
_SWITCHES = ("enabled", "device", "shared_parameters")
_NOTHING = "asks for nothing"


def asks_for_nothing(value: object, default: object = None) -> bool:
    """Whether a value leaves its feature off.

    Null, false, "auto", empty, `{"enabled": false}`, `{"device": "none"}`, or the feature's default.
    """
    if value is None or (value is False and default is not True) or value in ("auto", "", [], {}):
        return True
    if isinstance(value, Mapping):
        inner: Mapping[str, object] = default if isinstance(default, Mapping) else {}
        for switch in _SWITCHES:
            if switch in value:
                chosen = value[switch]
                return chosen == "none" or asks_for_nothing(chosen, inner.get(switch))
        return all(asks_for_nothing(part, inner.get(key)) for key, part in value.items())
    if isinstance(value, str) and isinstance(default, str):
        return value.lower() == default.lower()
    return value == default and isinstance(value, bool) == isinstance(default, bool)


@dataclass(frozen=True)
class Note:
    """Field metadata: the class of an accepted key, and why."""

    verdict: Literal["equivalent", "harmless"]
    text: str
    loud: bool = False  # say it as a warning where the value asks for something


@dataclass(frozen=True)
class Later:
    """Field metadata of a key whose feature is not there: refused with `reason` unless its value asks for nothing.

    The value must be one that the key takes all the same.
    """

    reason: str
    default: Any = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def _check(self, value: Any, valid: Any) -> Any:
        if value is None or value == self.default:
            return self.default
        if valid(value) == self.default or asks_for_nothing(value, self.default):
            return self.default
        raise PydanticCustomError(NOT_THERE, "{reason}", {"reason": self.reason})


class DeepSpeedSection(Section):
    """A section in which null and `"auto"` mean the default, and a field with an alias answers to both names."""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _auto_is_default(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {name for key, info in cls.model_fields.items() for name in (key, info.alias)}
        return {key: value for key, value in data.items() if key not in known or not (value is None or value == "auto")}


def examine(section: type[S], data: Any, source: Source | None = None) -> tuple[S, list[Problem]]:
    """Every problem of a configuration, and a model of what has none (for rules between keys)."""
    if not isinstance(data, Mapping):
        text = f"the configuration should be an object (got {shown(data)})"
        return section(), [Problem((), text, source.name if source else "")]
    problems = list(_strange(data, (), source))
    data = pruned(data, [problem.path for problem in problems])
    problems += _twice(section, data, (), source)
    config, found = check(section, pruned(data, [problem.path for problem in problems]), source=source)
    problems += found
    if config is None:
        left = pruned(data, [problem.path for problem in problems])
        config, found = check(section, left)
        if config is None:  # a rule of a whole section
            config, _ = check(section, pruned(left, [problem.path[:1] for problem in found]))
    return config or section(), problems


def fatal(problems: Sequence[Problem], unknown_keys: str = "error") -> list[Problem]:
    """The problems that are errors: all, or with "warn" those that are not about an unknown key."""
    return [problem for problem in problems if problem.kind != "unknown" or unknown_keys != "warn"]


def tolerant(find: Callable[..., Any], data: Any, source: Source | None, unknown_keys: str) -> Any:
    """What `find(data, source)` returns, a tuple with the problems last; of the rest alone where unknown keys may stay.

    They are among the problems all the same; and what stands beside one is judged too.
    """
    *found, problems = find(data, source)
    unknown = [problem for problem in problems if problem.kind == "unknown"]
    if unknown_keys == "warn" and unknown:
        *found, problems = find(pruned(data, [problem.path for problem in unknown]), source)
        problems = [*unknown, *problems]
    return (*found, problems)


def pruned(data: Mapping[str, Any], paths: Sequence[KeyPath]) -> dict[str, Any]:
    """A copy of `data` without the keys at `paths`; of a list, which has no keys, the whole list."""
    result = dict(data)
    head: Any  # not a string where a mapping was given that has such keys
    for head in {path[0] for path in paths if path and path[0] in data}:
        rests = [path[1:] for path in paths if path[:1] == (head,)]
        inner = data[head]
        if () in rests or not isinstance(inner, Mapping):
            del result[head]
        else:
            result[head] = pruned(inner, rests)
    return result


def _strange(data: Any, path: KeyPath, source: Source | None) -> Iterator[Problem]:
    """What no JSON file says: a key that is no string; and integers that no float holds, which break arithmetic."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            if isinstance(key, str):
                yield from _strange(value, (*path, key), source)
            else:
                yield Problem((*path, key), f"a key should be a string (got {key!r})")
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from _strange(value, (*path, index), source)
    elif type(data) is int and abs(data) > sys.float_info.max:
        yield Problem(path, "Input should be a number below 1.8e308", source.where(path) if source else "")


def _twice(annotation: Any, data: Any, path: KeyPath, source: Source | None) -> Iterator[Problem]:
    """Keys that are given under both of their names."""
    if not isinstance(data, Mapping):
        return
    for name, info in getattr(annotation, "model_fields", {}).items():
        if info.alias and info.alias != name and name in data and info.alias in data:
            where = source.where((*path, name), key=True) if source else ""
            yield Problem((*path, name), f"is the same key as {info.alias!r}, which is given too", where)
    for key, value in data.items():
        for inner in inside(annotation, key):
            yield from _twice(inner, value, (*path, key), source)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one key; `where` is file:line:column where there is a file."""

    path: KeyPath
    where: str
    verdict: Literal["honoured", "equivalent", "harmless", "refused", "unknown", "invalid"]
    text: str
    loud: bool = False  # of an accepted key: something that was asked for does not happen

    @property
    def position(self) -> tuple[int, int] | tuple[None, None]:
        """Line and column, both from 1."""
        parts = self.where.rsplit(":", 2)
        return (int(parts[1]), int(parts[2])) if len(parts) == 3 and parts[2].isdigit() else (None, None)


def verdicts(
    section: type[Section], data: Any, problems: Sequence[Problem], source: Source | None = None
) -> list[Verdict]:
    """One verdict for each key of `data` and each problem, in the order of `data`; problems of no key come last."""
    found: dict[KeyPath, list[Problem]] = {}
    for problem in problems:
        found.setdefault(problem.path, []).append(problem)
    rows: list[Verdict] = []
    for path, value, info in _leaves(section, data, (), found, None):
        if path in found:
            several = found.pop(path)
            rows += [Verdict(path, problem.where, problem.kind, problem.text) for problem in several]
            for inner, _, _ in _leaves(None, value, path, {}, None) if isinstance(value, Mapping) and value else ():
                text = f"part of {dotted(path)}"
                rows.append(Verdict(inner, source.where(inner) if source else "", several[0].kind, text))
            continue
        verdict, text = judged(info)
        if renamed := _renamed(section, path):
            verdict, text = "equivalent" if verdict == "honoured" else verdict, "; ".join(filter(None, (renamed, text)))
        loud = any(isinstance(mark, Note) and mark.loud for mark in info.metadata) if info else False
        loud = loud and not asks_for_nothing(value)
        rows.append(Verdict(path, source.where(path) if source else "", verdict, text, loud))
    left = [problem for several in found.values() for problem in several]
    return rows + [Verdict(problem.path, problem.where, problem.kind, problem.text) for problem in left]


def _renamed(section: Any, path: KeyPath) -> str:
    """`another name of 'bf16'` where a key on the path is not called what its section calls it."""
    for part in path:
        for info in [info for name, info in getattr(section, "model_fields", {}).items() if name == part]:
            if info.alias and info.alias != part:
                return f"{part} is another name of {info.alias!r}"
        section = next((kind for kind in inside(section, part) if hasattr(kind, "model_fields")), None)
    return ""


def judged(info: FieldInfo | None) -> tuple[Literal["honoured", "equivalent", "harmless"], str]:
    """The verdict on a key without a problem, and why."""
    for mark in info.metadata if info else []:
        if isinstance(mark, Later):
            return "harmless", _NOTHING
        if isinstance(mark, Note):
            return mark.verdict, mark.text
    return "honoured", (info.description if info else None) or ""


def _leaves(
    annotation: Any, data: Any, path: KeyPath, whole: Mapping[KeyPath, Any], info: FieldInfo | None
) -> Iterator[tuple[KeyPath, Any, FieldInfo | None]]:
    """The keys that hold a value, with it and their fields; an object counts as one where it is itself the problem."""
    if not isinstance(data, Mapping) or not data or (path and path in whole):
        if path:
            yield path, data, info
        return
    fields: dict[str, FieldInfo] = {}
    for name, field in getattr(annotation, "model_fields", {}).items():
        fields |= {name: field, field.alias or name: field}
    for key, value in data.items():
        inner = [kind for kind in inside(annotation, key) if hasattr(kind, "model_fields") or hasattr(kind, "__args__")]
        yield from _leaves(next(iter(inner), None), value, (*path, key), whole, fields.get(key, info))
