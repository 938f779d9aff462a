"""Progressive layer dropping (arXiv 2010.13369): layers are skipped ever more often as training goes on.

The engine hands `progressive_layer_drop=True` and `pld_theta` to the model's forward, as DeepSpeed did; what the model
does with them (keep layer i of L with probability `1 - i / L * (1 - theta)`, section 4) is its own affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from zs_comm.keys import DeepSpeedSection


class LayerDropConfig(DeepSpeedSection):
    """`progressive_layer_drop`."""

    enabled: bool = Field(default=False, description="hand progressive_layer_drop and pld_theta to forward in training")
    theta: Annotated[float, Field(ge=0, le=1)] = Field(default=1.0, description="the keep probability in the limit")
    gamma: Annotated[float, Field(ge=0)] = Field(default=0.001, description="per step; how fast theta is approached")

    def pacer(self) -> LayerDrop | None:
        """The schedule; None while it is not enabled."""
        return LayerDrop(self.theta, self.gamma) if self.enabled else None


class LayerDrop:
    """`theta(t) = (1 - theta) * exp(-gamma * t) + theta` (equation 7), `t` the number of updates that lie behind.

    DeepSpeed changed it after an update with the count of before, so it was one step late.

    Attributes:
        current_theta: of the last step asked for.
    """

    needs: tuple[str, ...] = ("progressive_layer_drop", "pld_theta")

    def __init__(self, theta: float = 0.5, gamma: float = 0.001) -> None:
        self.theta, self.gamma = theta, gamma
        self.current_theta = 1.0

    def get_theta(self) -> float:
        """The keep probability in force."""
        return self.current_theta

    def arguments(self, done: int) -> dict[str, Any]:
        """What forward gets when `done` updates lie behind."""
        self.current_theta = (1.0 - self.theta) * math.exp(-self.gamma * done) + self.theta
        return {"progressive_layer_drop": True, "pld_theta": self.current_theta}

    def state_dict(self) -> dict[str, Any]:
        return {"current_theta": self.current_theta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.current_theta = state["current_theta"]
