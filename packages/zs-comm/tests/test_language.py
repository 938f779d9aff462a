"""Sections made from a table: types, limits, what is refused and what is only noted."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field
from zs_comm import ConfigError
from zs_comm.config import ByteSize, byte_size, dotted, validate
from zs_comm.keys import DeepSpeedSection, examine, verdicts
from zs_comm.language import with_keys

TABLE: dict[str, Any] = {
    "share": {"reason": "no shares", "type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
    "buffer": {"reason": "no buffers", "type": "bytes", "minimum": 1, "default": 1024},
    "mode": {"reason": "one mode", "enum": ["slow", "fast"], "default": "slow"},
    "sizes": {"reason": "no sizes", "type": "array", "items": {"type": "integer", "minimum": 1}, "default": [2]},
    "either": {"reason": "neither", "type": ["integer", "string"], "default": None},
    "watch": {"without": "nobody watches", "keys": {"enabled": False, "where": {"type": "string", "default": ""}}},
    "hints": {"harmless": "only hints", "keys": {"enabled": True, "inner": {"keys": {"depth": 3}}}},
    "squeeze": {
        "reason": "no squeezing",
        "keys": {
            "shared": {"keys": {"enabled": False, "offset": 0}},
            "groups": {
                "harmless": "for shared.enabled",
                "named": {"keys": {"bits": {"type": "integer", "default": 8}}},
            },
        },
    },
}
LANGUAGE = with_keys(DeepSpeedSection, TABLE)


def texts(data: Any) -> list[str]:
    return [f"{problem.kind} {problem}" for problem in examine(LANGUAGE, data)[1]]


@pytest.mark.parametrize(
    "data",
    [
        {"share": 0.5},
        {"share": "auto", "buffer": None},
        {"buffer": "1KiB", "mode": "slow", "sizes": [2]},
        {"sizes": []},
        {"watch": {"enabled": True, "where": "x"}},
        {"hints": {"enabled": False, "inner": {"depth": 9}}},
        {"squeeze": {"shared": {"enabled": False, "offset": 4}, "groups": {"a": {"bits": 2}, "b": {}}}},
    ],
)
def test_accepted(data: Any) -> None:
    assert texts(data) == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"share": 0.6}, "refused share: no shares (got 0.6)"),
        ({"share": 1.5}, "invalid share: Input should be less than or equal to 1 (got 1.5)"),
        ({"share": "half"}, 'invalid share: Input should be a number (got "half")'),
        ({"buffer": "2GiB"}, 'refused buffer: no buffers (got "2GiB")'),
        ({"buffer": "2 lots"}, 'invalid buffer: Input should be a number of bytes, or a string such as "2GiB"'),
        ({"buffer": 0}, "invalid buffer: Input should be greater than or equal to 1 (got 0)"),
        ({"mode": "fast"}, 'refused mode: one mode (got "fast")'),
        ({"mode": "medium"}, "invalid mode: Input should be 'slow' or 'fast' (got \"medium\")"),
        ({"sizes": [3]}, "refused sizes: no sizes (got [3])"),
        ({"sizes": [0]}, "invalid sizes[0]: Input should be greater than or equal to 1 (got 0)"),
        ({"either": True}, "invalid either: Input should be a whole number or a string (got true)"),
        ({"watch": {"enabled": 1}}, "invalid watch.enabled: Input should be true or false (got 1)"),
        ({"watch": {"wher": ""}}, "unknown watch.wher: unknown key; did you mean 'where'?"),
        ({"hints": {"inner": {"depth": "x"}}}, 'invalid hints.inner.depth: Input should be a whole number (got "x")'),
        ({"squeeze": {"shared": {"enabled": True}}}, "refused squeeze.shared.enabled: no squeezing (got true)"),
        ({"squeeze": {"groups": {"a": {"bit": 2}}}}, "unknown squeeze.groups.a.bit: unknown key; did you mean 'bits'?"),
        ({"squeeze": {"groups": {"a": 7}}}, "invalid squeeze.groups.a: Input should be an object (got 7)"),
    ],
)
def test_refused(data: Any, text: str) -> None:
    (found,) = texts(data)
    assert found.startswith(text)


def test_verdicts_and_what_is_said_loudly() -> None:
    data = {
        "watch": {"enabled": True, "where": "x"},
        "hints": {"enabled": True},
        "squeeze": {"groups": {"a": {"bits": 2}}},
    }
    rows = verdicts(LANGUAGE, data, [])
    assert [(dotted(row.path), row.verdict, row.text, row.loud) for row in rows] == [
        ("watch.enabled", "harmless", "nobody watches", True),
        ("watch.where", "harmless", "for watch.enabled, which decides", False),
        ("hints.enabled", "harmless", "only hints", False),
        ("squeeze.groups.a.bits", "harmless", "for shared.enabled", False),
    ]
    assert [row.loud for row in verdicts(LANGUAGE, {"watch": {"enabled": False}}, [])] == [False]


def test_a_key_of_the_section_stays_as_it_is() -> None:
    class Own(DeepSpeedSection):
        share: int = 3

    assert with_keys(Own, TABLE)(share=7).share == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (4096, 4096),
        (1e9, 10**9),
        ("4096", 4096),
        ("2GiB", 2 * 2**30),
        ("64 MiB", 64 * 2**20),
        ("500MB", 500 * 10**6),
        ("1.5KiB", 1536),
        ("3k", 3000),
        ("1TiB", 2**40),
    ],
)
def test_byte_sizes(value: Any, nbytes: int) -> None:
    assert byte_size(value) == nbytes


class Buffers(DeepSpeedSection):
    one: Annotated[int, ByteSize(), Field(ge=1)] = 1
    other: Annotated[int, ByteSize()] | None = None


def test_byte_sizes_in_a_section() -> None:
    assert validate(Buffers, {"one": "2KiB", "other": "1MB"}) == Buffers(one=2048, other=10**6)
    for wrong in (True, 1.5, "iB", "2GX", "-1", "0.1", [1], "", "1iB"):
        with pytest.raises(ConfigError, match="one: "):
            validate(Buffers, {"one": wrong})
