"""How many samples are in a step."""

from typing import NamedTuple, Self

from zs_comm import ConfigError


class BatchSizes(NamedTuple):
    """train = micro * steps * data-parallel world."""

    train: int
    micro: int
    steps: int

    @classmethod
    def solve(cls, train: int | None, micro: int | None, steps: int | None, world: int) -> Self:
        """Derive what is None. Raises ConfigError with the equation that does not hold."""
        if train is None and micro is None:
            raise ConfigError("give train_batch_size or train_micro_batch_size_per_gpu (or both)")
        if train is not None and micro is not None and steps is None:
            steps = max(1, train // (micro * world))
        steps = steps or 1
        if micro is None:
            micro = max(1, (train or 0) // (steps * world))
        product = micro * steps * world
        if train not in (None, product):
            raise ConfigError(
                f"train_batch_size({train}) != train_micro_batch_size_per_gpu({micro}) * "
                f"gradient_accumulation_steps({steps}) * data parallel world({world}) = {product}"
            )
        return cls(product, micro, steps)
