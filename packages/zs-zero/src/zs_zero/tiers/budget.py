"""What fits where: the blocks of every flat, and the host memory they need. Pure arithmetic, known before training.

    limit   >=   units at work + gradients on their way + slots + what stays resident + activations + the rest
                 `------------- fixed by model and policy -----------'   `- what room is left for -'

Room goes first to what saves most traffic for a byte: parameters (read twice and written once in a step), then
gradients and the optimizer's (read and written once).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from zs_comm import ConfigError

from ..plan import FlatPlan, Plan
from ..precision import Kept
from .blocks import GRAD, MASTER, PARAM, FlatBlocks, block_size, cut, owned_regions
from .eightbit import encoded_nbytes
from .policy import Offload
from .slots import slot_nbytes

_OVERHEAD = 24 << 20  # bytes: bounce buffers, threads, Python's own of a first step
_CACHE = 8 << 20  # page cache of one plain file


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the arithmetic has to know besides plan and policy."""

    slices: int  # that this rank holds
    world: int  # ranks that gather a unit
    kept: Sequence[Kept]  # of each flat
    grad_dtypes: Sequence[torch.dtype]
    states: Sequence[str]  # element-wise states of the optimizer
    new: Sequence[bool]  # flats whose parameters have no memory yet (on the meta device)
    releases: bool  # stage 3
    plain_files: bool = False  # files go through the page cache
    codecs: Mapping[str, str]
    trains: bool = True  # there is an optimizer: what it owns exists


@dataclass(frozen=True)
class TierPlan:
    """Where everything of this rank lives, and the bytes of host memory for it by purpose."""

    flats: tuple[FlatBlocks, ...]
    parameters_away: tuple[bool, ...]
    gradients_away: bool
    slot_sizes: Mapping[str, int]  # bytes of each region
    slots: int
    needs: Mapping[str, int]
    limit: int | None

    @property
    def nbytes(self) -> int:
        return sum(self.needs.values())

    @property
    def resident(self) -> float:
        """Share of the trained elements whose masters and states stay in memory."""
        trained = [flat for flat in self.flats if flat.owned]
        held = sum(flat.held_numel for flat in trained)
        return sum(flat.resident for flat in trained) / held if held else 1.0


def plan_tiers(plan: Plan, offload: Offload, setting: Setting) -> TierPlan:
    """The plan of the tiers. Raises ConfigError, with the arithmetic, where the limit cannot be met."""
    return _Budget(plan, offload, setting).solve()


class _Budget:
    def __init__(self, plan: Plan, offload: Offload, setting: Setting) -> None:
        self.offload, self.setting = offload, setting
        self.flats = list(plan.flats())
        self.unit_of = [number for number, unit in enumerate(plan.units) for _ in unit.flats]
        self.units = [
            [flat for flat, at in enumerate(self.unit_of) if at == number] for number in range(len(plan.units))
        ]
        self.names = [unit.name or "(root)" for unit in plan.units]
        self.passing = ["" not in unit.modules and "(shared)" not in unit.name for unit in plan.units]
        self.owned = [owned_regions(kept, setting.states) if setting.trains else {} for kept in setting.kept]
        self.in_files = offload.optimizer.tier == "files"
        self.size = block_size(offload.optimizer.block_numel)

    # -- bytes --------------------------------------------------------------------------------------------------------
    def held(self, flat: int) -> int:
        return self.flats[flat].shard_numel * self.setting.slices

    def param_nbytes(self, flat: int) -> int:
        return self.held(flat) * self.flats[flat].dtype.itemsize

    def whole_nbytes(self, unit: int) -> int:
        return sum(self.flats[flat].padded_numel * self.flats[flat].dtype.itemsize for flat in self.units[unit])

    def owned_nbytes(self, flat: int) -> int:
        """Of an element: masters and states in memory."""
        return sum(dtype.itemsize for dtype in self.owned[flat].values())

    def may_leave(self, flat: int) -> bool:
        """Whether parameters go to files: those that are their own masters go with the optimizer, or not at all."""
        own = self.setting.trains and self.flats[flat].trainable and MASTER not in self.owned[flat]
        return self.offload.parameters.tier == "files" and self.setting.releases and (self.in_files or not own)

    @property
    def trained(self) -> list[int]:
        return [number for number, flat in enumerate(self.flats) if flat.trainable]

    # -- what is fixed ------------------------------------------------------------------------------------------------
    def fixed(self, away: Sequence[bool], *, gradients_away: bool) -> dict[str, int]:
        offload, needs = self.offload, dict[str, int]()
        depth = offload.parameters.buffer_count
        moving = [unit for unit, flats in enumerate(self.units) if any(away[flat] for flat in flats)]
        coming = sorted((self.whole_nbytes(unit) for unit in moving if self.passing[unit]), reverse=True)
        needs["units at work"] = sum(coming[: 1 + depth]) + sum(
            self.whole_nbytes(unit) for unit in moving if not self.passing[unit]
        )
        if self.setting.world > 1:  # the part of a unit beside the whole of it, while it is gathered
            needs["units at work"] += max((self.whole_nbytes(unit) // self.setting.world for unit in moving), default=0)
        grads = [self.flats[flat].padded_numel * self.setting.grad_dtypes[flat].itemsize for flat in self.trained] or [
            0
        ]
        buffers = 2 if self.setting.world == 1 else 4
        needs["gradients on their way"] = max(grads) * buffers
        sizes = self.slot_sizes(away, gradients_away=gradients_away)
        needs["slots"] = slot_nbytes(sizes) * self.slots(sizes)
        needs["scratch of an update"] = 2 * 4 * self.size if sizes else 0
        needs["overhead"] = _OVERHEAD
        files = sum([any(away), bool(self.in_files), gradients_away])
        if self.setting.plain_files:
            needs["page cache"] = files * _CACHE
        if self.parks(gradients_away):
            needs["parked parameters"] = sum(self.param_nbytes(flat) for flat in self.trained if not away[flat])
        if offload.host_memory_limit is not None:
            spare = offload.host_memory_limit // 8
            needs["activations"] = spare if offload.activation_nbytes is None else offload.activation_nbytes
        return needs

    def parks(self, gradients_away: bool) -> bool:
        """Whether new values of parameters in memory wait for the commit in memory of their own."""
        short = any(self.setting.grad_dtypes[flat].itemsize < self.flats[flat].dtype.itemsize for flat in self.trained)
        return self.in_files and (self.offload.optimizer.early or gradients_away or short)

    def slot_sizes(self, away: Sequence[bool], *, gradients_away: bool) -> dict[str, int]:
        """Bytes of each region of the largest block that streams."""
        sizes: dict[str, int] = {}
        for flat in self.trained:
            if not (self.in_files or away[flat]):
                continue
            numel = min(self.size, self.held(flat))
            regions = dict(self.owned[flat]) | {PARAM: self.flats[flat].dtype}
            if gradients_away:
                regions[GRAD] = self.setting.grad_dtypes[flat]
            for region, dtype in regions.items():
                sizes[region] = max(sizes.get(region, 0), numel * dtype.itemsize)
                if region in self.setting.codecs:
                    sizes[f"{region} in 8 bits"] = max(sizes.get(f"{region} in 8 bits", 0), encoded_nbytes(numel))
        return sizes

    def slots(self, sizes: Mapping[str, int]) -> int:
        blocks = sum(-(-self.held(flat) // self.size) for flat in self.trained)
        return min(self.offload.optimizer.buffer_count, max(blocks, 1)) if sizes else 0

    # -- what has a choice --------------------------------------------------------------------------------------------
    def solve(self) -> TierPlan:
        offload, limit = self.offload, self.offload.host_memory_limit
        away = [self.may_leave(flat) for flat in range(len(self.flats))]
        gradients = offload.optimizer.gradients
        gradients_away = gradients == "files" or (gradients == "auto" and limit is not None and self.in_files)
        room = None
        if limit is not None:
            least = [0 if self.in_files else self.held(flat) for flat in range(len(self.flats))]
            needs = self.needs(away, least, gradients_away=gradients_away)
            room = limit - sum(needs.values())
            if room < 0:
                raise self._refusal(needs, limit)
            room = max(0, room - limit // 16)  # what has a choice does not fill it to the brim
        room = self._keep_parameters(away, room, parked=self.parks(gradients_away))
        if gradients == "auto" and gradients_away and room is not None and room >= self.gradient_nbytes():
            gradients_away, room = False, room - self.gradient_nbytes()
        resident = self._keep_optimizer(room, away, gradients_away=gradients_away)
        return self._plan(away, resident, gradients_away=gradients_away)

    def needs(self, away: Sequence[bool], resident: Sequence[int], *, gradients_away: bool) -> dict[str, int]:
        """Bytes by purpose, those that are none left out. `resident`: elements of each flat whose states stay."""
        needs = self.fixed(away, gradients_away=gradients_away)
        stay = [flat for flat, gone in enumerate(away) if not gone and self.setting.new[flat]]
        needs["parameters"] = sum(map(self.param_nbytes, stay))
        needs["gradients"] = 0 if gradients_away else self.gradient_nbytes()
        needs["masters and states"] = sum(resident[flat] * self.owned_nbytes(flat) for flat in self.trained)
        return {name: nbytes for name, nbytes in needs.items() if nbytes}

    def gradient_nbytes(self) -> int:
        return sum(self.held(flat) * self.setting.grad_dtypes[flat].itemsize for flat in self.trained)

    def _keep_parameters(self, away: list[bool], room: int | None, *, parked: bool) -> int | None:
        """Units whose parameters stay, as many as are allowed and fit."""
        budget = self.offload.parameters.max_resident
        for flats in self.units:
            gone = [flat for flat in flats if away[flat]]
            if not gone:
                continue
            numel, nbytes = sum(map(self.held, gone)), sum(map(self.param_nbytes, gone))
            # shards have whole ones beside them while their units run, and new values wait beside old ones
            copies = (1 if self.setting.world == 1 else 2) + parked
            if (budget is not None and numel > budget) or (room is not None and nbytes * copies > room):
                continue
            for flat in flats:
                away[flat] = False
            budget = None if budget is None else budget - numel
            room = None if room is None else room - nbytes * copies
        return room

    def _keep_optimizer(self, room: int | None, away: Sequence[bool], *, gradients_away: bool) -> list[int]:
        """Elements of each flat whose masters and states stay."""
        policy = self.offload.optimizer
        if gradients_away:  # what stays is updated last, when nothing may fail: its gradients have to be in memory
            if policy.ratio < 1.0 or policy.max_resident:
                raise ConfigError(
                    "gradients in files leave no masters and states in memory: take away zs_gradients, or ratio and "
                    "zs_max_in_cpu"
                )
            return [0] * len(self.flats)
        if not self.in_files:
            return [self.held(flat) for flat in range(len(self.flats))]
        total = sum(map(self.held, self.trained))
        share = int(total * (1.0 - policy.ratio))
        budget = policy.max_resident
        if budget is None and policy.ratio < 1.0:
            budget = share * max([self.owned_nbytes(flat) for flat in self.trained] or [0])
        if budget is None:
            budget = room or 0
        elif room is not None:
            budget = min(budget, room)
        resident = [0] * len(self.flats)
        for flat in self.trained:
            if away[flat] and MASTER not in self.owned[flat]:
                continue  # its values change with the files
            each = self.owned_nbytes(flat)
            if not each:  # nothing is kept of it
                resident[flat] = self.held(flat)
                continue
            fits = min(self.held(flat), budget // each)
            if policy.ratio < 1.0 and policy.max_resident is None:
                fits = min(fits, share)
            fits = fits if fits == self.held(flat) else fits // self.size * self.size
            resident[flat], budget, share = fits, budget - fits * each, share - fits
        return resident

    def _plan(self, away: Sequence[bool], resident: Sequence[int], *, gradients_away: bool) -> TierPlan:
        sizes = self.slot_sizes(away, gradients_away=gradients_away)
        flats = tuple(
            self._cut(number, flat, resident[number], apart=away[number] or gradients_away)
            for number, flat in enumerate(self.flats)
        )
        needs = self.needs(away, resident, gradients_away=gradients_away)
        limit = self.offload.host_memory_limit
        return TierPlan(flats, tuple(away), gradients_away, sizes, self.slots(sizes), needs, limit)

    def _cut(self, number: int, flat: FlatPlan, resident: int, *, apart: bool) -> FlatBlocks:
        held = self.held(number)
        size = self.size if apart or resident < held else max(held, 1)  # what is all in memory is one block
        grad = self.setting.grad_dtypes[number] if flat.trainable else None
        return cut(
            number, flat, slices=self.setting.slices, block_numel=size, resident=resident,
            owned=self.owned[number], grad=grad,
        )  # fmt: skip

    def _refusal(self, needs: Mapping[str, int], limit: int) -> ConfigError:
        largest = max(range(len(self.units)), key=self.whole_nbytes)
        sums, total = " + ".join(f"{name} {mib(nbytes)}" for name, nbytes in needs.items()), sum(needs.values())
        return ConfigError(
            f"host_memory_limit cannot be met: {sums} = {mib(total)} > {mib(limit)}; the largest unit is "
            f"{self.names[largest]!r} with {mib(self.whole_nbytes(largest))}. Raise the limit, offload more "
            f"(optimizer, gradients, parameters to files), or choose smaller units or blocks, or fewer buffers"
        )


def mib(nbytes: int) -> str:
    """A number of bytes as it is read."""
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 1 << 17 else f"{nbytes:,} B"
