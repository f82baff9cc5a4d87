"""Megatron-core: what a training script on it imports; each part is in a file of its own.

    optimizer = megatron_adam_mini(config, [model])    megatron_optimizer.py: AdamMini in its place
    policy_loss_function(model, labels, mask, loss)    megatron_loss.py: for forward_step
    length_triggered(scheduler)                        megatron_rate.py: OptimizerParamScheduler
    MegatronMonitors(config, watch)                    megatron_monitors.py: all ranks judge alike
    step = MegatronSharedPrefix(model)                 megatron_prefix.py: each prompt computed once

Tried with megatron-core 0.16.1 and 0.19.2; versions outside of 0.16 to 0.19 are refused.
"""

from ._versions import require, version_of

require("megatron-core", version_of("megatron.core"), "0.16", "0.20")

from .megatron_loss import policy_loss_function
from .megatron_monitors import MegatronMonitors
from .megatron_optimizer import megatron_adam_mini
from .megatron_prefix import MegatronSharedPrefix
from .megatron_rate import LengthTriggeredParamScheduler, length_triggered

__all__ = [
    "LengthTriggeredParamScheduler",
    "MegatronMonitors",
    "MegatronSharedPrefix",
    "length_triggered",
    "megatron_adam_mini",
    "policy_loss_function",
]
