"""Which optimizers may work on pieces of parameters: those whose update of an element looks at that element only."""

import torch
from zs_comm import ConfigError

# Exact classes: a subclass may compute anything.
_ELEMENT_WISE = frozenset(
    getattr(torch.optim, name)
    for name in "Adadelta Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD".split()
)
_NOT_ELEMENT_WISE = {
    "LBFGS": "it looks at all parameters at once",
    "Adafactor": "it factors whole matrices",
    "Muon": "it orthogonalises whole matrices",
    "SparseAdam": "it needs sparse gradients",
}


def require_element_wise(optimizer: torch.optim.Optimizer, *, stage: int, allow_untested: bool) -> None:
    """Refuses optimizers that would compute something else on shards than on whole parameters.

    Raises:
        ConfigError: at stages 1-3 for an optimizer that is not known to be element-wise, unless `allow_untested`.
    """
    kind = type(optimizer)
    if stage == 0 or kind in _ELEMENT_WISE or allow_untested:
        return
    known = ", ".join(sorted(cls.__name__ for cls in _ELEMENT_WISE))
    why = _NOT_ELEMENT_WISE.get(kind.__name__) if kind.__module__.startswith("torch.optim") else None
    raise ConfigError(
        f"stage {stage} updates each rank's pieces of the parameters, and {kind.__module__}.{kind.__name__} "
        + (f"is not element-wise: {why}" if why else "is not known to be element-wise")
        + f". Use stage 0, one of {known}, or allow_untested_optimizer=True (zero_allow_untested_optimizer in a "
        "configuration) if you know that it is"
    )
