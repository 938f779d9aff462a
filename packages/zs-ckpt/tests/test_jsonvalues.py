"""Values of Python in JSON and back."""

import json
import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zs_ckpt.jsonvalues import NotJson, decode, encode

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
)
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "__zs__", "__zs__x", "value", ""]), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
        | st.frozensets(st.integers(), max_size=4)
    ),
    max_leaves=12,
)


def there_and_back(value):
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b) if isinstance(a, float) else a == b


@given(values)
def test_values_come_back_as_they_were(value):
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        -0.0,
        2**53 + 1,
        -(2**200),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cuda:1"),
        b"\x00\xff",
    ],
)
def test_what_json_lacks(value):
    found = there_and_back([value])[0]
    assert same(found, value) or found == value
    assert type(found) is type(value)


def test_nan_and_scalars_of_numpy():
    assert math.isnan(there_and_back(math.nan))
    import numpy

    assert there_and_back(numpy.float32(0.5)) == 0.5 and there_and_back(numpy.int64(7)) == 7


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 5)])
def test_small_tensors(dtype, shape):
    value = (torch.randn(shape) * 10).to(dtype)
    found = there_and_back({"rng": value})["rng"]
    assert found.dtype == dtype and torch.equal(found, value)


def test_subclasses_come_back_as_their_base():
    assert there_and_back(OrderedDict(b=1, a=2)) == {"b": 1, "a": 2}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [object()]}, "client.a[0]: a builtins.object"),
        ({"f": torch.zeros(1 << 20)}, "client.f: a tensor"),
        (lambda: 0, "function"),
    ],
)
def test_what_has_no_form_is_named(value, words):
    with pytest.raises(NotJson) as caught:
        encode(value, "client")
    assert words in str(caught.value)


def test_depth_is_bounded():
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(NotJson):
        encode(deep)
    with pytest.raises(ValueError):
        decode([deep] * 1 if deep is None else nested(200))


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"__zs__": "pickle", "value": "gASVAAAA"},
        {"__zs__": "tuple"},
        {"__zs__": "tuple", "value": 3},
        {"__zs__": ["tuple"], "value": []},
        {"__zs__": "bytes", "value": "a"},
        {"__zs__": "bytes", "value": 3},
        {"__zs__": "int", "value": "x"},
        {"__zs__": "int", "value": 3},
        {"__zs__": "float", "value": "1.0"},
        {"__zs__": "dict", "value": [[1]]},
        {"__zs__": "dict", "value": [[1, 2], [1, 3]]},
        {"__zs__": "dict", "value": [[[1], 2]]},
        {"__zs__": "set", "value": [[]]},
        {"__zs__": "dtype", "value": "load"},
        {"__zs__": "device", "value": "/etc/passwd"},
        {"__zs__": "size", "value": [-1]},
        {"__zs__": "tensor", "value": {"dtype": "float32", "shape": [1 << 40], "data": ""}},
        {"__zs__": "tensor", "value": {"dtype": "load", "shape": [0], "data": ""}},
        {"__zs__": "tensor", "value": 5},
        {"__zs__": "complex", "value": [1]},
        {"__zs__": "complex", "value": ["a", "b"]},
        {"__zs__": "tuple", "value": [], "more": 1},
    ],
)
def test_what_no_encode_gives_is_refused(value):
    with pytest.raises(ValueError):
        decode([value])
