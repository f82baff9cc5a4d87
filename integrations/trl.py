"""TRL: what a training script on it imports; each part is in a file of its own.

SharedPrefixGRPOTrainer    trl_prefix.py: each distinct prompt of a batch computed once
StabilityGRPOTrainer       trl_stability.py: token baseline, aggregation, trust region, pruning,
                           length-triggered rate and monitors as keyword arguments
StabilityMixin             trl_stability.py: the same in front of another class
StabilityOptions           trl_options.py: those keyword arguments
"""

from ._versions import require, version_of

require("trl", version_of("trl"), "1.16", "2")

from .trl_options import StabilityOptions
from .trl_prefix import SharedPrefixGRPOTrainer
from .trl_stability import StabilityGRPOTrainer, StabilityMixin

__all__ = [
    "SharedPrefixGRPOTrainer",
    "StabilityGRPOTrainer",
    "StabilityMixin",
    "StabilityOptions",
]
