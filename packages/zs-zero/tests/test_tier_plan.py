"""What fits where, as arithmetic; and that a training moves what the arithmetic says."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zs_comm import ConfigError, Group
from zs_zero.flat_pieces import HeldPiece
from zs_zero.plan import ParamSpec, Plan, make_plan
from zs_zero.precision import Precision
from zs_zero.tiers.blocks import GRAD, MASTER, PARAM, REST, cut, cut_pieces, owned_regions
from zs_zero.tiers.budget import Setting, TierPlan, mib, plan_tiers
from zs_zero.tiers.eightbit import encoded_nbytes
from zs_zero.tiers.policy import ALIGN_NUMEL, Offload, OptimizerPolicy, ParameterPolicy
from zs_zero.tiers.slots import slot_nbytes
from zs_zero.tiers.tiers import codecs_of

sys.path.insert(0, str(Path(__file__).parent))

from tier_records import AWAY, BLOCK, LAYER, NUMEL, STATES, Training

F32, B16 = torch.float32, torch.bfloat16
MOMENTS = ("exp_avg", "exp_avg_sq")
ROOM = 40 << 20  # bytes: more than what is the same for every model


def a_plan(sizes: Sequence[int], *, dtype: torch.dtype = F32, slices: int = 1, frozen: Sequence[int] = ()) -> Plan:
    """One unit of one parameter for each size."""
    units = [
        (f"unit{i}", [f"unit{i}"], [ParamSpec(f"unit{i}.weight", (size,), dtype, trainable=i not in frozen)])
        for i, size in enumerate(sizes)
    ]
    return make_plan(units, slices=slices)


def a_setting(plan: Plan, **options: Any) -> Setting:
    flats = list(plan.flats())
    kept = [Precision().of(flat.dtype) for flat in flats]
    known: dict[str, Any] = {
        "slices": 1, "world": plan.slices, "kept": kept, "grad_dtypes": [flat.dtype for flat in flats],
        "states": MOMENTS, "new": [True] * len(flats), "releases": True, "codecs": {},
    }  # fmt: skip
    return Setting(**(known | options))


def an_offload(*, limit: int | None = None, params: dict[str, Any] | None = None, **optimizer: Any) -> Offload:
    return Offload(
        optimizer=OptimizerPolicy(**({"tier": "files", "block_numel": 1 << 16} | optimizer)),
        parameters=ParameterPolicy(**({"tier": "files"} | (params or {}))),
        host_memory_limit=limit,
    )


def held(found: TierPlan) -> int:
    return sum(flat.held_numel for flat in found.flats if flat.owned)


# -- blocks ------------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4), block=st.integers(1, 900),
    resident=st.integers(0, 13_000), slices=st.sampled_from([1, 2, 3]), dtype=st.sampled_from([F32, B16]),
)  # fmt: skip
def test_blocks_cover_every_element_once(
    sizes: list[int], block: int, resident: int, slices: int, dtype: torch.dtype
) -> None:
    specs = [ParamSpec(f"p{i}", (size,), dtype) for i, size in enumerate(sizes)]
    (flat,) = make_plan([("u", ["u"], specs)], slices=slices).flats()
    owned = owned_regions(Precision().of(dtype), MOMENTS)
    found = cut(0, flat, slices=1, block_numel=block, resident=resident, owned=owned, grad=dtype)
    assert found.blocks[0].low == 0 and found.blocks[-1].high == found.held_numel == flat.shard_numel
    assert all(one.high == other.low for one, other in pairwise(found.blocks))
    assert all(one.low % ALIGN_NUMEL == 0 for one in found.blocks)
    most = -(-block // ALIGN_NUMEL) * ALIGN_NUMEL
    assert all(0 < one.numel <= most for one in found.blocks)
    assert len({one.key(PARAM) for one in found.blocks}) == len(found.blocks)
    assert found.resident <= resident or found.resident == found.held_numel <= resident
    assert found.resident % most == 0 or found.resident == found.held_numel
    assert sum(one.numel for one in found.blocks if one.resident) == found.resident
    for low, high in ((0, found.held_numel), (5, min(70, found.held_numel)), (3, 3)):
        parts = [(first, last) for _, first, last in found.over(low, high)]
        assert sum(last - first for first, last in parts) == max(0, high - low)


def test_pieces_are_cut_at_the_borders_of_blocks() -> None:
    (flat,) = make_plan([("u", ["u"], [ParamSpec("a", (100,), F32), ParamSpec("b", (300,), F32)])], slices=1).flats()
    found = cut(0, flat, slices=1, block_numel=128, resident=0, owned={}, grad=F32)
    param = torch.nn.Parameter(torch.empty(1))
    pieces = [HeldPiece(param, one, one.shard_start, one.shard_stop) for one in flat.pieces(0)]
    parts = list(cut_pieces(pieces, found.blocks))
    assert [(one.piece.index, one.piece.start, one.piece.stop, block.index) for one, block in parts] == [
        (0, 0, 100, 0), (1, 0, 16, 0), (1, 16, 144, 1), (1, 144, 272, 2), (1, 272, 300, 3),
    ]  # fmt: skip
    assert all(block.low <= one.low < one.high <= block.high for one, block in parts)


def test_what_the_optimizer_owns() -> None:
    assert owned_regions(Precision().of(F32), MOMENTS) == {"exp_avg": F32, "exp_avg_sq": F32}
    assert owned_regions(Precision().of(B16), MOMENTS) == {MASTER: F32, "exp_avg": F32, "exp_avg_sq": F32}
    assert owned_regions(Precision(update="kahan").of(B16), ("m",)) == {REST: torch.int16, "m": B16}
    assert owned_regions(Precision(master=B16).of(B16), ("m",)) == {"m": B16}


# -- the budget --------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 600_000), min_size=1, max_size=5), dtype=st.sampled_from([F32, B16]),
    limit=st.integers(20 << 20, 120 << 20), slices=st.sampled_from([1, 2]), buffers=st.integers(1, 6),
    block=st.sampled_from([1, 5000, 1 << 16, 1 << 20]), gradients=st.sampled_from(["auto", "device", "files"]),
    tier=st.sampled_from(["files", "host"]), keep=st.sampled_from([None, 0, 500_000]), early=st.booleans(),
    plain=st.booleans(), frozen=st.sampled_from([(), (0,)]),
)  # fmt: skip
def test_a_plan_obeys_its_limit_or_there_is_none(
    sizes: list[int], dtype: torch.dtype, limit: int, slices: int, buffers: int, block: int, gradients: Any, tier: Any,
    keep: int | None, early: bool, plain: bool, frozen: tuple[int, ...],
) -> None:  # fmt: skip
    plan = a_plan(sizes, dtype=dtype, slices=slices, frozen=frozen)
    gradients = gradients if tier == "files" else "device"
    params = {"max_resident": keep, "buffer_count": buffers}
    offload = an_offload(
        limit=limit, tier=tier, buffer_count=buffers, block_numel=block, gradients=gradients, early=early, params=params
    )
    try:
        found = plan_tiers(plan, offload, a_setting(plan, plain_files=plain))
    except ConfigError as error:
        check_the_sum(str(error), limit, plan)
        return
    assert found.nbytes == sum(found.needs.values()) <= limit
    assert all(nbytes > 0 for nbytes in found.needs.values())
    flats = list(plan.flats())
    kept = [flat for flat, away in zip(flats, found.parameters_away, strict=True) if not away]
    assert found.needs.get("parameters", 0) == sum(flat.shard_numel * dtype.itemsize for flat in kept)
    each = 8 if dtype == F32 else 12
    stays = sum(flat.resident for flat in found.flats if flat.owned)
    assert found.needs.get("masters and states", 0) == stays * each
    trained = sum(flat.shard_numel for flat in flats if flat.trainable)
    assert found.needs.get("gradients", 0) == (0 if found.gradients_away else trained * dtype.itemsize)
    assert found.needs.get("slots", 0) == found.slots * slot_nbytes(found.slot_sizes)
    assert found.slots <= buffers
    own = dtype == F32 and tier == "host"  # values that are their own masters stay where these are
    if keep is not None and not own:
        assert sum(flat.shard_numel for flat in kept) <= keep
    assert not (found.gradients_away and stays), "what is updated at the commit needs its gradient in memory"


def check_the_sum(text: str, limit: int, plan: Plan) -> None:
    found = re.fullmatch(
        r"host_memory_limit cannot be met: (.*) = (.*) > (.*); the largest unit is '(.*)' with ([^.]*[.\d]* M?i?B)\. "
        r"Raise .*", text, re.DOTALL,
    )  # fmt: skip
    assert found is not None, text
    parts = [number(part) for part in found[1].split(" + ")]
    assert sum(parts) == pytest.approx(number(found[2]), abs=(len(parts) + 1) * 0.05 * 2**20 + 1)
    assert number(found[2]) >= limit - 0.1 * 2**20
    assert found[3] == mib(limit)
    largest = max(plan.units, key=lambda unit: sum(flat.padded_numel for flat in unit.flats))
    nbytes = sum(flat.padded_numel * flat.dtype.itemsize for flat in largest.flats)
    assert found[5] == mib(nbytes)
    assert nbytes == max(sum(flat.padded_numel * flat.dtype.itemsize for flat in unit.flats) for unit in plan.units)
    named = next(unit for unit in plan.units if unit.name == found[4])
    assert sum(flat.padded_numel * flat.dtype.itemsize for flat in named.flats) == nbytes


def number(text: str) -> float:
    value, unit = text.split()[-2:]
    return float(value.replace(",", "")) * (2**20 if unit == "MiB" else 1)


def test_a_refusal_names_the_arithmetic() -> None:
    plan = a_plan([1 << 20, 9 << 20, 1 << 20])
    with pytest.raises(ConfigError, match=r"units at work 44\.0 MiB \+ gradients on their way 72\.0 MiB") as caught:
        plan_tiers(plan, an_offload(limit=ROOM), a_setting(plan))
    check_the_sum(str(caught.value), ROOM, plan)
    assert "'unit1' with 36.0 MiB" in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 400_000), min_size=1, max_size=5),
    ratio=st.floats(0, 1),
    dtype=st.sampled_from([F32, B16]),
    slices=st.sampled_from([1, 2]),
)
def test_a_ratio_is_kept_within_a_block(sizes: list[int], ratio: float, dtype: torch.dtype, slices: int) -> None:
    plan = a_plan(sizes, dtype=dtype, slices=slices)
    found = plan_tiers(plan, an_offload(ratio=ratio, params={"tier": "device"}), a_setting(plan))
    wanted, stays = held(found) * (1 - ratio), sum(flat.resident for flat in found.flats)
    assert -1 <= wanted - stays < (1 << 16) + 1
    assert found.resident == stays / held(found)


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 400_000), min_size=1, max_size=5),
    budget=st.integers(0, 20_000_000),
    dtype=st.sampled_from([F32, B16]),
    ratio=st.sampled_from([1.0, 0.3]),
)
def test_a_budget_of_bytes_is_used_and_never_exceeded(
    sizes: list[int], budget: int, dtype: torch.dtype, ratio: float
) -> None:
    plan = a_plan(sizes, dtype=dtype)
    offload = an_offload(max_resident=budget, ratio=ratio, params={"tier": "device"})
    found = plan_tiers(plan, offload, a_setting(plan))
    each = 8 if dtype == F32 else 12
    used = sum(flat.resident for flat in found.flats) * each
    assert used <= budget
    assert found.resident == 1 or budget - used < each << 16, "another block would fit"
    assert found.needs.get("masters and states", 0) == used


def test_room_goes_to_parameters_then_gradients_then_the_optimizer() -> None:
    plan = a_plan([300_000] * 6, dtype=B16)
    setting, first = a_setting(plan), dict[str, int]()
    for limit in range(30 << 20, 120 << 20, 1 << 20):
        offload = an_offload(limit=limit, gradients="auto", params={"max_resident": None})
        try:
            found = plan_tiers(plan, offload, setting)
        except ConfigError:
            continue
        first.setdefault("all in files", limit)
        seen = {
            "a unit's parameters": not all(found.parameters_away), "parameters": not any(found.parameters_away),
            "gradients": not found.gradients_away, "some states": found.resident > 0, "all": found.resident == 1,
        }  # fmt: skip
        for name, holds in seen.items():
            if holds:
                first.setdefault(name, limit)
    assert list(first) == ["all in files", "a unit's parameters", "parameters", "gradients", "some states", "all"]
    assert len(set(first.values())) >= 5


@pytest.mark.parametrize("buffers", [1, 2, 3, 7, 1000])
def test_any_number_of_buffers(buffers: int) -> None:
    plan = a_plan([200_000] * 4, dtype=B16)
    offload = an_offload(buffer_count=buffers, params={"buffer_count": buffers})
    found = plan_tiers(plan, offload, a_setting(plan))
    blocks = sum(len(flat.blocks) for flat in found.flats)
    assert found.slots == min(buffers, blocks)
    assert found.needs["slots"] == found.slots * slot_nbytes(found.slot_sizes)
    assert found.needs["units at work"] == min(1 + buffers, 4) * 400_000


def test_nothing_but_its_own_unit_depends_on_the_largest_tensor() -> None:
    sizes = [200_000] * 4
    for dtype in (F32, B16):
        for gradients in ("files", "device"):
            offload = an_offload(gradients=gradients)
            small, large = (
                plan_tiers(plan, offload, a_setting(plan))
                for plan in (a_plan([*sizes, last], dtype=dtype) for last in (200_000, 50_000_000))
            )
            assert (small.slots, small.slot_sizes) == (large.slots, large.slot_sizes)
            changed = {name for name in small.needs if small.needs[name] != large.needs[name]}
            own = {"units at work", "gradients on their way"}
            assert changed == own | ({"gradients"} if gradients == "device" else set())
            assert large.needs["units at work"] - small.needs["units at work"] == 49_800_000 * dtype.itemsize


def test_needs_by_hand() -> None:
    plan = a_plan([100_000] * 3, dtype=B16)
    found = plan_tiers(plan, an_offload(gradients="device", params={"buffer_count": 1}), a_setting(plan))
    block = 1 << 16
    assert found.needs == {
        "units at work": 2 * 200_000, "gradients on their way": 2 * 200_000, "slots": 4 * (12 + 2) * block,
        "scratch of an update": 2 * 4 * block, "overhead": 24 << 20, "gradients": 3 * 200_000,
    }  # fmt: skip
    assert found.nbytes == sum(found.needs.values())


def test_slots_have_every_region_of_the_largest_block() -> None:
    plan = a_plan([100_000, 100], dtype=B16)
    found = plan_tiers(plan, an_offload(gradients="files"), a_setting(plan))
    size = 1 << 16
    assert found.slot_sizes == {
        MASTER: 4 * size, "exp_avg": 4 * size, "exp_avg_sq": 4 * size, PARAM: 2 * size, GRAD: 2 * size,
    }  # fmt: skip
    coded = plan_tiers(plan, an_offload(), a_setting(plan, codecs=codecs_of(MOMENTS)))
    assert coded.slot_sizes["exp_avg in 8 bits"] == encoded_nbytes(size)


def test_values_that_are_their_own_masters_stay_with_them() -> None:
    plan = a_plan([100_000, 100_000], frozen=(1,))
    found = plan_tiers(plan, an_offload(tier="host"), a_setting(plan))
    assert found.parameters_away == (False, True), "a frozen one may go"
    assert plan_tiers(plan, an_offload(), a_setting(plan)).parameters_away == (True, True)
    assert plan_tiers(plan, an_offload(), a_setting(plan, releases=False)).parameters_away == (False, False)


def test_gradients_in_files_leave_no_states_in_memory() -> None:
    plan = a_plan([100_000])
    for options in ({"ratio": 0.5}, {"max_resident": 5}):
        with pytest.raises(ConfigError, match="zs_gradients"):
            plan_tiers(plan, an_offload(gradients="files", **options), a_setting(plan))


def test_the_page_cache_and_the_activations_count() -> None:
    plan = a_plan([100_000])
    offload = an_offload(limit=80 << 20, params={"max_resident": 0})
    direct = plan_tiers(plan, offload, a_setting(plan))
    plain = plan_tiers(plan, offload, a_setting(plan, plain_files=True))
    assert "page cache" not in direct.needs and plain.needs["page cache"] > 0
    assert direct.needs["activations"] == 10 << 20
    given = plan_tiers(plan, replace(offload, activation_nbytes=3 << 20), a_setting(plan))
    assert given.needs["activations"] == 3 << 20
    assert "activations" not in plan_tiers(plan, an_offload(), a_setting(plan)).needs


# -- what moves --------------------------------------------------------------------------------------------------------
def per_element(training: Training) -> dict[str, float]:
    """Bytes of the fourth step over the elements that are not in slots from the last, by kind and direction."""
    training.steps(4)
    report = training.optimizer.offload_report()
    assert report.steps == 4
    assert dict(report.read) == {kind: report.expected_read.get(kind, 0) for kind in report.read}
    assert dict(report.written) == {kind: report.expected_written.get(kind, 0) for kind in report.written}
    found = {f"{kind} read": float(nbytes) for kind, nbytes in report.read.items()}
    found |= {f"{kind} written": float(nbytes) for kind, nbytes in report.written.items()}
    return found


KEPT = NUMEL - 2 * BLOCK  # elements that are read by the optimizer: two blocks are in slots
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {  # bytes of an element's master and states
    "bf16": ({"dtype": B16}, 12),
    "fp32": ({}, 8),
    "bf16 moments": ({"dtype": B16, "state_dtype": B16}, 8),
    "bf16 masters and moments": ({"dtype": B16, "master_dtype": B16}, 4),
    "compensated": ({"dtype": B16, "bf16_update": "kahan"}, 6),
    "compensated, fp32 moments": ({"dtype": B16, "bf16_update": "kahan", "state_dtype": F32}, 10),
    "by chance": ({"dtype": B16, "bf16_update": "stochastic_rounding"}, 4),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_bytes_of_states_in_files(name: str, tmp_path: Path) -> None:
    """An element: 24 in bf16 with masters, 16 in fp32, less with fewer bytes of each."""
    options, each = PRECISIONS[name]
    training = Training(tmp_path, offload_optimizer=STATES, **options)
    assert per_element(training) == {"optimizer read": each * KEPT, "optimizer written": each * NUMEL}
    training.close()


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_moments_in_8_bits(name: str, tmp_path: Path) -> None:
    options, each = PRECISIONS[name]
    training = Training(tmp_path, offload_optimizer={**STATES, "zs_state": "8bit"}, **options)
    moments, blocks = 2 * encoded_nbytes(BLOCK), NUMEL // BLOCK
    assert encoded_nbytes(BLOCK) == BLOCK + BLOCK // 256
    master = each - 8
    assert per_element(training) == {
        "optimizer read": master * KEPT + moments * blocks, "optimizer written": master * NUMEL + moments * blocks,
    }  # fmt: skip
    training.close()


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.0])
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_what_is_resident_does_not_move(name: str, ratio: float, tmp_path: Path) -> None:
    options, each = PRECISIONS[name]
    training = Training(tmp_path, offload_optimizer={**STATES, "ratio": ratio}, **options)
    report = training.optimizer.offload_report()
    assert report.resident == 1 - ratio
    away = NUMEL * ratio
    wanted = {"optimizer read": each * (away - 2 * BLOCK), "optimizer written": each * away}
    assert per_element(training) == (wanted if ratio else {})
    training.close()


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_bytes_of_parameters_in_files(name: str, tmp_path: Path) -> None:
    """One read for forward, one for backward, but for the unit where it turns; one write. fp32 is read to update it."""
    options, each = PRECISIONS[name]
    size = 2 if name == "bf16" else 4
    training = Training(tmp_path, offload_optimizer=STATES, offload_param=AWAY, **options)
    again = 0 if name == "bf16" else KEPT
    assert per_element(training) == {
        "optimizer read": each * KEPT, "optimizer written": each * NUMEL,
        "parameters read": size * (2 * NUMEL - LAYER + again), "parameters written": size * NUMEL,
    }  # fmt: skip
    training.close()


def test_bytes_of_gradients_in_files(tmp_path: Path) -> None:
    training = Training(tmp_path, offload_optimizer={**STATES, "zs_gradients": "nvme"}, dtype=B16)
    found = per_element(training)
    assert (found["gradients read"], found["gradients written"]) == (2 * NUMEL, 2 * NUMEL)
    training.backward(7), training.backward(8), training.update()
    report = training.optimizer.offload_report()
    assert (report.read["gradients"], report.written["gradients"]) == (4 * NUMEL, 4 * NUMEL), "added to in files"
    training.close()


# -- visible -----------------------------------------------------------------------------------------------------------
def test_an_observer_is_told_every_step(tmp_path: Path) -> None:
    class Watch:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def scalar(self, name: str, value: float, step: int) -> None:
            self.seen.append((name, value, step))

    group, watch = Group.single(), Watch()
    group.observers.add(watch)
    training = Training(tmp_path, group=group, offload_optimizer=STATES, offload_param=AWAY, dtype=B16).steps(3)
    names = {f"offload/{kind}_{way}_nbytes" for kind in ("optimizer", "parameters") for way in ("read", "written")}
    for step in (2, 3):
        told = {name: value for name, value, at in watch.seen if at == step and name.startswith("offload/")}
        assert told.keys() == names | {"offload/stall_s", "offload/overlap"}
        assert told["offload/optimizer_written_nbytes"] == 12 * NUMEL
        assert told["offload/stall_s"] >= 0 and 0 <= told["offload/overlap"] <= 1
    report = training.optimizer.offload_report()
    assert report.scalars()["offload/parameters_written_nbytes"] == 2 * NUMEL
    lines = str(report).splitlines()
    assert "step 3" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["parameters", "optimizer"]
    assert all(len(line.split()) == 5 for line in lines[1:3])
    assert f"{sum(report.planned.values()) / 2**20:,.1f} planned" in str(report)
    training.close()


def test_the_first_step_does_not_count_what_building_wrote(tmp_path: Path) -> None:
    training = Training(tmp_path, offload_optimizer=STATES, offload_param=AWAY, dtype=B16).steps(1)
    report = training.optimizer.offload_report()
    assert dict(report.written) == dict(report.expected_written) == {"optimizer": 12 * NUMEL, "parameters": 2 * NUMEL}
    training.close()


def test_there_is_no_report_without_tiers(tmp_path: Path) -> None:
    training = Training(tmp_path)
    with pytest.raises(ConfigError, match="nothing is offloaded"):
        training.optimizer.offload_report()
    training.close()
