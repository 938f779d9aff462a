"""What the functions of `optim` take, and what they refuse, naming it, before anything changes. Needs no library."""

from __future__ import annotations

import array
import math
import struct
from typing import Any

import pytest
from zs_offload_aio import optim

NUMBERS: dict[str, Any] = {"step": 1, "lr": 0.1, "weight_decay": 0.0}


def floats(*values: float) -> array.array[float]:
    return array.array("f", values)


def arguments(**changes: Any) -> dict[str, Any]:
    given = {"param": floats(1, 2, 3), "grad": floats(1, -1, 0), "exp_avg": floats(0, 0, 0)}
    return {**given, "exp_avg_sq": floats(0, 0, 0), **NUMBERS, **changes}


def test_plain_buffers() -> None:
    param, out = floats(1, 2, 3), bytearray(6)
    optim.adamw(**arguments(param=param, out=memoryview(out).cast("H")))
    assert param.tolist() == pytest.approx([0.9, 2.1, 3.0])
    assert struct.unpack("=HHH", out) == (0x3F66, 0x4006, 0x4040)  # bf16 of 0.9, 2.1 and 3


@pytest.mark.parametrize("isa", optim.isas())
def test_memory_at_odd_addresses(isa: str) -> None:
    memory = bytearray(4 * 100 + 1)
    param = memoryview(memory)[1:].cast("f")
    for index in range(100):
        param[index] = index
    optim.sgd(param, floats(*[1.0] * 100), step=1, lr=0.5, isa=isa)
    assert param.tolist() == [index - 0.5 for index in range(100)]


def test_half_gradients_and_bits_of_bfloat16() -> None:
    half = memoryview(struct.pack("<eee", 1, -2, 0.5)).cast("B").cast("e") if _casts_to_half() else None
    bf16 = array.array("H", [0x3F80, 0xC000, 0x3F00])  # the same numbers
    for grad in filter(None, (half, bf16)):
        param = floats(0, 0, 0)
        optim.sgd(param, grad, step=1, lr=1.0)
        assert param.tolist() == [-1, 2, -0.5]
        assert optim.sum_of_squares(grad) == (5.25, True)


def _casts_to_half() -> bool:
    try:
        memoryview(b"ab").cast("e")
    except ValueError:  # before CPython 3.12
        return False
    return True


def test_bf16_states_as_bits() -> None:
    param = array.array("H", [0x3F80, 0x4000])
    optim.lion(param, floats(1, -1), array.array("H", [0, 0]), lr=0.5)
    assert param.tolist() == [0x3F00, 0x4020]


def test_no_elements() -> None:
    empty = floats()
    optim.adamw(empty, floats(), floats(), floats(), step=1, lr=0.1, out=floats())
    assert optim.sum_of_squares(empty) == (0.0, True)


def test_the_first_step_of_sgd_starts_the_momentum() -> None:
    param, buffer = floats(0), floats(99)
    optim.sgd(param, floats(2), buffer, step=1, lr=1.0, momentum=0.5, dampening=0.5)
    assert (param[0], buffer[0]) == (-2.0, 2.0)
    optim.sgd(param, floats(2), buffer, step=2, lr=1.0, momentum=0.5, dampening=0.5)
    assert (param[0], buffer[0]) == (-4.0, 2.0)


def strided() -> memoryview:
    return memoryview(floats(*range(6)))[::2]


_shared = floats(*range(8))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"param": None}, TypeError, "param must not be None"),
        ({"grad": None}, TypeError, "grad must not be None"),
        ({"exp_avg": None}, TypeError, "exp_avg must not be None"),
        ({"exp_avg_sq": None}, TypeError, "exp_avg_sq must not be None"),
        ({"param": [1.0, 2.0, 3.0]}, TypeError, "param: a buffer, an array or a CPU tensor"),
        ({"grad": array.array("d", [1, 2, 3])}, TypeError, "grad has elements of format 'd'"),
        ({"grad": bytes(12)}, TypeError, "grad has elements of format 'B'"),
        ({"exp_avg": array.array("H", [0, 0, 0])}, TypeError, "exp_avg is bfloat16, param float32"),
        ({"out": array.array("i", [0, 0, 0])}, TypeError, "out has elements of format 'i'"),
        ({"grad": floats(1, 2)}, ValueError, "grad has 2 elements, param 3"),
        ({"exp_avg_sq": floats(1, 2, 3, 4)}, ValueError, "exp_avg_sq has 4 elements, param 3"),
        ({"out": floats(1)}, ValueError, "out has 1 elements, param 3"),
        ({"param": memoryview(bytes(12)).cast("f")}, ValueError, "param must be contiguous and writable"),
        ({"out": memoryview(bytes(12)).cast("f")}, ValueError, "out must be contiguous and writable"),
        ({"grad": strided()}, ValueError, "grad must be contiguous"),
        ({"param": strided()}, ValueError, "param must be contiguous"),
        ({"step": 0}, ValueError, "step counts from 1: 0"),
        ({"step": 1.5}, TypeError, "integer"),
        ({"lr": math.nan}, ValueError, "lr must be finite and not negative: nan"),
        ({"lr": -0.1}, ValueError, "lr must be"),
        ({"lr": "fast"}, TypeError, "'<=' not supported"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, ValueError, "betas must be"),
        ({"eps": math.inf}, ValueError, "eps must be"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be"),
        ({"factor": math.inf}, ValueError, "factor must be finite in fp32"),
        ({"factor": 1e39}, ValueError, "factor must be finite in fp32"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"isa": "mmx"}, ValueError, "isa=mmx: unknown"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    given = arguments(**changes)
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    before = {name: bytes(given[name]) for name in names if isinstance(given[name], array.array)}
    with pytest.raises(error, match=match):
        optim.adamw(**given)
    assert before == {name: bytes(given[name]) for name in before}


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("param", "grad"), "param and grad overlap"),
        (("param", "out"), "param and out overlap"),
        (("exp_avg", "exp_avg_sq"), "exp_avg and exp_avg_sq overlap"),
        (("grad", "out"), "out and grad overlap"),
    ],
)
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_overlapping_memory_is_refused(names: tuple[str, str], match: str, shift: int) -> None:
    views = memoryview(_shared)[:3], memoryview(_shared)[shift : shift + 3]
    before = _shared.tolist()
    a, b = match.removesuffix(" overlap").split(" and ")
    with pytest.raises(ValueError, match=f"({a} and {b}|{b} and {a}) overlap in memory"):
        optim.adamw(**arguments(**dict(zip(names, views, strict=True))))
    assert _shared.tolist() == before


def test_neighbours_in_memory_are_not_an_overlap() -> None:
    memory = memoryview(floats(*range(6)))
    optim.sgd(memory[:3], memory[3:], step=1, lr=1.0)
    assert memory.tolist() == [-3, -3, -3, 3, 4, 5]


def test_the_other_functions_check_their_numbers() -> None:
    param, grad, state = floats(1), floats(1), floats(0)
    with pytest.raises(ValueError, match="nesterov needs momentum and no dampening"):
        optim.sgd(param, grad, state, step=1, lr=0.1, nesterov=True)
    with pytest.raises(TypeError, match="momentum_buffer must not be None"):
        optim.sgd(param, grad, step=1, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="dampening must be finite"):
        optim.sgd(param, grad, state, step=1, lr=0.1, momentum=0.9, dampening=math.nan)
    with pytest.raises(ValueError, match="lr_decay must be"):
        optim.adagrad(param, grad, state, step=1, lr=0.1, lr_decay=-1.0)
    with pytest.raises(TypeError, match="sum must not be None"):
        optim.adagrad(param, grad, None, step=1, lr=0.1)
    with pytest.raises(ValueError, match="betas must be"):
        optim.lion(param, grad, state, lr=0.1, betas=(1.0, 0.9))
    with pytest.raises(TypeError, match="grad has elements of format"):
        optim.sum_of_squares(b"abc")
    assert (param[0], state[0]) == (1.0, 0.0)
