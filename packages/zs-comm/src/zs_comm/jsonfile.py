"""Read a JSON configuration file and remember where everything stood.

The language is JSON plus what people write in configuration files: `//` and `/* */` comments and
trailing commas. A key given twice in one object is refused, because one of the two values would be
dropped in silence.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from zs_comm.errors import ConfigError

KeyPath: TypeAlias = tuple[str | int, ...]
Position: TypeAlias = tuple[int, int]  # line, column; both from 1

_SPACE = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[A-Za-z_]\w*")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
_MAX_DEPTH = 100


@dataclass(frozen=True)
class Source:
    """Where a configuration came from: the file's name, and line and column of its keys and values."""

    name: str
    keys: dict[KeyPath, Position] = field(default_factory=dict)
    values: dict[KeyPath, Position] = field(default_factory=dict)

    def where(self, path: KeyPath, *, key: bool = False) -> str:
        """`file:line:column` of the value at `path` (or of its key), of the nearest enclosing value if it has none."""
        table = self.keys if key else self.values
        position = table.get(path)
        while position is None and path:
            path = path[:-1]
            position = self.values.get(path)
        return f"{self.name}:{position[0]}:{position[1]}" if position else self.name


def read_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[Any, Source | None]:
    """A configuration as it may be given: a mapping, the path of a JSON file, or the URL-safe base64 of its text.

    Raises:
        ConfigError: as `read_json`; or a string that is none of these.
    """
    if not isinstance(config, str | os.PathLike):
        return config, None
    if config == "":
        raise ConfigError("the configuration is an empty string: give a mapping, the path of a JSON file, or base64")
    if isinstance(config, str) and not os.path.exists(config):
        if config.lstrip()[:1] in ("{", "["):
            raise ConfigError("the configuration is JSON text: give the file's path, or json.loads(text)")
        text = ""
        with contextlib.suppress(ValueError):  # binascii.Error and UnicodeDecodeError are such
            text = base64.b64decode(config, altchars=b"-_", validate=True).decode("utf-8")
        if text.lstrip()[:1] in ("{", "/"):
            return parse_json(text, name="<base64>")
    return read_json(config)


def read_json(path: str | os.PathLike[str]) -> tuple[Any, Source]:
    """Parse a file (UTF-8, a byte-order mark allowed).

    Raises:
        ConfigError: no such file (with the nearest names in its folder), not UTF-8, or not the language above.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(file)!r}: {error.strerror}{_near(file)}") from error
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        where = f"{file}:{before.count(10) + 1}:{error.start - before.rfind(10)}"  # 10: a line's end
        refusal = ConfigError(f"{where}: not UTF-8 at byte {error.start}")
        refusal.where = where
        raise refusal from error
    return parse_json(text, name=str(file))


def parse_json(text: str, *, name: str = "<config>") -> tuple[Any, Source]:
    """Parse a text. Raises ConfigError with `name`, line and column."""
    parser = _Parser(text, Source(name))
    value = parser.value((), 0)
    parser.space()
    if parser.at < len(text):
        parser.fail("expected the end of the file")
    return value, parser.source


class _Parser:
    """Recursive descent over `text`; `at` is the next character."""

    def __init__(self, text: str, source: Source) -> None:
        self.text, self.source, self.at = text, source, 0
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def position(self, at: int) -> Position:
        low, high = 0, len(self.line_starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.line_starts[middle] <= at else (low, middle)
        return low + 1, at - self.line_starts[low] + 1

    def fail(self, what: str, at: int | None = None) -> None:
        at = self.at if at is None else at
        line, column = self.position(at)
        found = repr(self.text[at : at + 12].split("\n")[0]) if at < len(self.text) else "the end of the file"
        where = f"{self.source.name}:{line}:{column}"
        error = ConfigError(f"{where}: {what}, found {found}")
        error.where = where
        raise error

    def space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        if self.text.startswith("/*", self.at):
            self.fail("a comment that is never closed")

    def take(self, token: str) -> bool:
        self.space()
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def value(self, path: KeyPath, depth: int) -> Any:
        self.space()
        if depth > _MAX_DEPTH:
            self.fail(f"nested deeper than {_MAX_DEPTH} levels")
        self.source.values[path] = self.position(self.at)
        if self.take("{"):
            return self.members(path, depth)
        if self.take("["):
            return self.items(path, depth)
        if self.text.startswith('"', self.at):
            return self.string()
        if number := _NUMBER.match(self.text, self.at):
            try:
                result = json.loads(number.group())
            except ValueError:  # more digits than Python converts
                result = math.inf
            if result in (math.inf, -math.inf):
                self.fail("a number that is too large")
            self.at = number.end()
            return result
        word = _WORD.match(self.text, self.at)
        if word and word.group() in _WORDS:
            self.at = word.end()
            return _WORDS[word.group()]
        if word and word.group().lower() in _WORDS:
            self.fail(f"JSON writes {word.group().lower()!r} for {word.group()!r}: expected a value")
        self.fail("expected a value")
        return None  # not reached: fail() raises

    def members(self, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not self.take("}"):
            self.space()
            start = self.at
            if not self.text.startswith('"', start):
                self.fail("expected a key in double quotes or '}'")
            key = self.string()
            if key in result:
                first = self.source.keys[(*path, key)]
                self.fail(f"key {key!r} is given twice, first on line {first[0]}", start)
            self.source.keys[(*path, key)] = self.position(start)
            if not self.take(":"):
                self.fail(f"expected ':' after {key!r}")
            result[key] = self.value((*path, key), depth + 1)
            if not self.take(","):
                if not self.take("}"):
                    self.fail("expected ',' or '}'")
                break
        return result

    def items(self, path: KeyPath, depth: int) -> list[Any]:
        result: list[Any] = []
        while not self.take("]"):
            result.append(self.value((*path, len(result)), depth + 1))
            if not self.take(","):
                if not self.take("]"):
                    self.fail("expected ',' or ']'")
                break
        return result

    def string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            self.fail("a string that is not closed on its line")
            return ""  # not reached: fail() raises
        start, self.at = self.at, match.end()
        try:
            return str(json.loads(match.group()))
        except json.JSONDecodeError:
            self.fail("a string with an invalid escape", start)
            return ""  # not reached: fail() raises


def _near(file: Path) -> str:
    try:
        names = [entry.name for entry in file.parent.iterdir()]
    except OSError:
        return f"; there is no folder {str(file.parent)!r}"
    near = difflib.get_close_matches(file.name, names, n=3)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else f" (in {str(file.parent.resolve())!r})"
