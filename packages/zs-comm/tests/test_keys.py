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
from zs_comm.keys import DeepSpeedSection, Later, Note, asks_for_nothing, examine, fatal, pruned, verdicts
from zs_comm.language import with_keys


class Inner(DeepSpeedSection):
    size: int = Field(default=3, alias="inner_size", description="elements")
    hint: Annotated[bool, Note("harmless", "nothing follows")] = True
    later: Annotated[Any, Later("not there")] = None
    ways: Annotated[Any, Later("only one way", 1)] = 1


class Whole(DeepSpeedSection):
    inner: Inner = Inner()
    batch: int | None = None


LANGUAGE = with_keys(
    Whole,
    {
        "wall": {"reason": "no timers", "default": False},
        "half": {"reason": "no half", "keys": {"enabled": False, "scale": {"type": "number", "default": 0}}},
        "tune": {"reason": "no tuning", "keys": {"depth": 8, "deep": True}},
        "batch": {"reason": "not taken: the section has it", "default": None},
    },
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
        ({"wall": False, "half": {"scale": 9}, "tune": {"depth": 8}}, []),
        ({"wall": True}, ["refused wall: no timers (got true)"]),
        ({"half": {"enabled": True, "scale": 9}}, ["refused half.enabled: no half (got true)"]),
        ({"half": {"enabled": "yes"}}, ['invalid half.enabled: Input should be true or false (got "yes")']),
        ({"half": {"scael": 9}}, ["unknown half.scael: unknown key; did you mean 'scale'?"]),
        ({"half": {"scale": "x"}}, ['invalid half.scale: Input should be a number (got "x")']),
        ({"half": 3}, ["invalid half: Input should be an object (got 3)"]),
        ({"tune": {"depth": 9}}, ["refused tune.depth: no tuning (got 9)"]),
        ({"tune": {"deep": False}}, ["refused tune.deep: no tuning (got false)"]),
        ({"hafl": {}}, ["unknown hafl: unknown key; did you mean 'half'?"]),
        ({"bach": 1}, ["unknown bach: unknown key; did you mean 'batch'?"]),
        ({"siz": 1, "batch": 2}, ["unknown siz: unknown key"]),
        ({"hint": True}, ["unknown hint: unknown key; it belongs in 'inner'"]),
        ({"inner": {"batch": 3}}, ["unknown inner.batch: unknown key; it belongs at the top level"]),
        ({"inner": {"szie": 1}}, ["unknown inner.szie: unknown key; did you mean 'size'?"]),
        (
            {"inner": {"size": 1, "inner_size": 2}},
            ["invalid inner.size: is the same key as 'inner_size', which is given too"],
        ),
        ([], ["invalid the configuration should be an object (got [])"]),
    ],
)
def test_examine(data: Any, texts: list[str]) -> None:
    _, problems = examine(LANGUAGE, data)
    assert [f"{problem.kind} {problem}" for problem in problems] == texts


def test_examine_gives_the_part_that_is_in_order() -> None:
    data = {"batch": 4, "inner": {"hint": "yes", "size": 7, "x": 1}, "wall": True}
    config, problems = examine(LANGUAGE, data)
    assert (config.batch, config.inner) == (4, Inner(size=7)) and len(problems) == 3
    assert fatal(problems, "warn") == [problem for problem in problems if problem.path != ("inner", "x")]


def test_pruned() -> None:
    data = {"a": {"b": 1, "c": [1, 2]}, "d": 2, "e": {"f": 3}}
    assert pruned(data, [("a", "b"), ("d",), ("e",), ("z", "y")]) == {"a": {"c": [1, 2]}}
    assert pruned(data, [("a", "c", 0), ()]) == {"a": {"b": 1}, "d": 2, "e": {"f": 3}}
    assert data == {"a": {"b": 1, "c": [1, 2]}, "d": 2, "e": {"f": 3}}


def test_verdicts() -> None:
    text = '{"batch": 4, "inner": {"size": 1, "hint": false, "later": null, "ways": 2}, "half": {"enabled": false}}'
    data, source = parse_json(text, name="c")
    data["x"] = 1
    rows = verdicts(LANGUAGE, data, examine(LANGUAGE, data, source)[1], source)
    assert [(dotted(row.path), row.verdict, row.text) for row in rows] == [
        ("batch", "honoured", ""),
        ("inner.size", "equivalent", "size is another name of 'inner_size'; elements"),
        ("inner.hint", "harmless", "nothing follows"),
        ("inner.later", "harmless", "asks for nothing"),
        ("inner.ways", "refused", "only one way (got 2)"),
        ("half.enabled", "harmless", "asks for nothing"),
        ("x", "unknown", "unknown key"),
    ]
    assert rows[0].where == "c:1:11" and rows[0].position == (1, 11)
    assert verdicts(LANGUAGE, {"batch": 4}, [])[0].position == (None, None)


def test_what_is_in_an_object_that_is_wrong_is_wrong_too() -> None:
    data = {"batch": {"x": 1}, "y": {"z": {"w": 2}, "v": {}}}
    rows = verdicts(LANGUAGE, data, examine(LANGUAGE, data)[1])
    assert [(dotted(row.path), row.verdict, row.text) for row in rows] == [
        ("batch", "invalid", 'Input should be a whole number (got {"x": 1})'),
        ("batch.x", "invalid", "part of batch"),
        ("y", "unknown", "unknown key"),
        ("y.z.w", "unknown", "part of y"),
        ("y.v", "unknown", "part of y"),
    ]


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
        (
            {"type": "SGD", "params": {"momentun": 1, "lr": "x", "nesterov": 1, "weight_decay": [1]}},
            [
                "params.momentun: SGD takes no such parameter; did you mean 'momentum'?",
                'params.lr: Input should be a number (got "x")',
                "params.nesterov: Input should be true or false (got 1)",
                "params.weight_decay: Input should be a number (got [1])",
            ],
        ),
        (
            {"type": "Adam", "params": {"betas": [0.9]}},
            ["params.betas: Input should be an array of 2 numbers (got [0.9])"],
        ),
        (
            {"type": "Adam", "params": {"foreach": "yes", "lr": "auto"}},
            ['params.foreach: Input should be true or false (got "yes")'],
        ),
        ({"type": "SGD", "params": {"lr": -1}}, ["params.lr: SGD: Invalid learning rate: -1 (got -1)"]),
        (  # each that is wrong alone, and not what needs the right one beside it
            {"type": "SGD", "params": {"lr": -1, "weight_decay": -2, "momentum": 0.9, "nesterov": True}},
            [
                "params.lr: SGD: Invalid learning rate: -1 (got -1)",
                "params.weight_decay: SGD: Invalid weight_decay value: -2 (got -2)",
            ],
        ),
        (
            {"type": "Adam", "params": {"lr": float("inf"), "eps": -1, "betas": [0.9, 2]}},
            [
                "params.lr: Input should be a finite number (got Infinity)",
                "params.eps: Adam: Invalid epsilon value: -1 (got -1)",
                "params.betas: Adam: Invalid beta parameter at index 1: 2 (got [0.9, 2])",
            ],
        ),
        (  # wrong together
            {"type": "SGD", "params": {"lr": 0.1, "nesterov": True}},
            ["params.nesterov: SGD: Nesterov momentum requires a momentum and zero dampening (got true)"],
        ),
        (
            {"type": "Adam", "params": {"foreach": True, "fused": True}},
            ["params.foreach: Adam: `fused` and `foreach` cannot be `True` together. (got true)"],
        ),
    ],
)
def test_types_and_params(section: dict[str, Any], texts: list[str]) -> None:
    found = Choice(**section).problems(parameters)
    assert [str(problem) for problem in found] == texts


def test_rules_see_what_was_made() -> None:
    seen: list[Any] = []
    assert list(Choice(type="SGD").problems(parameters, seen.append)) == []
    assert type(seen[0]) is torch.optim.SGD
