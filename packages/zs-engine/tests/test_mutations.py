"""One wrong key or value in a good configuration is found, where it stands: hundreds of them, chosen by a seed."""

from __future__ import annotations

import copy
import json
import random
import typing
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from zs_comm.config import ByteSize, Problem, inside
from zs_comm.jsonfile import KeyPath, parse_json
from zs_comm.keys import Later, Note, verdicts
from zs_engine.config import EngineConfig, examine, language

CONFIGS = {file.stem: file for file in sorted((Path(__file__).parent / "configs").glob("*.json"))}
GOOD = [file for file in CONFIGS.values() if file.read_text().startswith("// expect: train")]
SEEDS = range(8)
EACH = 100


def sections(section: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every section of the language by its path; a section of any name is under `a_name`."""
    yield path, section
    for name, info in section.model_fields.items():
        key = info.alias or name
        for kind in inside(section, key):
            if hasattr(kind, "model_fields"):
                yield from sections(kind, (*path, key))
            for inner in inside(kind, "a_name") if typing.get_origin(kind) is dict else ():
                if hasattr(inner, "model_fields"):
                    yield from sections(inner, (*path, key, "a_name"))


SECTIONS = dict(sections(language()))


def keys_of(data: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all keys of a configuration that are not names of the user's own."""
    if isinstance(data, dict):
        for key, value in data.items():
            if path[-1:] != ("different_groups",):
                yield (*path, key)
            yield from keys_of(value, (*path, key))


def put(data: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    """A copy with the value at `path`."""
    result = copy.deepcopy(data)
    inner: Any = result
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
    inner[path[-1]] = value
    return result


def misspelt(key: str, chance: random.Random) -> str:
    """One slip of the finger."""
    at = chance.randrange(len(key) - 1)
    letter = chance.choice("abcdefghijklmnopqrstuvwxyz_")
    return chance.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key[:at] + key[at + 1] + key[at] + key[at + 2 :],
            key[:at] + letter + key[at + 1 :],
            key[:at] + letter + key[at:],
            key + letter,
        ]
    )


def wrong_value(value: Any, chance: random.Random) -> Any:
    """A value of another kind; a string is none of the strings that anything here takes."""
    others = [{"x": {"y": 1}}, [[{}]], "zsx", True, -(10**30) - 0.5]
    if value == "auto":  # of any kind
        del others[3:]
    elif isinstance(value, bool):
        del others[3]
    elif isinstance(value, int | float):
        others = others[:4]
    elif isinstance(value, str):
        others = [one for one in others if not isinstance(one, str)]
    elif isinstance(value, list):
        del others[1]
    else:
        del others[0]
    return chance.choice(others)


def found_at(data: dict[str, Any], path: KeyPath) -> str:
    """The kind of the problem at a path, which has a line and a column; "" where there is none."""
    text = json.dumps(data, indent=1)
    parsed, source = parse_json(text, name="c.json")
    problems = examine(parsed, source)[2]
    for row in verdicts(language(), parsed, problems, source):
        if row.path[: len(path)] == path and row.verdict in ("unknown", "invalid", "refused"):
            line, column = row.position
            assert line is not None and column is not None and row.text
            assert text.splitlines()[line - 1].strip()
            return row.verdict
    return ""


def original(file: Path) -> dict[str, Any]:
    data = parse_json(file.read_text())[0]
    assert isinstance(data, dict)
    return data


def known(data: Any, path: KeyPath) -> set[str]:
    """The keys that there are beside the one at `path`."""
    kinds: list[Any] = [language()]
    for part in path[:-1]:
        kinds = [inner for kind in kinds for inner in inside(kind, part)]
    names = {name for kind in kinds for name in getattr(kind, "model_fields", {})}
    return names | {info.alias for kind in kinds for info in getattr(kind, "model_fields", {}).values()}


@pytest.mark.parametrize("seed", SEEDS)
def test_mutations_of_good_configurations(seed: int) -> None:
    chance = random.Random(seed)
    missed: list[Any] = []
    tried = named = 0
    while tried < EACH:
        data = original(chance.choice(GOOD))
        path = chance.choice(list(keys_of(data)))
        *above, key = path
        inner: Any = data
        for part in above:
            inner = inner[part]
        if chance.random() < 0.5:
            typo = misspelt(str(key), chance)
            if typo in known(data, path) or typo in inner:
                continue
            value = inner.pop(key)
            changed = put(data, (*above, typo), value)
            at: KeyPath = (*above, typo)
            verdict = found_at(changed, at)
            texts = [problem.text for problem in examine(changed)[2] if problem.path == at]
            named += any(repr(key) in text for text in texts)
            caught = verdict == "unknown"
        else:
            value = wrong_value(inner[key], chance)
            if path == ("zero_optimization",) and value is True:
                continue  # an old form
            changed, at = put(data, path, value), path
            caught = found_at(changed, at) != ""
            named += 1
        tried += 1
        if not caught:
            missed.append((at, changed))
    assert missed == []
    assert named >= 0.97 * tried  # that the nearest key is the one that was meant


# -- every key of the language, also those that no configuration here has ---------------------------------------------


ALL_KEYS = [
    ((*path, info.alias or name), info) for path, one in SECTIONS.items() for name, info in one.model_fields.items()
]


def leaves() -> Iterator[tuple[KeyPath, FieldInfo]]:
    for path, info in ALL_KEYS:
        if path not in SECTIONS and (*path, "a_name") not in SECTIONS:
            yield path, info


TABLE = json.loads(resources.files("zs_engine").joinpath("deepspeed_keys.json").read_text("utf-8"))


def test_the_language_is_large_and_says_each_thing_once() -> None:
    assert len(ALL_KEYS) > 400
    own = {name for key, info in EngineConfig.model_fields.items() for name in (key, info.alias)}
    assert own & TABLE.keys() == set()


def together(pairs: Iterable[tuple[KeyPath, Any]]) -> dict[KeyPath, list[Problem]]:
    """The problems, by path, of one configuration with all these values: none may hide another."""
    data: dict[str, Any] = {"train_batch_size": 1}
    for path, value in pairs:
        inner: Any = data
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    result: dict[KeyPath, list[Problem]] = {}
    for problem in examine(data)[2]:
        result.setdefault(problem.path, []).append(problem)
    return result


def test_a_typo_of_any_key_names_a_key() -> None:
    chance = random.Random(0)
    typos = [((*path[:-1], misspelt(str(path[-1]), chance)), path) for path, _ in ALL_KEYS]
    typos = [(typo, path) for typo, path in typos if typo[-1] not in known({}, path)]
    found = together((typo, None) for typo, _ in typos)
    assert [typo for typo, _ in typos if [one.kind for one in found.get(typo, [])] != ["unknown"]] == []
    near = [repr(path[-1]) in found[typo][0].text for typo, path in typos]
    assert sum(near) >= 0.97 * len(near) > 400


@pytest.mark.parametrize("value", [{"x": {"y": 1}}, "zsx", [[{}]], True, -1.5], ids=repr)
def test_a_value_of_the_wrong_kind_at_any_key(value: Any) -> None:
    wrong = [path for path, info in leaves() if not takes(info, value)]
    wrong = [path for path in wrong if path[-1] not in ("mpu", "tp_group")]  # objects of the program
    found = together((path, value) for path in wrong)
    heads = {problem.path[: len(path)] for path in wrong for inner in found.values() for problem in inner}
    assert [path for path in wrong if path not in heads] == [] and len(wrong) > 100


def takes(info: FieldInfo, value: Any) -> bool:
    """Whether a key takes values of this kind, judged by its annotation only."""
    kinds = list(_kinds(info.annotation))
    if any(isinstance(mark, ByteSize) for mark in info.metadata):
        return False
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, float):
        return float in kinds or dict in kinds
    return type(value) in kinds


def _kinds(annotation: Any) -> Iterator[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _kinds(arguments[0])
    elif origin is typing.Literal:
        yield "one of"
    elif origin in (list, tuple, dict):
        yield origin
    elif arguments:
        for part in arguments:
            yield from _kinds(part)
    else:
        yield annotation


def limits(info: FieldInfo) -> Iterator[Any]:
    """Values just outside of what a key takes."""
    marks = list(info.metadata)
    pending: list[Any] = [info.annotation]
    while pending:
        annotation = pending.pop()
        arguments = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Annotated:
            marks += [m for one in arguments[1:] for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
            pending.append(arguments[0])
        elif typing.get_origin(annotation) not in (list, dict, typing.Literal):
            pending += arguments
    for mark in marks:
        yield from ([mark.ge - 1] if getattr(mark, "ge", None) is not None else [])
        yield from ([mark.gt] if getattr(mark, "gt", None) is not None else [])
        yield from ([mark.le + 1] if getattr(mark, "le", None) is not None else [])


@pytest.mark.parametrize("which", [0, 1])
def test_a_value_out_of_range_at_any_key(which: int) -> None:
    wrong = [(path, outside[which]) for path, info in leaves() if len(outside := list(limits(info))) > which]
    found = together(wrong)
    assert [path for path, _ in wrong if [one.kind for one in found.get(path, [])] != ["invalid"]] == []
    assert len(wrong) > (100, 10)[which]


def test_every_key_says_what_becomes_of_it() -> None:
    """Honoured keys have a description with units, the others a reason; and defaults are accepted."""
    silent, defaults = [], []
    for path, info in leaves():
        marks = [mark for mark in info.metadata if isinstance(mark, Note | Later)]
        text = (marks[0].text if isinstance(marks[0], Note) else marks[0].reason) if marks else info.description
        if not text:
            silent.append(path)
        default = info.get_default(call_default_factory=True)
        above = dict(ALL_KEYS).get(path[:-1])  # to give a section may be to ask for it
        asks = above is not None and any(isinstance(mark, Later) for mark in above.metadata)
        if default is not None and "a_name" not in path and not asks and not isinstance(default, BaseModel):
            defaults.append((path, default))
    assert silent == [] and len(defaults) > 200
    assert together(defaults) == {}
