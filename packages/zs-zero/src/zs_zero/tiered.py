"""What an optimizer over tiers does besides: its step goes block by block, and it reports what moved."""

from __future__ import annotations

import abc
import time
from typing import TYPE_CHECKING, Any

import torch
from zs_comm import ConfigError

if TYPE_CHECKING:
    from .flat import Flat
    from .runtime import Runtime
    from .settings import Settings
    from .tiers.report import OffloadReport
    from .tiers.tiers import Tiers
    from .wide import WideStep


class TieredStep(abc.ABC):
    """What `ZeroOptimizer` does where something is offloaded."""

    inner: torch.optim.Optimizer | None
    torn: bool
    wide: WideStep
    _runtime: Runtime
    _tiers: Tiers | None
    _settings: Settings
    _stepping: bool

    def _step_in_tiers(self, tiers: Tiers) -> None:
        """As the rest of `step`, a block at a time. What fails before anything was committed leaves all as it was."""

        def torn() -> None:
            self.torn = True

        client: Any = self.inner
        self._stepping = True
        began = time.perf_counter()
        try:
            for hook in list(client._optimizer_step_pre_hooks.values()):  # once a step, not once a block
                hook(client, (), {})
            tiers.step(updates=self.wide.updates + 1, premise=self._settings.everything(), torn=torn)
        except BaseException:
            if not self.torn:
                self._runtime.drop_gradients()
            raise
        finally:
            self._stepping = False
        self.wide.updates += self._counts_updates
        self._runtime.after_update()
        self.torn = False
        self._runtime.scaling.update(overflow=False)
        tiers.stepped(time.perf_counter() - began)
        client._opt_called = True  # what a schedule looks for that was made before the model was sharded
        for hook in list(client._optimizer_step_post_hooks.values()):
            hook(client, (), {})

    @property
    def _counts_updates(self) -> bool:
        """Whether the number of an update decides how it is rounded."""
        return bool(self.wide) or (self._tiers is not None and self._tiers.offload.optimizer.eight_bit)

    def _arrived(self, flat: Flat, used: set[int]) -> None:
        """Gradients were reduced in a backward, and an early update may begin."""
        if self._tiers is not None and not self._runtime.offloaded:
            scale = self._runtime.scaling.value
            factors = [1.0 / scale] if scale != 1.0 else []
            self._stepping = True  # on trial
            try:
                premise = self._settings.everything
                self._tiers.arrived(flat, used, updates=self.wide.updates + 1, factors=factors, premise=premise)
            finally:
                self._stepping = False

    @property
    def offloads(self) -> bool:
        """Whether anything of this model lives in another tier than the device."""
        return self._tiers is not None

    def offload_report(self) -> OffloadReport:
        """What the tiers planned, and moved in the last step. Raises ConfigError where nothing is offloaded."""
        if self._tiers is None:
            raise ConfigError("offload_report(): nothing is offloaded; give offload_optimizer or offload_param")
        return self._tiers.report()
