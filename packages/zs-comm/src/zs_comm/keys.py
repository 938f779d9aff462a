"""What becomes of each key of a DeepSpeed configuration, so that none is silently ignored.

A key is honoured; equivalent (mapped, with a note); harmless here (accepted, with a note); idle (of a feature that is
not there, asking for nothing); or refused. Sections say so field by field, in `Annotated` metadata:

    class ZeroConfig(DeepSpeedSection):
        stage: Literal[0, 1, 2, 3] = 0                                                  # honoured
        overlap_comm: Annotated[bool, Note("equivalent", "communication always overlaps")] = True
        zenflow: Annotated[Any, Later("ZenFlow is not there yet")] = None               # idle or refused
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from zs_comm.config import Problem, Section, _sections_of, check, did_you_mean, known_keys
from zs_comm.jsonfile import KeyPath, Source

S = TypeVar("S", bound=Section)
_SWITCHES = ("enabled", "device", "shared_parameters")


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


@dataclass(frozen=True)
class Later:
    """Field metadata of a key whose feature is not there: refused with `reason` unless its value asks for nothing."""

    reason: str
    default: Any = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if asks_for_nothing(value, self.default):
            return self.default
        raise PydanticCustomError("not_there_yet", "{reason}", {"reason": self.reason})


class DeepSpeedSection(Section):
    """A section in which null and `"auto"` mean the default, and a field with an alias answers to both names."""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _auto_is_default(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None and value != "auto"}


class ForeignKeys:
    """Known keys that no section has yet, from a table.

    A row holds a `reason` and either `default` (a single key), `keys` (a section: each key's default) or `open` (a
    section whose keys nobody lists). A section with the key `enabled` asks for something only while that is true.
    """

    def __init__(self, table: Mapping[str, Mapping[str, Any]]) -> None:
        self.table = table

    @classmethod
    def read(cls, package: str, file: str) -> ForeignKeys:
        """The table in a package's data file."""
        return cls(json.loads(resources.files(package).joinpath(file).read_text("utf-8")))

    def problems(self, data: Mapping[str, Any], source: Source | None = None) -> Iterator[Problem]:
        """What the known keys in `data` ask for that is not there; misspelt keys of their sections."""
        for name in self.table.keys() & data.keys():
            for path, text in self._judge(name, data[name], self.table[name]):
                yield Problem(path, text, source.where(path) if source else "")

    def _judge(self, name: str, value: Any, row: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
        keys, reason = row.get("keys"), str(row["reason"])
        if keys is None or not isinstance(value, Mapping):
            if not asks_for_nothing(value, row.get("default")):
                yield (name,), reason + _got(value)
            return
        for key in value.keys() - keys.keys():
            yield (name, key), "unknown key" + did_you_mean(key, list(keys))
        if "enabled" in keys:
            enabled = value.get("enabled")
            if enabled not in (True, False, None, "auto"):
                yield (name, "enabled"), "Input should be true or false" + _got(enabled)
            elif enabled is True:
                yield (name, "enabled"), reason + _got(enabled)
            return
        for key in keys.keys() & value.keys():
            if not asks_for_nothing(value[key], keys[key]):
                yield (name, key), reason + _got(value[key])


def examine(
    section: type[S], foreign: ForeignKeys, data: Mapping[str, Any], source: Source | None = None
) -> tuple[S, list[Problem]]:
    """Every problem of a configuration, and a model of the top-level keys that have none (for rules between keys)."""
    if not isinstance(data, Mapping):
        return section(), [
            Problem((), f"the configuration should be an object{_got(data)}", source.name if source else "")
        ]
    problems = list(foreign.problems(data, source))
    mine = {key: value for key, value in data.items() if key not in foreign.table}
    for key in mine.keys() - {*known_keys(section), *section.model_fields}:
        near = did_you_mean(key, [*known_keys(section), *foreign.table])
        if near:  # where nothing is near, `check` knows in which section the key belongs
            del mine[key]
            problems.append(Problem((key,), "unknown key" + near, source.where((key,), key=True) if source else ""))
    config, own = check(section, mine, source=source)
    if config is None:
        wrong = {problem.path[0] for problem in own if problem.path}
        config, _ = check(section, {key: value for key, value in mine.items() if key not in wrong})
    return config or section(), problems + list(own)


def json_schema(section: type[Section], foreign: ForeignKeys) -> dict[str, Any]:
    """The JSON Schema of a configuration; keys whose features are not there are described as such."""
    off = {name: {"description": f"not there: {row['reason']}"} for name, row in foreign.table.items()}
    made = section.model_json_schema()
    return made | {"properties": made["properties"] | off}


@dataclass(frozen=True)
class Verdict:
    """What becomes of one key; `where` is file:line:column where there is a file."""

    path: KeyPath
    where: str
    verdict: Literal["honoured", "equivalent", "harmless", "idle", "refused"]
    text: str


def verdicts(
    section: type[Section], data: Any, problems: Sequence[Problem], source: Source | None = None
) -> list[Verdict]:
    """One verdict for each key of `data` and each problem, in the order of `data`; problems of no key come last."""
    found = {problem.path: problem for problem in problems}
    rows: list[Verdict] = []
    for path, info in _leaves(section, data if isinstance(data, Mapping) else {}, (), found):
        problem = found.pop(path, None)
        if problem is not None:
            rows.append(Verdict(path, problem.where, "refused", problem.text))
            continue
        where = source.where(path) if source else ""
        marks = [mark for mark in info.metadata if isinstance(mark, Note | Later)] if info else []
        if info is None or any(isinstance(mark, Later) for mark in marks):
            rows.append(Verdict(path, where, "idle", "asks for nothing"))
        elif marks and isinstance(marks[0], Note):
            rows.append(Verdict(path, where, marks[0].verdict, marks[0].text))
        else:
            rows.append(Verdict(path, where, "honoured", info.description or ""))
    return rows + [Verdict(path, problem.where, "refused", problem.text) for path, problem in found.items()]


def _leaves(
    section: type[Section] | None, data: Mapping[str, Any], path: KeyPath, whole: Mapping[KeyPath, Problem]
) -> Iterator[tuple[KeyPath, FieldInfo | None]]:
    """The keys that hold a value, with their fields; a section counts as one where it is itself the problem."""
    fields: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items() if section else ():
        fields |= {name: info, info.alias or name: info}
    for key, value in data.items():
        inner = next(_sections_of(section, key), None) if section else None
        known = inner or (key not in fields and not path)
        if isinstance(value, Mapping) and value and known and (*path, key) not in whole:
            yield from _leaves(inner, value, (*path, key), whole)
        else:
            yield (*path, key), fields.get(key)


def _got(value: Any) -> str:
    return "" if isinstance(value, Mapping) else f" (got {json.dumps(value, default=repr)})"
