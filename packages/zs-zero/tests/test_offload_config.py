"""Offload as a configuration says it: the sections, what becomes of their keys, the policy, the rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from zs_comm import ConfigError, Observers
from zs_comm.config import validate
from zs_comm.keys import Later, Note
from zs_zero.config import ZeroConfig
from zs_zero.loop_report import LoopReport
from zs_zero.offload_config import (
    AioConfig,
    OffloadOptimizerConfig,
    OffloadParamConfig,
    TiersConfig,
    offload_of,
)
from zs_zero.optimizers import Adam, Lamb, Lion, Muon
from zs_zero.requirements import requirements
from zs_zero.rules import contradictions
from zs_zero.tiers.policy import BLOCK_NUMEL, Files, Offload, OptimizerPolicy, ParameterPolicy

EARLY = "offload_optimizer.zs_early_update"
NVME = {"device": "nvme", "nvme_path": "/fast"}


def problems(**given: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        offload_of(**{"stage": 3} | given)
    return sorted(str(one) for one in raised.value.problems)


def zero(**keys: Any) -> ZeroConfig:
    return validate(ZeroConfig, keys, path="zero_optimization")


def said(**keys: Any) -> list[str]:
    """The rules that a whole configuration breaks."""
    return sorted(f"{'.'.join(map(str, path))}: {text}" for path, text in contradictions(keys))


# -- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_is_asked_for(stage: int) -> None:
    sections: tuple[Any, ...] = (None, {}, {"device": None}, {"device": "auto"}, {"device": "none", "nvme_path": "/x"})
    for section in sections:
        found = offload_of(section, section, None, stage=stage)
        assert not found and found.optimizer.tier == found.parameters.tier == "device"
        assert found.optimizer.gradients == "device" and found.optimizer_files is found.parameter_files is None
    assert offload_of(stage=stage).optimizer == OptimizerPolicy(gradients="device")


def test_everything_in_files() -> None:
    optimizer = NVME | {"buffer_count": 1, "pin_memory": False, "zs_gradients": "nvme", "zs_state": "8bit"}
    optimizer |= {"zs_max_in_cpu": "1.5MiB", "zs_early_update": True, "zs_block_numel": 1000}
    aio = {"block_size": 1e6, "queue_depth": 1000, "intra_op_parallelism": 3, "zs_store": "file", "zs_job": "a.b-1"}
    found = offload_of(
        optimizer,
        {"device": "nvme", "nvme_path": Path("/other"), "max_in_cpu": 5e3, "buffer_count": 7, "pin_memory": False},
        aio,
        stage=3,
        host_memory_limit="300MB",
        activation_memory="64 MiB",
    )
    options = {"block_size": 1003520, "queue_depth": 256, "threads": 3}
    assert found == Offload(
        optimizer=OptimizerPolicy(
            tier="files",
            max_resident=3 * 2**19,
            gradients="files",
            buffer_count=1,
            block_numel=960,
            early=True,
            eight_bit=True,
            pin_memory=False,
        ),
        parameters=ParameterPolicy(tier="files", max_resident=5000, buffer_count=7, pin_memory=False),
        optimizer_files=Files(folder="/fast", job="a.b-1", store="file", options=options),
        parameter_files=Files(folder="/other", job="a.b-1", store="file", options=options),
        host_memory_limit=300_000_000,
        activation_nbytes=2**26,
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_host_memory(stage: int) -> None:
    found = offload_of({"device": "cpu", "ratio": 0.25}, stage=stage)
    assert (found.optimizer.tier, found.optimizer.ratio, found.optimizer_files) == ("host", 0.25, None)
    assert bool(found) and found.optimizer.gradients == "auto" and found.optimizer.max_resident is None
    assert offload_of({"device": "cpu", "zs_gradients": "cpu"}, stage=stage).optimizer.gradients == "host"
    assert offload_of({"device": "cpu", "zs_gradients": "device"}, stage=stage).optimizer.gradients == "device"
    spilled = offload_of({**NVME, "device": "cpu", "zs_gradients": "nvme"}, stage=stage)
    assert spilled.optimizer.gradients == "files" and spilled.optimizer_files == Files(folder="/fast")


@pytest.mark.parametrize("name", ["super_offload", "zs_early_update"])
def test_two_names_of_an_early_update(name: str) -> None:
    assert offload_of({"device": "cpu", name: True}, stage=3).optimizer.early
    assert not offload_of({"device": "cpu", name: False}, stage=3).optimizer.early


def test_parameters_that_stay_in_host_memory() -> None:
    """DeepSpeed's default without a limit; with one what fits, unless a number is given."""
    assert offload_of(None, NVME, stage=3).parameters.max_resident == 1_000_000_000
    limit = {"host_memory_limit": "1GiB"}
    for auto in ({}, {"max_in_cpu": "auto"}, {"max_in_cpu": None}):
        assert offload_of(None, NVME | auto, stage=3, **limit).parameters.max_resident is None
    assert offload_of(None, NVME | {"max_in_cpu": 0}, stage=3, **limit).parameters.max_resident == 0
    assert offload_of(None, NVME | {"max_in_cpu": 1e9}, stage=3, **limit).parameters.max_resident == 1_000_000_000


def test_the_store_chooses_what_is_not_given() -> None:
    assert AioConfig().files("/x") == Files(folder="/x", job=None, store="auto", options={})
    given = {"block_size": "1MiB", "thread_count": 2, "queue_depth": "auto", "overlap_events": False}
    assert validate(AioConfig, given).files("/x").options == {"block_size": 2**20, "threads": 2}
    assert validate(AioConfig, {"block_size": "8GiB"}).files("/x").options == {"block_size": 2**30}


@pytest.mark.parametrize(
    ("size", "own", "block"),
    [(1e9, None, BLOCK_NUMEL), (1e14, 640, 640), (1000, None, 960), (1000, 640, 640), (640, 1000, 640), (0, None, 64)],
)
def test_sub_group_size_caps_blocks(size: float, own: int | None, block: int) -> None:
    section = zero(stage=2, sub_group_size=size, offload_optimizer=NVME | ({"zs_block_numel": own} if own else {}))
    options = {key: value for key, value in section.options().items() if key != "prefetch"}
    assert offload_of(**options).optimizer.block_numel == block


def test_models_are_taken_like_mappings() -> None:
    keys = {"max_in_cpu": 5, **NVME}
    models = validate(OffloadOptimizerConfig, NVME), validate(OffloadParamConfig, keys), AioConfig(queue_depth=3)
    plain = offload_of(NVME, keys, {"queue_depth": 3}, stage=3, host_memory_limit=2**30)
    assert offload_of(*models, stage=3, host_memory_limit=2**30) == plain
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device: 'nvme' needs stage 1, 2 or 3 \(it is 0\)"):
        offload_of(models[0], stage=0)


# -- what is wrong ----------------------------------------------------------------------------------------------------


def test_everything_wrong_is_said_at_once_with_its_path() -> None:
    assert problems(
        offload_optimizer={"devise": "nvme", "ratio": 1.5, "zs_max_in_cpu": "3 x", "buffer_count": 0},
        offload_param={"device": "disk", "pin_memory": 1},
        aio={"use_gds": True, "zs_job": "../x", "block_size": 0},
        host_memory_limit="4 GiBs",
        activation_memory=-1,
    ) == [
        "activation_memory: Input should be greater than or equal to 0 (got -1)",
        "aio.block_size: Input should be greater than or equal to 1 (got 0)",
        "aio.use_gds: GPUDirect Storage is not there yet; files are read to host memory (got true)",
        "aio.zs_job: Input should be a name of letters, digits, '_', '-' and '.', 128 at most (got \"../x\")",
        'host_memory_limit: Input should be a number of bytes, or a string such as "2GiB" (got "4 GiBs")',
        "offload_optimizer.buffer_count: Input should be greater than or equal to 1 (got 0)",
        "offload_optimizer.devise: unknown key; did you mean 'device'?",
        "offload_optimizer.ratio: Input should be less than or equal to 1 (got 1.5)",
        'offload_optimizer.zs_max_in_cpu: Input should be a number of bytes, or a string such as "2GiB" (got "3 x")',
        "offload_param.device: Input should be 'none', 'cpu' or 'nvme' (got \"disk\")",
        "offload_param.pin_memory: Input should be true or false (got 1)",
    ]


CASES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"offload_optimizer": NVME, "stage": 0},
        ["offload_optimizer.device: 'nvme' needs stage 1, 2 or 3 (it is 0)"],
    ),
    (
        {"offload_optimizer": {"device": "cpu"}, "stage": 0},
        ["offload_optimizer.device: 'cpu' needs stage 1, 2 or 3 (it is 0)"],
    ),
    ({"offload_param": {"device": "cpu"}, "stage": 2}, ["offload_param.device: 'cpu' needs stage 3 (it is 2)"]),
    (
        {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme", "nvme_path": ""}},
        [
            "offload_optimizer.device: 'nvme' needs offload_optimizer.nvme_path: a folder",
            "offload_param.device: 'nvme' needs offload_param.nvme_path: a folder",
        ],
    ),
    (
        {"offload_optimizer": {"zs_gradients": "nvme", "zs_state": "8bit", "zs_early_update": True}},
        [
            f"offload_optimizer.{key}: needs offload_optimizer.device 'cpu' or 'nvme' (it is 'none')"
            for key in ("zs_early_update", "zs_gradients", "zs_state")
        ],
    ),
    (
        {"offload_optimizer": {"super_offload": True}},
        ["offload_optimizer.super_offload: needs offload_optimizer.device 'cpu' or 'nvme' (it is 'none')"],
    ),
    (
        {"offload_optimizer": {"device": "cpu", "zs_gradients": "nvme"}},
        ["offload_optimizer.zs_gradients: 'nvme' needs offload_optimizer.nvme_path: a folder"],
    ),
    (
        {"offload_optimizer": {"device": "cpu", "zs_max_in_cpu": 0}},
        ["offload_optimizer.zs_max_in_cpu: needs offload_optimizer.device 'nvme' (it is 'cpu')"],
    ),
    (
        {"offload_optimizer": NVME | {"ratio": 0.5, "zs_max_in_cpu": 5}},
        ["offload_optimizer.zs_max_in_cpu: offload_optimizer.ratio says what stays in memory too: give one of them"],
    ),
    (
        {"offload_optimizer": NVME | {"super_offload": True, "zs_early_update": False}},
        [f"offload_optimizer.super_offload: true is an early update, and {EARLY} is false: drop one of them"],
    ),
    ({"activation_memory": "1GiB"}, ["activation_memory: is a part of host_memory_limit, which is not given"]),
    (
        {"activation_memory": "1MiB", "host_memory_limit": 2**20},
        ["activation_memory: 1048576 bytes leave nothing of host_memory_limit (1048576 bytes)"],
    ),
    (
        {"aio": {"thread_count": 2, "intra_op_parallelism": 4}},
        ["aio.thread_count: is the old name of intra_op_parallelism, which is 4: drop one of them"],
    ),
    ({"offload_optimizer": "cpu"}, ['offload_optimizer: Input should be an object (got "cpu")']),
    ({"aio": [1]}, ["aio: Input should be an object (got [1])"]),
    ({"host_memory_limit": 0}, ["host_memory_limit: Input should be greater than or equal to 1 (got 0)"]),
]


@pytest.mark.parametrize(("given", "texts"), CASES)
def test_rules(given: dict[str, Any], texts: list[str]) -> None:
    assert problems(**given) == texts


def test_the_same_rules_hold_for_a_configuration_with_its_own_names() -> None:
    name = "zero_optimization.offload_optimizer"
    assert said(zero_optimization={"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "cpu"}}) == [
        f"{name}.device: 'nvme' needs {name}.nvme_path: a folder",
        f"{name}.device: 'nvme' needs zero_optimization.stage 1, 2 or 3 (it is 0)",
        "zero_optimization.offload_param.device: 'cpu' needs zero_optimization.stage 3 (it is 0)",
    ]
    assert said(zs_activation_memory=5) == [
        "zs_activation_memory: is a part of zs_host_memory_limit, which is not given"
    ]
    assert said(zs_activation_memory="2GiB", zs_host_memory_limit="1GiB") == [
        "zs_activation_memory: 2147483648 bytes leave nothing of zs_host_memory_limit (1073741824 bytes)"
    ]
    assert said(aio={"thread_count": 1, "intra_op_parallelism": 1}, zero_optimization={"stage": 3}) == []


@pytest.mark.parametrize("wrong", [None, 3, [1], "auto", {"device": [1]}, {"device": "disk"}, {"nvme_path": 3}])
def test_rules_leave_wrong_types_to_the_sections(wrong: Any) -> None:
    zero = {"stage": wrong, "offload_optimizer": wrong, "offload_param": wrong, "cpu_offload_use_pin_memory": wrong}
    assert said(zero_optimization=zero, aio=wrong, zs_host_memory_limit=wrong) == []
    nested = {key: wrong for key in OffloadOptimizerConfig.model_fields if key not in ("device", "zs_max_in_cpu")}
    assert said(zero_optimization={"stage": 3, "offload_optimizer": nested}, zs_host_memory_limit="1GiB") == []


# -- old spellings ----------------------------------------------------------------------------------------------------


def test_old_spellings_are_the_sections() -> None:
    old = zero(stage=3, cpu_offload=True, cpu_offload_params=True, cpu_offload_use_pin_memory=False)
    new = zero(
        stage=3,
        offload_optimizer={"device": "cpu", "pin_memory": False},
        offload_param={"device": "cpu", "pin_memory": False},
    )
    assert old.options() == new.options()
    assert zero(stage=3, cpu_offload_param=True).options()["offload_param"].device == "cpu"
    assert zero(stage=1, cpu_offload=True, offload_optimizer={"buffer_count": 9}).optimizer_offload.buffer_count == 9
    for nothing in (False, None, "auto"):
        assert zero(stage=1, cpu_offload=nothing, cpu_offload_param=nothing).options() == zero(stage=1).options()
    assert zero(stage=1, cpu_offload=True, offload_optimizer={"device": "cpu"}).optimizer_offload.in_cpu


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"stage": 0, "cpu_offload": True}, "cpu_offload: true needs zero_optimization.stage 1, 2 or 3 (it is 0)"),
        ({"stage": 2, "cpu_offload_param": True}, "cpu_offload_param: true needs zero_optimization.stage 3 (it is 2)"),
        (
            {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}},
            "cpu_offload: true is the old way to say offload_optimizer.device 'cpu', and that is 'none': drop ",
        ),
        (
            {"stage": 2, "cpu_offload": False, "offload_optimizer": {"device": "cpu"}},
            "cpu_offload: false is the old way to say offload_optimizer.device 'none', and that is 'cpu': drop ",
        ),
        (
            {"stage": 3, "cpu_offload_params": False, "cpu_offload_param": True},
            "cpu_offload_params: is another name of cpu_offload_param, which says the opposite: drop one of them",
        ),
        (
            {
                "stage": 2,
                "cpu_offload_use_pin_memory": True,
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
            },
            "cpu_offload_use_pin_memory: is the old way to say offload_optimizer.pin_memory, which says the opposite: ",
        ),
    ],
)
def test_old_spellings_that_contradict(keys: dict[str, Any], text: str) -> None:
    (found,) = said(zero_optimization=keys)
    assert found.startswith(f"zero_optimization.{text}") and found.endswith(("drop one of them", ")"))


# -- the sections -----------------------------------------------------------------------------------------------------


def test_options_are_given_where_something_is_asked_for() -> None:
    assert zero(stage=3, offload_optimizer={"device": "none"}, offload_param={"pin_memory": True}).options() == {
        "stage": 3,
        "prefetch": True,
    }
    found = zero(stage=3, offload_optimizer=NVME, offload_param={"device": "cpu"}).options()
    assert found["offload_optimizer"].nvme_path == "/fast" and found["offload_param"].device == "cpu"
    assert TiersConfig().tiers_options() == {}
    given = validate(
        TiersConfig, {"aio": {"queue_depth": 2}, "zs_host_memory_limit": "4GiB", "zs_activation_memory": 5}
    )
    options = {"aio": AioConfig(queue_depth=2), "host_memory_limit": 2**32, "activation_memory": 5}
    assert given.tiers_options() == options


@pytest.mark.parametrize("section", [OffloadOptimizerConfig, OffloadParamConfig, AioConfig, TiersConfig])
def test_every_key_says_what_becomes_of_it(section: type[Any]) -> None:
    for name, info in section.model_fields.items():
        marks = [mark for mark in info.metadata if isinstance(mark, Note | Later)]
        assert marks or info.description or name == "aio", name
        assert not (marks and name.startswith("zs_")), name


def test_the_classes_of_deepspeeds_keys() -> None:
    sections = (OffloadOptimizerConfig, OffloadParamConfig, AioConfig)
    found = {
        f"{section.__name__}.{name}": mark.verdict
        for section in sections
        for name, info in section.model_fields.items()
        for mark in info.metadata
        if isinstance(mark, Note)
    }
    assert {key.partition(".")[2]: verdict for key, verdict in found.items()} == {
        **dict.fromkeys(["pipeline", "pipeline_read", "pipeline_write", "super_offload"], "equivalent"),
        **dict.fromkeys(["fast_init", "cpuadam_cores_perc", "single_submit"], "harmless"),
        **dict.fromkeys(["buffer_size", "thread_count", "overlap_events"], "equivalent"),
    }


# -- which optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "needs"),
    [(Lamb, "norms of whole parameters"), (Muon, "whole parameters"), (torch.optim.Adafactor, "whole")],
)
def test_optimizers_that_look_at_more_than_elements(kind: Any, needs: str) -> None:
    optimizer = kind(
        [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]} | ({"use_muon": True} if kind is Muon else {})]
    )
    requirements(optimizer, stage=1, allow_untested=False)
    text = rf"{kind.__name__} needs {needs}.*, and offload_optimizer\.device 'nvme' updates blocks of elements"
    with pytest.raises(ConfigError, match=text):
        requirements(optimizer, stage=1, allow_untested=False, files=True)


@pytest.mark.parametrize("kind", [Adam, Lion, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_element_wise_optimizers(kind: Any) -> None:
    optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1)
    assert set(requirements(optimizer, stage=3, allow_untested=False, files=True).values()) == {"elements"}


# -- what is said of it -----------------------------------------------------------------------------------------------


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        return True

    def info(self, text: str, *values: Any) -> None:
        self.lines.append(text % values)


class Monitor:
    def __init__(self) -> None:
        self.told: dict[str, float] = {}

    def scalar(self, name: str, value: float, step: int) -> None:
        self.told[name.removeprefix("Train/Samples/")] = value


def told(offloads: bool) -> tuple[list[str], dict[str, float]]:
    """The lines of two updates, one of them printed, and the scalars."""
    moved = {"read": {"optimizer": 3 << 20, "parameters": 1 << 19}, "written": {"optimizer": 1 << 20}}
    report = SimpleNamespace(**moved, stall_s=0.0125, overlap=0.875)
    optimizer = SimpleNamespace(offloads=offloads, offload_report=lambda: report)
    loop: Any = SimpleNamespace(global_steps=1, global_samples=4, skipped_steps=0, optimizer=optimizer)
    loop.get_lr, loop.get_mom, loop.get_global_grad_norm = (lambda: [0.1]), (lambda: [0.9]), (lambda: None)
    loop.loss_scale = lambda: 1.0
    log, monitor, observers = Log(), Monitor(), Observers()
    observers.add(monitor)
    lines: Any = LoopReport(observers, log, steps_per_print=2)  # type: ignore[arg-type]
    lines.updated(loop)
    loop.global_steps = 2
    lines.updated(loop)
    return log.lines, monitor.told


def test_one_line_and_the_scalars_say_what_was_moved() -> None:
    lines, scalars = told(offloads=True)
    assert len(lines) == 2
    assert lines[1] == "offload: read 3.5 MiB, written 1.0 MiB, stalled 12.5 ms, overlap 0.88"
    assert {name: value for name, value in scalars.items() if name.startswith("offload")} == {
        "offload_read_nbytes": 3.5 * 2**20,
        "offload_written_nbytes": 2**20,
        "offload_stall_ms": 12.5,
        "offload_overlap": 0.875,
    }


def test_nothing_is_said_where_nothing_is_offloaded() -> None:
    lines, scalars = told(offloads=False)
    assert len(lines) == 1 and not any(name.startswith("offload") for name in scalars)


def test_pydantic_is_not_needed_to_import() -> None:
    code = "import sys, zs_zero, zs_zero.tiers.policy; print('pydantic' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert made.stdout == "False\n"
