"""Sections made from a table, for the part of a configuration's language that no package has a section for.

A key is written in the words of JSON Schema, or as its bare default where that says the type:

    {
      "wall_clock_breakdown": {"default": false, "reason": "there are no phase timers"},
      "csv_monitor": {
        "reason": "there are no monitors",
        "keys": {"enabled": false, "output_path": {"type": "string", "default": ""}}
      }
    }

`type` (boolean, integer, number, string, array, object, bytes, or several), `enum`, `minimum`, `exclusiveMinimum`,
`maximum`, `items`, `default`; `keys`: a section; `named`: a section under each of any number of names. `reason`: what a
value that asks for something is refused with; `without`: what it is accepted without; `harmless`: why nothing follows
from the key. They hold for all that is inside. Of a section with `switches` (by default the key `enabled`) only those
ask for anything.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model

from zs_comm.config import ByteSize
from zs_comm.keys import DeepSpeedSection, Later, Note

S = TypeVar("S", bound=DeepSpeedSection)
_TYPES: dict[str, Any] = {
    "boolean": bool,
    "integer": int,
    "number": float,
    "string": str,
    "object": dict[str, Any],
    "bytes": Annotated[int, ByteSize()],
}
_LIMITS = {"minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le"}


def extended(section: type[S], package: str, file: str) -> type[S]:
    """`section` and the keys of the table in a package's data file; a key that `section` has stays as it is there."""
    table = json.loads(resources.files(package).joinpath(file).read_text("utf-8"))
    return with_keys(section, table)


def with_keys(section: type[S], table: Mapping[str, Any]) -> type[S]:
    """`section` and the keys of a table."""
    own = {*section.model_fields, *(info.alias for info in section.model_fields.values())}
    keys = {key: row for key, row in table.items() if key not in own}
    return create_model(section.__name__, __base__=section, __doc__=section.__doc__, **_fields(keys, _Say()))


@dataclass(frozen=True)
class _Say:
    """What is said of a key: refused with `reason` where it asks for something, else harmless because of `why`."""

    reason: str = ""
    why: str = ""
    loud: bool = False


def _fields(rows: Mapping[str, Any], say: _Say) -> dict[str, Any]:
    return {key: _field(key, row if isinstance(row, dict) else {"default": row}, say) for key, row in rows.items()}


def _field(key: str, row: dict[str, Any], say: _Say) -> Any:
    without = row.get("without", "")
    say = _Say(row.get("reason", say.reason), row.get("harmless", without or say.why), bool(without) or say.loud)
    if "keys" in row:
        section = _section(key, row, say)
        return section, section()  # frozen, so one is enough
    if "named" in row:
        inner: Any = _section(key, row["named"], say)
        return dict[str, inner] | None, None
    default = row.get("default")
    mark: Any = Note("harmless", say.why, say.loud) if say.why else Later(say.reason, default)
    kind = _type(row)
    return Annotated[Any if kind is Any else kind | None, mark], default


def _section(key: str, row: Mapping[str, Any], say: _Say) -> type[DeepSpeedSection]:
    keys = dict(row["keys"])
    inside: dict[str, Any] = {}
    switches = [name for name in row.get("switches", ["enabled"]) if name in keys]
    if switches and (say.loud or not say.why):
        inside = _fields({name: keys.pop(name) for name in switches}, say)
        say = replace(say, why=f"for {key}.{' and '.join(switches)}, which decides", loud=False)
    name = "".join(part.capitalize() for part in key.split("_"))
    return create_model(name, __base__=DeepSpeedSection, **inside, **_fields(keys, say))


def _type(row: Mapping[str, Any]) -> Any:
    if "enum" in row:
        return Literal[tuple(row["enum"])]
    names = row.get("type") or [name for name, kind in _TYPES.items() if type(row.get("default")) is kind]
    kinds = [
        _array(row) if name == "array" else _TYPES[name] for name in ([names] if isinstance(names, str) else names)
    ]
    if not kinds:
        return Any
    limits = {_LIMITS[word]: value for word, value in row.items() if word in _LIMITS}
    kind = functools.reduce(operator.or_, kinds)
    return Annotated[kind, Field(**limits)] if limits else kind


def _array(row: Mapping[str, Any]) -> Any:
    item: Any = _type(row["items"]) if "items" in row else Any
    return list[item]
