"""The trainings that the golden values hold and that every stage must repeat."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from reference.training import Plan, Scaling

CLIP = 1.0  # all norms are larger

# In fp16 the first steps overflow, then the scale grows until they do again; a loss is made infinite too.
_GROWING = Scaling(initial=2.0**17, window=2, hysteresis=2)
PRECISIONS = {
    "fp32": Plan(),
    "bf16": Plan(dtype=torch.bfloat16),
    "fp16": Plan(dtype=torch.float16, scaling=_GROWING, steps=18),
    "fp16 static": Plan(dtype=torch.float16, scaling=Scaling(initial=512.0)),
}


def injected(plan: Plan) -> frozenset[tuple[int, int, int]]:
    """An overflow on the last rank only, in its last micro-step; later one on the first rank only, in its first."""
    first, second = (8, 11) if plan.scaling and plan.scaling.window else (4, 7)
    return frozenset({(first, plan.accumulate - 1, plan.world - 1), (second, 0, 0)})


def plan_of(precision: str, *, world: int, accumulate: int, clip: bool) -> Plan:
    plan = replace(PRECISIONS[precision], world=world, accumulate=accumulate, clip=CLIP if clip else None)
    return replace(plan, inject=injected(plan)) if plan.dtype != torch.float32 else plan


def all_plans() -> Iterator[tuple[str, Plan]]:
    """(name, training): each in both orders of addition where they differ."""
    for precision in PRECISIONS:
        for world in (1, 2):
            for accumulate in (1, 4):
                for clip in (False, True):
                    plan = plan_of(precision, world=world, accumulate=accumulate, clip=clip)
                    name = f"{precision}, world {world}, accumulation {accumulate}" + ", clipped" * clip
                    yield name, plan
                    if world * accumulate == 8:
                        yield f"{name}, ranks first", replace(plan, ranks_first=True)
