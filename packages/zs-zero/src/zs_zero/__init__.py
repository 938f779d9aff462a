"""ZeRO stages 0-3 for any torch model: one runtime, exact, without an engine or a configuration file.

optimizer = zs_zero.shard(model, torch.optim.AdamW(model.parameters()), stage=3)
"""

from .initialize import Init
from .loss_scale import DynamicLossScale, LossScale, LossScaleError, StaticLossScale
from .optimizer import ZeroOptimizer
from .plan import Plan
from .released import ReleasedParameterError
from .safe_access import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
)
from .sharded import ShardedOptimizer, TornError
from .sharding import shard
from .whole import full_state_dict, gathered, load_full_state_dict

__all__ = [
    "DynamicLossScale",
    "Init",
    "LossScale",
    "LossScaleError",
    "Plan",
    "ReleasedParameterError",
    "ShardedOptimizer",
    "StaticLossScale",
    "TornError",
    "ZeroOptimizer",
    "full_state_dict",
    "gathered",
    "load_full_state_dict",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "shard",
]
