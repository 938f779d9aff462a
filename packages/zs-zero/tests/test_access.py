"""Single parameters: what is read and written by DeepSpeed's functions, in every precision and at every stage.

The losses are linear in the parameters with small whole coefficients, so gradients, their means and momenta are exact
in every dtype, and every number here is compared bit by bit.
"""

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import CollectiveLog, ConfigError, Group, RankDisagreement, ZsError
from zs_comm.testing import run_ranks

PRECISIONS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 masters": {"dtype": torch.bfloat16, "master_dtype": torch.bfloat16},
    "kahan": {"dtype": torch.bfloat16, "bf16_update": "kahan"},
    "fp16": {"dtype": torch.float16, "loss_scale": 64.0},
    "fp64": {"dtype": None},
}


class Linear(nn.Module):
    """Its loss is the sum of coefficients times parameters: `coefficients` are the gradients."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        self.shapes = {"weight": (5, 7), "bias": (3,), "other": (2, 9), "unused": (4,)}
        for index, (name, shape) in enumerate(self.shapes.items()):
            setattr(self, name, nn.Parameter(coefficients(name, shape, 100 + index).to(dtype) / 4))

    def forward(self, rank, micro=0):
        terms = [
            (getattr(self, name) * coefficients(name, shape, 10 * micro + rank)).sum()
            for name, shape in self.shapes.items()
            if name != "unused"
        ]
        return sum(terms)


def coefficients(name, shape, seed):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(name) + 31 * seed)).float()


def mean(name, world, micros=1):
    every = [coefficients(name, Linear().shapes[name], 10 * m + r) for m in range(micros) for r in range(world)]
    return sum(every) / world


def build(group, stage, precision="fp32", **options):
    model = Linear(torch.float64 if precision == "fp64" else torch.float32)
    client = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    return model, zs_zero.shard(model, client, stage=stage, mesh=group, **{**PRECISIONS[precision], **options})


def backward(model, optimizer, group, micro=0):
    optimizer.scale(model(group.rank, micro)).backward()


def same(value, expected):
    wide = torch.float64 if value is not None and value.dtype == torch.float64 else torch.float32
    return value is not None and value.dtype == wide and torch.equal(value, expected.to(wide))


def at_each_stage(group, go, *args):
    return [go(group, stage, *args) for stage in (0, 1, 2, 3)]


# -- whole values -----------------------------------------------------------------------------------------------------
def whole_values(group, stage, precision):
    model, optimizer = build(group, stage, precision)
    weight, start = model.weight, coefficients("weight", (5, 7), 100) / 4
    checks = {"param": same(zs_zero.safe_get_full_fp32_param(weight), start)}
    backward(model, optimizer, group)
    backward(model, optimizer, group, micro=1)
    grad = mean("weight", group.size, 2)
    checks["grad"] = same(zs_zero.safe_get_full_grad(weight), grad)
    checks["unused grad"] = zs_zero.safe_get_full_grad(model.unused) is None
    checks["no state yet"] = zs_zero.safe_get_full_optimizer_state(weight, "momentum_buffer") is None
    every = torch.cat([mean(name, group.size, 2).flatten() for name in ("weight", "bias", "other")])
    checks["norm"] = float(optimizer.grad_norm()) == pytest.approx(float(every.double().norm()), rel=1e-6)
    optimizer.step()
    checks["stepped"] = same(zs_zero.safe_get_full_fp32_param(weight), start - grad / 2)
    checks["state"] = same(zs_zero.safe_get_full_optimizer_state(weight, "momentum_buffer"), grad)
    checks["no state"] = zs_zero.safe_get_full_optimizer_state(weight, "nonsense") is None

    # what is set is what the next step works on: 2 - 0.5 * (0.5 * 4 + 6)
    value = torch.arange(35.0).view(5, 7)
    zs_zero.safe_set_full_fp32_param(weight, value)
    zs_zero.safe_set_full_optimizer_state(weight, torch.full((5, 7), 4.0), "momentum_buffer")
    backward(model, optimizer, group)
    zs_zero.safe_set_full_grad(weight, torch.full((5, 7), 6.0))
    zs_zero.safe_set_full_grad(model.unused, torch.full((4,), 2.0))
    checks["set"] = (
        same(zs_zero.safe_get_full_fp32_param(weight), value)
        and same(zs_zero.safe_get_full_grad(weight), torch.full((5, 7), 6.0))
        and same(zs_zero.safe_get_full_optimizer_state(weight, "momentum_buffer"), torch.full((5, 7), 4.0))
    )
    optimizer.step()
    checks["used"] = same(zs_zero.safe_get_full_fp32_param(weight), value - 4)
    checks["used unused"] = same(
        zs_zero.safe_get_full_fp32_param(model.unused), coefficients("unused", (4,), 103) / 4 - 1
    )
    with zs_zero.gathered(model):
        checks["model"] = torch.equal(weight.float(), (value - 4).to(weight.dtype).float())
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_values_in_every_precision_and_stage(precision):
    assert run_ranks(at_each_stage, 2, whole_values, precision) == [[[]] * 4] * 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_values_on_one_rank(precision):
    assert whole_values(Group.single(), 3, precision) == []


# -- this rank's part -------------------------------------------------------------------------------------------------
def local_values(group, stage, precision):
    model, optimizer = build(group, stage, precision)
    backward(model, optimizer, group)
    optimizer.step()
    backward(model, optimizer, group)
    found, checks = {}, {}
    for name in model.shapes:
        param = getattr(model, name)
        own = optimizer.local_slice(param)
        values = zs_zero.safe_get_local_fp32_param(param)
        state = zs_zero.safe_get_local_optimizer_state(param, "momentum_buffer")
        grad = zs_zero.safe_get_local_grad(param)
        checks[f"{name} value"] = torch.equal(values, zs_zero.safe_get_full_fp32_param(param).flatten()[own])
        if name == "unused":
            checks["unused"] = grad is state is None
        else:
            checks[f"{name} grad"] = torch.equal(grad, mean(name, group.size).flatten()[own])
            momentum = zs_zero.safe_get_full_optimizer_state(param, "momentum_buffer").flatten()[own]
            checks[f"{name} state"] = torch.equal(momentum, torch.zeros(0) if state is None else state)
        found[name] = own
    # parts of 0, 1, 2 ... put together are the whole
    weight = model.weight
    own = found["weight"]
    zs_zero.safe_set_local_fp32_param(weight, torch.arange(35.0)[own])
    zs_zero.safe_set_local_grad(weight, torch.full((35,), 6.0)[own])
    if zs_zero.safe_get_local_optimizer_state(weight, "momentum_buffer") is not None:
        zs_zero.safe_set_local_optimizer_state(weight, torch.full((35,), 4.0)[own], "momentum_buffer")
    with zs_zero.gathered(model):
        checks["spread"] = torch.equal(weight.float(), torch.arange(35.0).view(5, 7))
    checks["whole"] = same(zs_zero.safe_get_full_fp32_param(weight), torch.arange(35.0).view(5, 7))
    optimizer.step()
    checks["used"] = same(zs_zero.safe_get_full_fp32_param(weight), torch.arange(35.0).view(5, 7) - 4)
    return [name for name, good in checks.items() if not good], found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "kahan"])
def test_local_parts_are_disjoint_and_together_the_whole(precision):
    for stage, results in enumerate(zip(*run_ranks(at_each_stage, 2, local_values, precision), strict=True)):
        assert [failed for failed, _ in results] == [[], []], stage
        for name, shape in Linear().shapes.items():
            owned = [index for _, found in results for index in range(found[name].start, found[name].stop)]
            whole = list(range(torch.Size(shape).numel()))
            assert owned == (whole * 2 if stage == 0 else whole), (stage, name)


# -- several at a time ------------------------------------------------------------------------------------------------
def vectorised(group, stage, precision):
    model, optimizer = build(group, stage, precision)
    params = list(model.parameters())
    seen = []

    def halve(grad, param):
        seen.append((tuple(grad.shape), param.shape == grad.shape))
        return grad.mul_(0.5) if param is model.weight else grad * 3

    backward(model, optimizer, group)
    optimizer.grad_norm()  # what is not reduced yet, is
    log = CollectiveLog()
    group.observers.add(log)
    zs_zero.safe_update_full_grad_vectorized(params, halve)
    group.observers.remove(log)
    gathers = sum(count.count for (op, _), count in log.counts.items() if op == "all_gather")
    expected = {"weight": 0.5, "bias": 3.0, "other": 3.0}
    grads = {name: zs_zero.safe_get_full_grad(getattr(model, name)) for name in expected}
    good = all(same(grads[name], factor * mean(name, group.size)) for name, factor in expected.items())
    return good, sorted(seen), gathers, zs_zero.safe_get_full_grad(model.unused)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_function_updates_all_gradients_with_one_gather(precision):
    for stage, results in enumerate(zip(*run_ranks(at_each_stage, 2, vectorised, precision), strict=True)):
        for good, seen, gathers, unused in results:
            assert good and seen == [((2, 9), True), ((3,), True), ((5, 7), True)] and unused is None, stage
            assert gathers == (0 if stage == 0 else 1), stage  # the three are in one flat buffer
    assert vectorised(Group.single(), 2, precision)[0]


# -- what is refused --------------------------------------------------------------------------------------------------
def refused(group):
    model, optimizer = build(group, 2)
    weight, mine = model.weight, torch.full((5, 7), float(group.rank))
    raised = {}

    def attempt(name, call, *args):
        try:
            call(*args)
        except ZsError as error:
            raised[name] = (type(error).__name__, str(error))

    attempt("differs", zs_zero.safe_set_full_fp32_param, weight, mine)
    attempt("grad differs", zs_zero.safe_set_full_grad, weight, mine)
    attempt("one rank", zs_zero.safe_set_full_fp32_param, weight, torch.zeros(35 if group.rank else 2))
    attempt("early", zs_zero.safe_set_full_optimizer_state, weight, mine * 0, "momentum_buffer")
    own = optimizer.local_slice(weight)
    attempt("part", zs_zero.safe_set_local_fp32_param, weight, torch.zeros(own.stop - own.start + group.rank))
    backward(model, optimizer, group)
    attempt("update", zs_zero.safe_update_full_grad_vectorized, [weight], lambda grad, _: grad + group.rank)
    attempt("shape", zs_zero.safe_update_full_grad_vectorized, [weight], lambda grad, _: grad[0])
    optimizer.step()
    attempt("state", zs_zero.safe_set_full_optimizer_state, weight, torch.zeros(3), "momentum_buffer")
    attempt("state differs", zs_zero.safe_set_full_optimizer_state, weight, mine, "momentum_buffer")
    attempt("stranger", zs_zero.safe_set_full_grad, nn.Parameter(torch.zeros(2)), torch.zeros(2))
    untouched = same(optimizer.full_param(weight), coefficients("weight", (5, 7), 100) / 4 - mean("weight", 2) / 2)
    return raised, untouched


def test_bad_values_are_errors_on_every_rank_and_change_nothing():
    first, second = run_ranks(refused, 2)
    assert first[1] and second[1]
    for name in ("differs", "grad differs", "state differs", "update"):
        for raised, _ in (first, second):
            kind, text = raised[name]
            assert kind == RankDisagreement.__name__ and "differs between the ranks" in text
            assert "rank 0: checksum " in text and text.replace("\n", "").isprintable()
    assert "the value given for 'weight'" in first[0]["differs"][1]
    assert "rank 0 failed with ConfigError: value of shape (2,)" in second[0]["one rank"][1]
    assert first[0]["one rank"] == ("ConfigError", "value of shape (2,) for a parameter of shape (5, 7)")
    assert "no state 'momentum_buffer' of 'weight'; before the first update" in first[0]["early"][1]
    assert "this rank owns" in second[0]["part"][1] and "rank 1 failed" in first[0]["part"][1]
    assert "value of shape (7,)" in first[0]["shape"][1]
    assert "has another shape than the value (3,)" in first[0]["state"][1]
    assert "is no parameter of a sharded model" in first[0]["stranger"][1]


def test_tensors_that_are_not_sharded():
    param = nn.Parameter(torch.ones(2))
    assert zs_zero.safe_get_full_fp32_param(param) is zs_zero.safe_get_full_grad(param) is None
    assert zs_zero.safe_get_full_optimizer_state(param, "exp_avg") is None
    assert zs_zero.safe_get_local_fp32_param(torch.ones(2)) is zs_zero.safe_get_local_grad(param) is None
    for call in (zs_zero.safe_set_full_fp32_param, zs_zero.safe_set_local_fp32_param, zs_zero.safe_set_local_grad):
        with pytest.raises(ConfigError, match="no parameter of a sharded model"):
            call(param, torch.ones(2))


def frozen_and_released(group):
    """Frozen parameters have values only; a model without an optimizer too."""
    model = Linear()
    model.bias.requires_grad_(False)
    zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=1.0), stage=3, mesh=group, dtype=torch.bfloat16)
    frozen = zs_zero.safe_get_full_fp32_param(model.bias), zs_zero.safe_get_full_optimizer_state(model.bias, "x")
    zs_zero.safe_set_full_fp32_param(model.bias, torch.ones(3))
    evaluated = Linear()
    zs_zero.shard(evaluated, stage=3, mesh=group)
    return frozen, zs_zero.safe_get_full_fp32_param(model.bias), zs_zero.safe_get_full_fp32_param(evaluated.weight)


def test_frozen_parameters_and_evaluation():
    for (value, state), after, evaluated in run_ranks(frozen_and_released, 2):
        assert torch.equal(value, coefficients("bias", (3,), 101) / 4) and state is None
        assert torch.equal(after, torch.ones(3)) and torch.equal(evaluated, coefficients("weight", (5, 7), 100) / 4)
