"""How many samples are in a step."""

from typing import Any, NamedTuple, Self

from zs_comm import ConfigError, Group, agreed, same_everywhere


class BatchSizes(NamedTuple):
    """train = micro * steps * data-parallel world."""

    train: int
    micro: int
    steps: int

    @classmethod
    def solve(cls, train: int | None, micro: int | None, steps: int | None, world: int) -> Self:
        """Derive what is None. Raises ConfigError for no whole number above 0, or the equation that does not hold."""
        _count("train_batch_size", train)
        _count("train_micro_batch_size_per_gpu", micro)
        _count("gradient_accumulation_steps", steps)
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

    @classmethod
    def agree(
        cls, train: int | None, micro: int | None, steps: int | None, group: Group, *, backwards: int, micro_steps: int
    ) -> Self:
        """`solve` between two windows, for the coming ones. Collective.

        Args:
            group: the data-parallel ranks.
            backwards, micro_steps: what the present window holds; the sizes do not change unless it is nothing.

        Raises:
            ConfigError: as `solve`, or inside a window; on the other ranks RankDisagreement, as for other sizes there.
        """
        with agreed(group, "batch sizes"):
            if micro_steps or backwards:
                what = f"at {micro_steps} micro-steps" if micro_steps else "open, between a backward and its step()"
                raise ConfigError(f"batch sizes change between windows: this one is {what}")
            sizes = cls.solve(train, micro, steps, group.size)
        same_everywhere(f"{sizes}", group, what="the new batch sizes")
        return sizes

    def samples(self, backwards: int | None) -> int:
        """Of all ranks in a window of that many backwards; None: of as many as there are accumulation steps."""
        return self.train if backwards is None else self.train // self.steps * backwards


def _count(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name} should be a whole number of at least 1 (got {value!r})")
