"""What an optimizer must see of a parameter, so that it computes on shards what it computes on whole parameters.

    elements   the update of an element looks at that element only: each rank updates the pieces it owns
    norms      sums over each parameter as well: the ranks add up theirs, eight bytes per sum
    whole      the whole parameter: each is brought to one rank, which updates it (see `placement`)

An optimizer class says so by `__zs_requires__`: one of these words, or a method that gives one for a parameter group.
One that asks for norms has an attribute `sum_pieces`, which is set to a function `(pieces, sums) -> sums`: from its own
sums over each piece, (len(pieces), k) fp64, those over the pieces' whole parameters. It is called once in every step,
on all ranks, also on one without pieces.
"""

from collections.abc import Mapping
from typing import Any

import torch
from zs_comm import ConfigError

WORDS = ("elements", "norms", "whole")
_MORE = {"norms": "norms of whole parameters", "whole": "whole parameters"}
_OF_TORCH = {
    getattr(torch.optim, name): word
    for word, names in {
        "elements": "Adadelta Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD",
        "whole": "Adafactor Muon",
    }.items()
    for name in names.split()
    if hasattr(torch.optim, name)  # Muon: from torch 2.9
}
_REFUSED = {"LBFGS": "it looks at all parameters at once", "SparseAdam": "it needs sparse gradients"}


def requirement(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> str | None:
    """What `optimizer` needs for `group`, or None where that is not known.

    Only exact classes of torch.optim are known: a subclass may compute anything, until it says what.

    Raises:
        ConfigError: for a `__zs_requires__` that is none of the words.
    """
    kind = type(optimizer)
    word = getattr(kind, "__zs_requires__", None)
    if word is None:
        return _OF_TORCH.get(kind)
    if callable(word):
        word = word(optimizer, group)
    if word not in WORDS:
        raise ConfigError(f"{kind.__qualname__}.__zs_requires__ is one of {', '.join(WORDS)} (got {word!r})")
    return str(word)


def requirements(
    optimizer: torch.optim.Optimizer, *, stage: int, allow_untested: bool, files: bool = False
) -> dict[int, str]:
    """{id of each parameter: what `optimizer` needs of it}. files: whether masters and states live in files.

    Raises:
        ConfigError: at stages 1-3 for an optimizer of which that is not known, unless `allow_untested`; for one that
            looks at more than elements where they come from files, block by block.
    """
    kind = type(optimizer)
    found: dict[int, str] = {}
    for group in optimizer.param_groups:
        word = requirement(optimizer, group)
        if word is None and stage and not allow_untested:
            raise _unknown(kind, stage)
        if word == "norms" and not hasattr(optimizer, "sum_pieces"):
            raise ConfigError(f"{kind.__qualname__} needs norms, and has no attribute sum_pieces to take them from")
        if files and word in _MORE:
            raise ConfigError(
                f"{kind.__qualname__} needs {_MORE[word]}, and offload_optimizer.device 'nvme' updates blocks of "
                "elements: use an element-wise optimizer, or device 'cpu' or 'none'"
            )
        found |= {id(param): word or "elements" for param in group["params"]}
    return found


def _unknown(kind: type, stage: int) -> ConfigError:
    known = ", ".join(sorted(cls.__name__ for cls in _OF_TORCH))
    why = _REFUSED.get(kind.__name__) if kind.__module__.startswith("torch.optim") else None
    return ConfigError(
        f"stage {stage} updates each rank's pieces of the parameters, and {kind.__module__}.{kind.__name__} "
        + (f"is not element-wise: {why}" if why else "is not known to be element-wise")
        + f". Use stage 0, a class of zs_zero.optimizers, one of {known}, a class that says by __zs_requires__ what it "
        "needs, or, if you know that it is, allow_untested_optimizer=True (zero_allow_untested_optimizer in a "
        "configuration)"
    )
