"""What becomes of a configuration's keys: notes, keys whose feature is not there, and a verdict for each."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from zs_comm import ConfigError
from zs_comm.config import dotted, validate
from zs_comm.factory import TypeAndParams, classes_of
from zs_comm.jsonfile import parse_json
from zs_comm.keys import DeepSpeedSection, ForeignKeys, Later, Note, asks_for_nothing, examine, json_schema, verdicts


class Inner(DeepSpeedSection):
    size: int = Field(default=3, alias="inner_size", description="elements")
    hint: Annotated[bool, Note("harmless", "nothing follows")] = True
    later: Annotated[Any, Later("not there")] = None
    ways: Annotated[Any, Later("only one way", 1)] = 1


class Whole(DeepSpeedSection):
    inner: Inner = Inner()
    batch: int | None = None


FOREIGN = ForeignKeys(
    {
        "wall": {"reason": "no timers", "default": False},
        "half": {"reason": "no half", "keys": {"enabled": False, "scale": 0}},
        "tune": {"reason": "no tuning", "keys": {"depth": 8, "deep": True}},
        "free": {"reason": "no freedom", "open": True},
    }
)


@pytest.mark.parametrize(
    ("value", "default", "nothing"),
    [
        (None, 5, True),
        (False, None, True),
        (False, True, False),
        ("auto", 5, True),
        ([], None, True),
        ({}, None, True),
        (1, 1, True),
        (1, True, False),
        (1.0, 1, True),
        ("WARN", "Warn", True),
        ("fail", "Warn", False),
        ({"enabled": False, "bits": 8}, None, True),
        ({"enabled": True}, None, False),
        ({"device": "none", "pin": True}, None, True),
        ({"device": "cpu"}, None, False),
        ({"shared_parameters": {"enabled": False}, "groups": {"a": 1}}, None, True),
        ({"a": {"enabled": False}, "b": {"enabled": True}}, None, False),
        ({"throughput": {"enabled": True, "sync": True}}, {"throughput": {"enabled": True, "sync": True}}, True),
        (7, None, False),
        ("x", None, False),
    ],
)
def test_asks_for_nothing(value: Any, default: Any, nothing: bool) -> None:
    assert asks_for_nothing(value, default) is nothing


def test_auto_null_and_both_names() -> None:
    assert validate(Inner, {"inner_size": "auto", "hint": None, "later": False}) == Inner()
    assert validate(Inner, {"inner_size": 4}) == validate(Inner, {"size": 4})
    with pytest.raises(ConfigError, match=r"later: not there \(got 1\)"):
        validate(Inner, {"later": 1})
    with pytest.raises(ConfigError, match=r"ways: only one way \(got 2\)"):
        validate(Inner, {"ways": 2})


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ({"wall": False, "half": {"scale": 9}, "tune": {"depth": 8}, "free": {"x": {"enabled": False}}}, []),
        ({"wall": True}, ["wall: no timers (got true)"]),
        ({"half": {"enabled": True, "scale": 9}}, ["half.enabled: no half (got true)"]),
        ({"half": {"enabled": "yes"}}, ['half.enabled: Input should be true or false (got "yes")']),
        ({"half": {"scael": 9}}, ["half.scael: unknown key; did you mean 'scale'?"]),
        ({"half": 3}, ["half: no half (got 3)"]),
        ({"tune": {"depth": 9}}, ["tune.depth: no tuning (got 9)"]),
        ({"tune": {"deep": False}}, ["tune.deep: no tuning (got false)"]),
        ({"free": {"x": 1}}, ["free: no freedom"]),
        ({"hafl": {}}, ["hafl: unknown key; did you mean 'half'?"]),
        ({"bach": 1}, ["bach: unknown key; did you mean 'batch'?"]),
        ({"size": 1, "batch": 2}, ["size: unknown key"]),
        ({"hint": True}, ["hint: unknown key; it belongs in 'inner'"]),
        ([], ["the configuration should be an object (got [])"]),
    ],
)
def test_examine(data: Any, texts: list[str]) -> None:
    _, problems = examine(Whole, FOREIGN, data)
    assert [str(problem) for problem in problems] == texts


def test_examine_gives_the_part_that_is_in_order() -> None:
    config, problems = examine(Whole, FOREIGN, {"batch": 4, "inner": {"hint": "yes"}, "wall": True})
    assert config == Whole(batch=4) and len(problems) == 2


def test_verdicts() -> None:
    text = '{"batch": 4, "inner": {"size": 1, "hint": false, "later": null, "ways": 2}, "half": {"enabled": false}}'
    data, source = parse_json(text, name="c")
    data["x"] = 1
    rows = verdicts(Whole, data, examine(Whole, FOREIGN, data, source)[1], source)
    assert [(dotted(row.path), row.verdict, row.text) for row in rows] == [
        ("batch", "honoured", ""),
        ("inner.size", "honoured", "elements"),
        ("inner.hint", "harmless", "nothing follows"),
        ("inner.later", "idle", "asks for nothing"),
        ("inner.ways", "refused", "only one way (got 2)"),
        ("half.enabled", "idle", "asks for nothing"),
        ("x", "refused", "unknown key"),
    ]
    assert rows[0].where == "c:1:11"


def test_a_refused_open_section_is_one_row() -> None:
    data = {"free": {"x": 1, "y": 2}}
    rows = verdicts(Whole, data, examine(Whole, FOREIGN, data)[1])
    assert [(dotted(row.path), row.verdict) for row in rows] == [("free", "refused")]


def test_schema_names_everything() -> None:
    assert set(json_schema(Whole, FOREIGN)["properties"]) == {"inner", "batch", "wall", "half", "tune", "free"}


def parameters() -> list[torch.Tensor]:
    return [torch.zeros(1, requires_grad=True)]


class Choice(TypeAndParams):
    def factory(self) -> Any:
        classes = classes_of(torch.optim, torch.optim.Optimizer)
        return self.maker("optimizer", classes, self.type, self.given) if self.type else None


@pytest.mark.parametrize(
    ("section", "texts"),
    [
        ({}, []),
        ({"type": "SGD", "params": {"lr": 0.1}}, []),
        ({"type": "SGD", "params": {"lr": "auto"}}, []),
        ({"type": "SGDD"}, ["type: unknown optimizer 'SGDD'; did you mean 'SGD'?"]),
        (
            {"type": "SGD", "params": {"momentun": 1}},
            ["params.momentun: SGD takes no such parameter; did you mean 'momentum'?"],
        ),
        ({"type": "SGD", "params": {"lr": -1}}, ["params: SGD: Invalid learning rate: -1"]),
    ],
)
def test_types_and_params(section: dict[str, Any], texts: list[str]) -> None:
    found = Choice(**section).problems(parameters)
    assert [str(problem) for problem in found] == texts


def test_rules_see_what_was_made() -> None:
    seen: list[Any] = []
    assert list(Choice(type="SGD").problems(parameters, seen.append)) == []
    assert type(seen[0]) is torch.optim.SGD
