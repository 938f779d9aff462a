"""States in host memory for a while, one reduction for several backwards, and what is left after the end."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import zs_zero
from torch import nn
from zs_comm import CollectiveLog, ConfigError, Group, ZsError
from zs_comm.memory import live_tensor_nbytes
from zs_comm.testing import run_ranks

ALL = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.tok = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(width, 11)

    def forward(self, ids):
        x = self.tok(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def build(group, stage, seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, zs_zero.shard(model, client, stage=stage, mesh=group, **options)


def backward(model, group, number, seed=0):
    ids = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(100 * seed + 10 * number + group.rank))
    F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten()).backward()


def finish(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def at_each_stage(group, go, *args):
    return [go(group, stage, *args) for stage in (0, 1, 2, 3)]


# -- offload_states ---------------------------------------------------------------------------------------------------
def away_and_back(group, stage, options):
    """States leave between steps, and in the middle of a window; the training does not notice."""
    losses = []
    for leaves in (False, True):
        model, optimizer = build(group, stage, **options)
        for step in range(3):
            backward(model, group, 2 * step)
            if leaves:
                optimizer.offload_states()
                optimizer.reload_states()
            backward(model, group, 2 * step + 1)
            finish(optimizer)
            if leaves:
                include = [{"lp_params", "hp_params"}, ["optim_states"], None][step]
                optimizer.offload_states(include=include, pin_memory=False, non_blocking=True)
                optimizer.reload_states(non_blocking=True)
        losses.append(zs_zero.full_state_dict(model, masters=True))
    return same(*losses)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "grad_accum_dtype": torch.float32}],
    ids=["fp32", "bf16", "accumulates in fp32"],
)
def test_training_goes_on_with_the_same_bits(options):
    assert run_ranks(at_each_stage, 2, away_and_back, options) == [[True] * 4] * 2
    assert away_and_back(Group.single(), 0, options)


def freed(group, stage, include):
    model, optimizer = build(group, stage, dtype=torch.bfloat16)
    backward(model, group, 0)
    finish(optimizer)
    backward(model, group, 1)
    flats = optimizer._runtime.flats
    gradients = [param.grad for param in model.parameters()] + [flat.grad for flat in flats]
    tensors = {
        "optim_states": [value for state in optimizer.state.values() for value in state.values()],
        "hp_params": [flat.master for flat in flats],
        "lp_params": [flat.whole for flat in flats] + [flat.shard for flat in flats],
        "lp_grads": [grad for grad in gradients if grad is not None],
    }
    before = {name: [tensor.untyped_storage().nbytes() for tensor in group] for name, group in tensors.items()}
    optimizer.offload_states(include=include)
    away = {name for name, group in tensors.items() if not any(t.untyped_storage().nbytes() for t in group)}
    optimizer.reload_states()
    after = {name: [tensor.untyped_storage().nbytes() for tensor in group] for name, group in tensors.items()}
    return away, before == after, all(sum(nbytes) for nbytes in before.values())


@pytest.mark.parametrize("include", ["optim_states", "hp_params", "lp_params", "lp_grads", None])
def test_what_leaves_has_no_memory_meanwhile(include):
    expected = set(ALL) - {"contiguous_grad_buffer"} if include is None else {include}
    for results in run_ranks(at_each_stage, 2, freed, None if include is None else [include]):
        # at stage 3 nothing is whole between backwards, as after a release
        assert all(same_sizes and there for _, same_sizes, there in results), include
        assert [away for away, _, _ in results] == [expected] * 4


def in_between(group, stage):
    """What may be done while states are away, and what says what is missing."""
    model, optimizer = build(group, stage, dtype=torch.bfloat16)
    backward(model, group, 0)
    finish(optimizer)
    values = zs_zero.full_state_dict(model, masters=True)
    raised = {}

    def attempt(name, call):
        with pytest.raises(ZsError) as info:
            call()
        raised[name] = str(info.value)

    optimizer.offload_states(include=["optim_states", "hp_params"])
    with torch.no_grad():
        model(torch.arange(5)[None])  # parameters are there
    for name, call in {
        "step": optimizer.step,
        "norm": optimizer.grad_norm,
        "zero_grad": optimizer.zero_grad,
        "param": lambda: optimizer.full_param(model.head.weight),
        "state_dict": optimizer.state_dict,
        "load": lambda: zs_zero.load_full_state_dict(model, values),
        "save": lambda: list(optimizer.__zs_shardable__().pieces()),
        "restore": lambda: list(optimizer.__zs_shardable__().places({}, {})),
    }.items():
        attempt(name, call)
    assert set(raised.values()) == {"offload_states() took optim_states, hp_params: call reload_states() first"}, raised
    raised.clear()
    optimizer.offload_states()
    attempt("forward", lambda: model(torch.arange(5)[None]))
    attempt("read", lambda: model.head.weight.sum())
    attempt("whole", lambda: zs_zero.full_state_dict(model))
    assert all("is in host memory until reload_states()" in text for text in raised.values()), raised
    optimizer.reload_states()
    optimizer.reload_states()  # nothing is away
    optimizer.abort_step()
    again = zs_zero.full_state_dict(model, masters=True)
    model(torch.arange(5)[None])
    return same(values, again), isinstance(model.head.weight, nn.Parameter)


def test_using_what_is_away_is_an_error():
    assert run_ranks(at_each_stage, 2, in_between) == [[(True, True)] * 4] * 2


def during(group, stage):
    """Gradients that come while others are away are added; a backward through parameters that left raises."""
    results = []
    for leaves in (False, True):
        model, optimizer = build(group, stage)
        backward(model, group, 0)
        if leaves:
            optimizer.offload_states(include=["lp_grads", "optim_states"])
        backward(model, group, 1)
        if leaves:
            optimizer.reload_states()
        finish(optimizer)
        results.append(zs_zero.full_state_dict(model))
    loss = model(torch.arange(5)[None]).sum()
    optimizer.offload_states()
    with pytest.raises((RuntimeError, ZsError)):
        loss.backward()
    optimizer.reload_states()
    optimizer.abort_step()
    backward(model, group, 2)
    finish(optimizer)
    return same(*results)


def test_backwards_meanwhile():
    assert run_ranks(at_each_stage, 2, during) == [[True] * 4] * 2


def test_bad_arguments_of_offload_states():
    model, optimizer = build(Group.single(), 0)
    with pytest.raises(ConfigError, match=r"takes optim_states, .* \(got weights\)"):
        optimizer.offload_states(include=["weights", "lp_params"])
    with pytest.raises(ConfigError, match="device=.* is 'cpu' or 'none' .got 'nvme'"):
        optimizer.offload_states(device="nvme")
    optimizer.offload_states(device="none")
    with zs_zero.gathered(model), pytest.raises(ConfigError, match="offload_states.. inside"):
        optimizer.offload_states()
    backward(model, Group.single(), 0)
    finish(optimizer)


# -- coalesce_grad_reduction ------------------------------------------------------------------------------------------
def coalesced(group, stage):
    found, sent = {}, {}
    for how in ("each", "no_sync", "coalesced", "two blocks"):
        model, optimizer = build(group, stage)
        backward(model, group, 0)
        finish(optimizer)
        log = CollectiveLog()
        group.observers.add(log)
        if how == "coalesced":
            with optimizer.coalesce_grad_reduction():
                for number in range(3):
                    backward(model, group, number)
        elif how == "two blocks":
            for numbers in ((0, 1), (2,)):
                with optimizer.coalesce_grad_reduction():
                    for number in numbers:
                        backward(model, group, number)
        else:
            for number in range(3):
                if how == "no_sync" and number < 2:
                    with optimizer.no_sync():
                        backward(model, group, number)
                else:
                    backward(model, group, number)
        if how != "coalesced":
            optimizer.grad_norm()
        group.observers.remove(log)
        counts = {op: count.wire_nbytes for (op, _), count in log.counts.items()}
        sent[how] = counts.get("reduce_scatter", 0) if stage else counts["all_reduce"]
        finish(optimizer)
        found[how] = zs_zero.full_state_dict(model)
    close = all(
        torch.allclose(found["coalesced"][name], value, rtol=1e-4, atol=1e-6) for name, value in found["each"].items()
    )
    bitwise = same(found["coalesced"], found["no_sync"])
    return close, bitwise, sent["each"] / sent["coalesced"], sent["two blocks"] / sent["coalesced"]


def test_several_backwards_are_reduced_once():
    for results in run_ranks(at_each_stage, 2, coalesced):
        for stage, (close, bitwise, each, two) in enumerate(results):
            assert close and bitwise, stage
            assert each == pytest.approx(3 if stage >= 2 else 1, rel=0.1), stage
            assert two == pytest.approx(2, rel=0.1), stage


def misused(group, stage):
    model, optimizer = build(group, stage)
    raised = []

    def attempt(call):
        with pytest.raises(ConfigError) as info:
            call()
        raised.append(str(info.value))

    before = zs_zero.full_state_dict(model)
    with optimizer.coalesce_grad_reduction():
        backward(model, group, 0)
        attempt(optimizer.step)
        attempt(optimizer.grad_norm)
        attempt(lambda: optimizer.coalesce_grad_reduction().__enter__())
    with optimizer.no_sync():
        attempt(lambda: optimizer.coalesce_grad_reduction().__enter__())
    untouched = same(before, zs_zero.full_state_dict(model))
    with pytest.raises(ZeroDivisionError), optimizer.coalesce_grad_reduction():
        1 / 0  # noqa: B018
    optimizer.zero_grad()
    backward(model, group, 1)
    finish(optimizer)
    return raised, untouched


def test_what_does_not_belong_inside():
    inside, nested = "gradients are local inside coalesce_grad_reduction()", "inside of itself or of no_sync()"
    for results in run_ranks(at_each_stage, 2, misused):
        for raised, untouched in results:
            assert untouched and [inside in raised[0], inside in raised[1]] == [True, True]
            assert nested in raised[2] and nested in raised[3]


# -- the end ----------------------------------------------------------------------------------------------------------
def hooks_of(model):
    names = (
        "_forward_hooks _forward_pre_hooks _backward_hooks _state_dict_pre_hooks _load_state_dict_post_hooks".split()
    )
    with torch._C.DisableTorchFunctionSubclass():
        found = [getattr(p, name) for p in model.parameters() for name in ("_post_accumulate_grad_hooks", names[2])]
    found += [getattr(module, name) for module in model.modules() for name in names]
    return sum(len(hooks) for hooks in found if hooks)


def closed(group, stage, how):
    gc.freeze()  # what torch brought along need not be looked through
    start = live_tensor_nbytes()
    model, optimizer = build(group, stage, dtype=torch.bfloat16)
    plain = sum(param.numel() for param in model.parameters()) * 2
    client, runtime = optimizer.inner, weakref.ref(optimizer._runtime)
    backward(model, group, 0)
    finish(optimizer)
    backward(model, group, 1)  # a window is open
    if how == "local":
        optimizer.grad_norm()  # else reductions under way keep their buffers until they are through
    if how == "away":
        optimizer.offload_states()
    expected = zs_zero.full_state_dict(model) if how in ("states", "parameters") else None
    optimizer.close(states=how == "states", parameters=how != "local")
    gc.collect()
    dicts = [name for p in model.parameters() for name in p.__dict__ if name.startswith("_zs") and name != "_zs_name"]
    clean = hooks_of(model) == 0 and not client._optimizer_step_pre_hooks and "_zs_runtime" not in model.__dict__
    held = live_tensor_nbytes() - start - (0 if expected is None else plain)
    whole = expected is None or same(expected, model.state_dict())
    with pytest.raises(ConfigError, match="was closed"):
        optimizer.step()
    optimizer.close()
    states = len(client.state)
    del optimizer, client
    gc.collect()
    return clean, dicts, held / plain, whole, states, runtime() is None


@pytest.mark.parametrize("how", ["states", "parameters", "away"])
def test_close_leaves_the_model_and_nothing_else(how):
    for results in run_ranks(at_each_stage, 2, closed, how):
        for stage, (clean, dicts, held, whole, states, gone) in enumerate(results):
            assert clean and not dicts and whole and gone, stage
            assert states == (len(list(Net().parameters())) if how == "states" else 0)
            # 2 bytes of a bf16 parameter, padding; with the states two fp32 moments more
            assert (1 if how != "states" else 5) <= held <= (1.6 if how != "states" else 6), (stage, held)


def test_a_local_close_gathers_nothing():
    for results in run_ranks(at_each_stage, 2, closed, "local"):
        for stage, (clean, dicts, held, _, states, gone) in enumerate(results):
            assert clean and gone and states == 0, stage
            assert set(dicts) == ({"_zs_gone"} if stage == 3 else set())
            assert (held <= 0.1) if stage == 3 else (1 <= held <= 1.6), (stage, held)


def one_rank_gives_up(group):
    model, optimizer = build(group, 3)
    backward(model, group, 0)
    finish(optimizer)
    if group.rank == 1:
        optimizer.close(parameters=False)
        with pytest.raises(zs_zero.ReleasedParameterError, match="lost its values by close"):
            model.head.weight.sum()
    return True


def test_one_rank_may_close_alone():
    assert run_ranks(one_rank_gives_up, 2) == [True, True]


class Bad(torch.optim.SGD):
    def step(self, closure=None):
        raise ValueError("in the middle")


def test_a_torn_optimizer_can_be_closed():
    model = nn.Linear(3, 2)
    optimizer = zs_zero.shard(model, Bad(model.parameters(), lr=0.1), stage=0, mesh=Group.single())
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="in the middle"):
        optimizer.step()
    optimizer.close()
    assert torch.isfinite(model(torch.ones(1, 3))).all() and hooks_of(model) == 0


# -- several in one process -------------------------------------------------------------------------------------------
KINDS = [(3, 0, {}), (1, 1, {"dtype": torch.bfloat16}), (2, 2, {}), (0, 3, {})]


def alone(group, kind):
    stage, seed, options = KINDS[kind]
    model, optimizer = build(group, stage, seed, **options)
    for step in range(4):
        backward(model, group, 2 * step, seed)
        backward(model, group, 2 * step + 1, seed)
        optimizer.clip_grad_norm_(0.5)
        finish(optimizer)
    return zs_zero.full_state_dict(model, masters=True)


def together(group):
    """Four models, micro-steps and steps interleaved; one ends early, and another begins late."""
    expected = [alone(group, kind) for kind in range(len(KINDS))]
    pairs = [build(group, stage, seed, **options) for stage, seed, options in KINDS]
    first, after = pairs[0], None
    for step in range(4):
        for micro in range(2):
            for (_, seed, _), (model, _) in zip(KINDS, pairs, strict=True):
                backward(model, group, 2 * step + micro, seed)
        for _, optimizer in reversed(pairs):
            optimizer.clip_grad_norm_(0.5)
            finish(optimizer)
    results = [zs_zero.full_state_dict(model, masters=True) for model, _ in pairs]
    first[1].close()
    after = zs_zero.full_state_dict(pairs[2][0])
    return [same(one, other) for one, other in zip(expected, results, strict=True)], same(after, results[2])


def test_several_sharded_models_do_not_know_of_each_other():
    assert run_ranks(together, 2) == [([True] * 4, True)] * 2


def joined(group, stages):
    """One loss through two sharded models, each with an optimizer of its own, against the two in one."""
    torch.manual_seed(0)
    parts = nn.Linear(6, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 2))
    plain = copy.deepcopy(nn.Sequential(*parts))
    reference = torch.optim.SGD(plain.parameters(), lr=0.5)
    optimizers = [
        zs_zero.shard(part, torch.optim.SGD(part.parameters(), lr=0.5), stage=stage, mesh=group)
        for part, stage in zip(parts, stages, strict=True)
    ]
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        parts[1](parts[0](x)).square().mean().backward()
        for optimizer in optimizers:
            finish(optimizer)
        plain(x).square().mean().backward()
        reference.step()
        reference.zero_grad()
    whole = [*zs_zero.full_state_dict(parts[0]).values(), *zs_zero.full_state_dict(parts[1]).values()]
    return all(torch.equal(one, other) for one, other in zip(whole, plain.state_dict().values(), strict=True))


def test_one_backward_through_two_sharded_models():
    for stages in ((3, 3), (1, 3), (2, 0)):
        assert run_ranks(joined, 2, stages) == [True, True]


def test_a_parameter_belongs_to_one_sharded_model():
    model, optimizer = build(Group.single(), 0)
    other = nn.Sequential(nn.Linear(16, 16), model.head)
    with pytest.raises(ConfigError, match="'1.weight' is sharded already, as 'head.weight' of a Net"):
        zs_zero.shard(other, torch.optim.SGD(other.parameters(), lr=0.1), stage=0, mesh=Group.single())
    optimizer.close()
    zs_zero.shard(other, torch.optim.SGD(other.parameters(), lr=0.1), stage=0, mesh=Group.single()).close()
