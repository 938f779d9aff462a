"""ZeRO stages 0-3 for any torch model: one runtime, exact, without an engine or a configuration file.

optimizer = zs_zero.shard(model, torch.optim.AdamW(model.parameters()), stage=3)
"""

from .initialize import Init
from .optimizer import ShardedOptimizer, TornError, ZeroOptimizer
from .plan import Plan
from .released import ReleasedParameterError
from .sharding import shard
from .whole import full_state_dict, gathered, load_full_state_dict

__all__ = [
    "Init",
    "Plan",
    "ReleasedParameterError",
    "ShardedOptimizer",
    "TornError",
    "ZeroOptimizer",
    "full_state_dict",
    "gathered",
    "load_full_state_dict",
    "shard",
]
