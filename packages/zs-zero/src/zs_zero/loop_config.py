"""The keys of a DeepSpeed configuration for the training loop around the update: what it says, what it paces."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from zs_comm.keys import DeepSpeedSection

from .curriculum import CurriculumConfig
from .layer_drop import LayerDropConfig

Interval = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, allow_inf_nan=True)]  # infinity: no lines


class LoopConfig(DeepSpeedSection):
    """To be inherited by the section of the top level."""

    steps_per_print: Interval | None = Field(default=None, description="updates between lines of progress; 0: no lines")
    wall_clock_breakdown: bool = Field(default=False, description="print the time of each phase after every update")
    memory_breakdown: bool = Field(default=False, description="print memory in use before and after each phase")
    dump_state: bool = Field(default=False, description="print the engine's state once it is built")
    curriculum_learning: CurriculumConfig = CurriculumConfig()
    progressive_layer_drop: LayerDropConfig = LayerDropConfig()

    def report_options(self) -> dict[str, Any]:
        """The keyword arguments of :class:`zs_zero.loop_report.LoopReport`."""
        breakdowns = {"times": self.wall_clock_breakdown, "memory": self.memory_breakdown}
        return {"steps_per_print": self.steps_per_print} | breakdowns

    def pacers(self) -> dict[str, Any]:
        """What :class:`zs_zero.pacing.Pacing` takes."""
        return {name: getattr(self, name).pacer() for name in ("curriculum_learning", "progressive_layer_drop")}
