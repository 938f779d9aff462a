"""Verdicts as a table for people, as JSON for programs, and a whole language as a page of documentation."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from zs_comm.config import ByteSize, Problem, Section, dotted, inside
from zs_comm.errors import ConfigError
from zs_comm.jsonfile import Source, read_config
from zs_comm.keys import Later, Verdict, fatal, judged, tolerant, verdicts

_COLOURS = {"honoured": 32, "equivalent": 36, "harmless": 90, "refused": 33, "unknown": 31, "invalid": 31}


def report(
    config: str,
    section: type[Section],
    find: Callable[[Any, Source | None], Sequence[Problem]],
    *,
    as_json: bool = False,
    unknown_keys: str = "error",
    colour: bool = False,
) -> tuple[str, bool]:
    """The verdicts on a configuration (a path or base64) as a text, and whether it is accepted.

    find: all its problems. unknown_keys: "warn": an unknown key is no reason to refuse it.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        data, source = read_config(config)
    except ConfigError as error:
        if not error.where:
            raise
        problem = Problem((), str(error).removeprefix(f"{error.where}: "), error.where)
        rows, errors = [Verdict((), error.where, "invalid", problem.text)], [problem]
    else:
        (problems,) = tolerant(lambda *read: (find(*read),), data, source, unknown_keys)
        rows, errors = verdicts(section, data, problems, source), fatal(problems, unknown_keys)
    if as_json:
        return in_json(rows, ok=not errors), not errors
    lines = [table(rows, colour=colour), f"{config}: {counted(rows, errors)}"]
    return "\n".join(filter(None, lines)), not errors


def table(rows: Sequence[Verdict], *, colour: bool = False) -> str:
    """A line for each verdict: line:column, key, verdict, why."""
    places = [":".join(map(str, row.position)) if row.position[0] else "" for row in rows]
    wide = max((len(dotted(row.path)) for row in rows), default=0)
    lines = []
    for place, row in zip(places, rows, strict=True):
        word = f"{row.verdict:<10}"
        word = f"\x1b[{_COLOURS[row.verdict]}m{word}\x1b[0m" if colour else word
        lines.append(f"{place:>7}  {dotted(row.path):<{wide}}  {word}  {row.text}".rstrip())
    return "\n".join(lines)


def in_json(rows: Sequence[Verdict], ok: bool) -> str:
    """`{"ok": bool, "keys": [{"path", "line", "column", "verdict", "message"}]}`; lines and columns from 1, or null."""
    keys = [
        {
            "path": dotted(row.path),
            "line": row.position[0],
            "column": row.position[1],
            "verdict": row.verdict,
            "message": row.text,
        }
        for row in rows
    ]
    return json.dumps({"ok": ok, "keys": keys}, indent=2)


def counted(rows: Sequence[Verdict], fatal: Sequence[Problem]) -> str:
    """`9 keys: 7 honoured, 1 harmless, 1 unknown; 1 problem`."""
    words = [f"{n} {word}" for word in _COLOURS if (n := sum(row.verdict == word for row in rows))]
    end = f"{len(fatal)} problem{'s' if len(fatal) > 1 else ''}" if fatal else "accepted"
    return f"{len(rows)} keys: {', '.join(words)}; {end}" if rows else f"0 keys; {end}"


_INTRODUCTION = """\
# The configuration

Every key that a configuration may have, and what becomes of it. This page is printed by `zs schema --markdown`; a
file is judged by `zs lint FILE`.

- *honoured*: it does what it says.
- *equivalent*: what it asks for happens whatever its value, or in another way; the text says how.
- *harmless*: nothing follows from it here; the text says why.
- *refused*: a value that asks for something is an error with this reason; the default, `null`, `false` and
  `{"enabled": false}` are accepted.

`null` and `"auto"` stand for the default (whoever fills in `"auto"` does so before). A whole number may be written
`5e8`, a number of bytes `"2GiB"`. Keys that begin with `zs_` are not DeepSpeed's. A key that is not on this page is an
error, unless `unknown_keys="warn"` (`zs lint --unknown-keys warn`) says otherwise.
"""


def page(section: type[Section]) -> str:
    """Every key of a configuration in Markdown: a table of the top level and one of each section."""
    parts, queue = [_INTRODUCTION.rstrip()], [("", typing.cast(Any, section))]
    while queue:
        path, owner = queue.pop(0)
        rows = ["| key | takes | default | verdict | |", "|---|---|---|---|---|"]
        for key, info in _fields(owner):
            inner = [kind for kind in inside(owner, key) if hasattr(kind, "model_fields")]
            named = [kind for one in inside(owner, key) for kind in inside(one, "") if hasattr(kind, "model_fields")]
            queue += [(f"{path}.{key}".lstrip("."), kind) for kind in inner]
            queue += [(f"{path}.{key}.*".lstrip("."), kind) for kind in named]
            anchor = f"{path}.{key}".replace(".", "").replace("*", "")
            rows.append(_row(key, info, anchor if inner or named else ""))
        title = f"## `{path}`" if path else "## Top level"
        parts.append("\n".join([title, "", *rows]))
    return "\n\n".join(parts) + "\n"


def _fields(owner: Any) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in owner.model_fields.items():
        yield info.alias or name, info


def _row(key: str, info: FieldInfo, anchor: str) -> str:
    verdict, text = judged(info)
    later = next((mark for mark in info.metadata if isinstance(mark, Later)), None)
    if later is not None:
        verdict, text = "refused", later.reason  # type: ignore[assignment]
    text = (text or info.description or "").replace("|", "\\|")
    if anchor:
        return f"| `{key}` | [a section](#{anchor}) | | | {text} |".replace("  |", " |")
    default = info.get_default(call_default_factory=True)
    shown = "" if default is None else f"`{json.dumps(default, default=str)}`"
    return f"| `{key}` | {_taken(info)} | {shown} | {verdict} | {text} |".replace("  |", " |")


def _taken(info: FieldInfo) -> str:
    kinds = dict.fromkeys(word for part in _parts(info.annotation, list(info.metadata)) for word in [part] if word)
    return " or ".join(kinds) or "anything"


def _parts(annotation: Any, marks: list[Any]) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _parts(arguments[0], [*marks, *arguments[1:]])
    elif origin is typing.Literal:
        yield ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    elif origin in (list, tuple, set):
        yield "a list"
    elif origin is dict:
        yield "an object"
    elif arguments:
        for part in arguments:
            yield from _parts(part, marks)
    elif annotation in _WORDS:
        word = "bytes" if any(isinstance(mark, ByteSize) for mark in marks) else _WORDS[annotation]
        yield word + _limits(marks)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "an object"}


def _limits(marks: Sequence[Any]) -> str:
    flat = [mark for one in marks for mark in (one.metadata if isinstance(one, FieldInfo) else [one])]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return "".join(f" {sign} {getattr(m, name):g}" for m in flat for name, sign in signs.items() if hasattr(m, name))
