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


# -- the parameters of DeepSpeed's optimizers and schedules -----------------------------------------------------------

BELOW = -1
MORE: dict[str, Any] = {"betas": [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, True]]}
STEPS = ("total_num_steps", "warmup_num_steps", "cycle_first_step_size", "lr_range_test_step_size", "ns_steps")
ANY_SIGN = ("dampening", "last_batch_iteration", "last_epoch", "max_coeff")  # -1 is right, or in one combination
PARAMS: dict[tuple[str, str], dict[str, Any]] = {
    **dict.fromkeys(
        [("optimizer", "Adam"), ("optimizer", "AdamW")],
        dict.fromkeys(["lr", "eps", "weight_decay"], 0.1)
        | {"betas": [0.9, 0.99]}
        | dict.fromkeys(["bias_correction", "adam_w_mode", "torch_adam"], True)
        | {"amsgrad": False},
    ),
    ("optimizer", "Lamb"): dict.fromkeys(["lr", "eps", "weight_decay", "min_coeff"], 0.1)
    | {"betas": [0.9, 0.99], "max_coeff": 0.3, "bias_correction": True, "eps_inside_sqrt": False},
    ("optimizer", "Lion"): {"lr": 0.1, "weight_decay": 0.1, "betas": [0.9, 0.99], "set_grad_none": True},
    ("optimizer", "Muon"): dict.fromkeys(["lr", "muon_lr", "adam_lr", "momentum", "weight_decay", "eps"], 0.1)
    | {"betas": [0.9, 0.99], "nesterov": True, "ns_steps": 5, "ns_method": "gram", "per_head_muon": False},
    ("optimizer", "SGD"): dict.fromkeys(["lr", "momentum", "weight_decay", "dampening"], 0.1) | {"nesterov": False},
    ("optimizer", "Adagrad"): dict.fromkeys(["lr", "lr_decay", "weight_decay", "eps"], 0.1),
    ("optimizer", "RMSprop"): dict.fromkeys(["lr", "alpha", "momentum", "weight_decay", "eps"], 0.1),
    ("scheduler", "LRRangeTest"): dict.fromkeys(["lr_range_test_min_lr", "lr_range_test_step_rate"], 0.1)
    | {"lr_range_test_step_size": 5, "lr_range_test_staircase": True, "last_batch_iteration": -1},
    ("scheduler", "OneCycle"): dict.fromkeys(["cycle_min_lr", "cycle_max_lr", "decay_lr_rate", "decay_mom_rate"], 0.1)
    | {"cycle_min_mom": 0.8, "cycle_max_mom": 0.9, "cycle_momentum": True, "last_batch_iteration": -1}
    | {"cycle_first_step_size": 5, "cycle_second_step_size": 5, "decay_step_size": 5}
    | {"cycle_first_stair_count": 2, "cycle_second_stair_count": 2},
    ("scheduler", "WarmupLR"): {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 5}
    | {"warmup_type": "log", "last_batch_iteration": -1},
    ("scheduler", "WarmupDecayLR"): {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 5}
    | {"warmup_type": "linear", "total_num_steps": 9, "last_batch_iteration": -1},
    ("scheduler", "WarmupCosineLR"): {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.1, "warmup_num_steps": 5}
    | {"warmup_type": "linear", "total_num_steps": 9, "last_batch_iteration": -1},
    ("scheduler", "StepLR"): {"step_size": 2, "gamma": 0.1},
    ("scheduler", "MultiStepLR"): {"milestones": [2, 3], "gamma": 0.1},
    ("scheduler", "CosineAnnealingLR"): {"T_max": 2, "eta_min": 0.1},
    ("scheduler", "ExponentialLR"): {"gamma": 0.1},
}


def wrong_params(key: str, value: Any) -> Iterator[Any]:
    """Values of another kind, and outside of the range."""
    yield from ({"x": 1}, [{"y": 1}])
    if isinstance(value, bool):
        yield from (0, 1, "true", [True], 0.5)
    elif isinstance(value, str):
        yield from (True, 1, [1], "zsx")
    elif isinstance(value, list):
        yield from (True, "x", 0.9, ["x"], *MORE.get(key, []), [float("nan"), 0.9])
    else:
        yield from (True, False, "1e-3", ["x"], float("nan"), float("inf"), -float("inf"))
        yield from [] if "_lr" in key or "_mom" in key else [[1]]
        yield from [] if key in ANY_SIGN else [BELOW, -0.5]
        yield from [0] if key in (*STEPS, "step_size", "T_max") else []
        yield from [1.5] if isinstance(value, int) else []
        yield from [-2] if key == "last_batch_iteration" else []


@pytest.mark.parametrize(("section", "name"), PARAMS)
def test_a_wrong_value_of_any_parameter_is_found_there_and_nowhere_else(section: str, name: str) -> None:
    params = PARAMS[section, name]
    good = {key: value for key, value in params.items() if key != "torch_adam"}
    assert examine({section: {"type": name, "params": good}})[2] == []
    missed = []
    for key, right in params.items():
        for value in wrong_params(key, right):
            found = examine({section: {"type": name, "params": good | {key: value}}})[2]
            if {problem.path for problem in found} != {(section, "params", key)}:
                missed.append((key, value, found))
    assert missed == []


def test_an_array_that_is_auto_may_still_be_filled_in() -> None:
    params = {"milestones": "auto", "gamma": 0.5}
    assert examine({"scheduler": {"type": "MultiStepLR", "params": params}})[2] == []


def test_several_wrong_parameters_are_each_found() -> None:
    params = {"warmup_min_lr": -1, "warmup_max_lr": -2, "warmup_num_steps": 0, "total_num_steps": -3}
    found = examine({"scheduler": {"type": "WarmupDecayLR", "params": {**params, "warmup_type": "log"}}})[2]
    assert sorted(problem.path[-1] for problem in found) == sorted(params)
    found = examine({"scheduler": {"type": "StepLR", "params": {"step_size": 0, "gamma": -1}}})[2]
    assert [problem.path[-1] for problem in found] == ["step_size", "gamma"]
    together = {"amsgrad": True, "bias_correction": False, "lr": -1}
    found = examine({"optimizer": {"type": "Adam", "params": together}})[2]
    assert [problem.path[-1] for problem in found] == ["lr", "amsgrad"]


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
