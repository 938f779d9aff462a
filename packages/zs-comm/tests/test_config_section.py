"""Sections: what they accept, and messages that name path, value and place, all problems at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator
from zs_comm import ConfigError
from zs_comm.config import Problem, Section, check, config_error, did_you_mean, dotted, validate
from zs_comm.jsonfile import parse_json, read_json


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = 0
    reduce_bucket_size: int = Field(500, ge=1)
    overlap_comm: bool = True
    ratio: float = 1.0
    numel: int | Literal["auto"] = "auto"
    betas: tuple[float, float] | None = None
    name: str = ""


class Whole(Section):
    zero_optimization: Zero = Zero()
    train_batch_size: int | None = None
    extras: dict[str, Any] = {}
    steps: int

    @model_validator(mode="after")
    def _few(self) -> Whole:
        if self.steps > 10:
            raise ValueError(f"steps({self.steps}) > 10")
        return self


def refused(data: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        validate(Whole, data, **options)
    return [str(problem) for problem in refusal.value.problems]


def test_values_as_json_means_them() -> None:
    found = validate(
        Whole, {"steps": 5.0, "zero_optimization": {"reduce_bucket_size": 5e8, "ratio": 1, "betas": [0, 1]}}
    )
    assert found.steps == 5
    assert type(found.zero_optimization.reduce_bucket_size) is int
    assert found.zero_optimization.ratio == 1.0
    assert found.zero_optimization.betas == (0.0, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("stage", 4, "Input should be 0, 1, 2 or 3 (got 4)"),
        ("stage", "3", 'Input should be 0, 1, 2 or 3 (got "3")'),
        ("stage", True, "Input should be 0, 1, 2 or 3 (got true)"),
        ("reduce_bucket_size", 0, "Input should be greater than or equal to 1 (got 0)"),
        ("reduce_bucket_size", 1.5, "Input should be a whole number (got 1.5)"),
        ("reduce_bucket_size", "500", 'Input should be a whole number (got "500")'),
        ("overlap_comm", 1, "Input should be true or false (got 1)"),
        ("ratio", False, "Input should be a number (got false)"),
        ("numel", "many", "Input should be 'auto' or a whole number (got \"many\")"),
        ("betas", 0.9, "Input should be an array (got 0.9)"),
        ("name", None, "Input should be a valid string (got null)"),
        ("reduce_bucket_sise", 1, "unknown key; did you mean 'reduce_bucket_size'?"),
        ("Stage", 1, "unknown key; did you mean 'stage'?"),
        ("anything", 1, "unknown key"),
    ],
)
def test_one_problem(key: str, value: Any, text: str) -> None:
    assert refused({"steps": 1, "zero_optimization": {key: value}}) == [f"zero_optimization.{key}: {text}"]


def test_every_problem_at_once() -> None:
    found = refused({"stage": 3, "zero_optimization": 3, "train_batch_sise": 8}, path="config")
    assert found == [
        "config.zero_optimization: Input should be an object (got 3)",
        "config.steps: this key is required",
        "config.stage: unknown key; it belongs in 'zero_optimization'",
        "config.train_batch_sise: unknown key; did you mean 'train_batch_size'?",
    ]


def test_rules_of_a_whole_section_speak_for_it() -> None:
    assert refused({"steps": 11}, path="a.b") == ["a.b: steps(11) > 10"]
    assert refused({"steps": 11}) == ["steps(11) > 10"]


def test_no_object_at_all() -> None:
    with pytest.raises(ConfigError, match=r"Input should be an object \(got \[1\]\)"):
        validate(Whole, [1])  # type: ignore[arg-type]


def test_sections_are_frozen_and_their_defaults_checked() -> None:
    class Wrong(Section):
        size: int = Field("large", description="not an int")  # type: ignore[assignment]

    with pytest.raises(ValidationError):
        Zero().stage = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Wrong()


def test_check_leaves_raising_to_the_caller() -> None:
    good, none = check(Whole, {"steps": 1})
    assert good is not None
    assert none == ()
    bad, problems = check(Whole, {"steps": 1, "zero_optimization": {"stage": 7}})
    assert bad is None
    error = config_error([*problems, Problem(("bf16", "enabled"), "needs a GPU")])
    assert str(error).splitlines() == [
        "2 problems:",
        "  zero_optimization.stage: Input should be 0, 1, 2 or 3 (got 7)",
        "  bf16.enabled: needs a GPU",
    ]


def test_places_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(
        "{  // a comment\n"
        '  "zero_optimization": {"stage": 4, "stages": 1},\n'
        '  /* another */ "steps": [1,],\n'
        '  "url": "http://x"\n'
        "}\n"
    )
    data, source = read_json(file)
    assert data["url"] == "http://x"
    assert refused(data, source=source) == [
        f"{file}:2:34: zero_optimization.stage: Input should be 0, 1, 2 or 3 (got 4)",
        f"{file}:2:37: zero_optimization.stages: unknown key; did you mean 'stage'?",
        f"{file}:3:26: steps: Input should be a whole number (got [1])",
        f"{file}:4:3: url: unknown key",
    ]
    assert source.where(("steps", 0)) == f"{file}:3:27"
    assert source.where(("steps", "absent")) == f"{file}:3:26"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "a": 2}', "2:2: key 'a' is given twice, first on line 1"),
        ('{"a": True}', "1:7: JSON writes 'true' for 'True'"),
        ('{"a" 1}', "1:6: expected ':' after 'a', found '1}'"),
        ("[1, 2", "1:6: expected ',' or ']', found the end of the file"),
        ("{} x", "1:4: expected the end of the file"),
        ("{a: 1}", "1:2: expected a key in double quotes"),
        ('"abc', "1:1: a string that is not closed"),
        ("{} /* x", "1:4: a comment that is never closed"),
        ("[NaN]", "1:2: expected a value"),
        ('"\\x"', "1:1: a string with an invalid escape"),
        ("[01]", "1:3: expected ',' or ']'"),
        ("[,]", "1:2: expected a value"),
        ("", "1:1: expected a value, found the end of the file"),
        ("[" * 200, "nested deeper"),
    ],
)
def test_what_is_not_json(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_json(text, name="f.json")
    assert f"f.json:{message}" in str(refusal.value) or message in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "ds_config.json")[0] == {}
    with pytest.raises(ConfigError, match=r"No such file or directory; did you mean 'ds_config\.json'\?"):
        read_json(tmp_path / "ds_confg.json")
    with pytest.raises(ConfigError, match="there is no folder"):
        read_json(tmp_path / "absent" / "x.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        read_json(tmp_path / "latin.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.sampled_from([None, 2]), st.booleans())
def test_reads_what_the_standard_library_writes(value: Any, indent: int | None, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, indent=indent, ensure_ascii=ascii_only))[0] == value


def test_small_helpers() -> None:
    assert dotted(("optimizer", "betas", 0, "x")) == "optimizer.betas[0].x"
    assert did_you_mean("zzz", ["stage"]) == ""
