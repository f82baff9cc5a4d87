"""Remedies that keep RL runs stable: advantages, weights, masks, losses and monitors.

Every function takes and returns tensors [B, T] and a mask, never a trainer. The data's way:
response_statistics -> advantages or optimal_token_baseline -> importance_weights and
trust_region_mask -> aggregation_weights -> a loss -> apply_weights.
"""

from .advantages import (
    broadcast_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
)
from .aggregation import aggregation_weights, sign_length_coupling
from .correction import importance_weights, mismatch_metrics
from .divergence_bounds import trust_region_bounds
from .losses import apply_weights, ppo_clip, ratio_policy_loss, reinforce
from .monitors import clip_metrics, group_metrics
from .pruning import DEFAULT_RHO, out_of_set_mask, pruning_metrics
from .statistics import linear_response_statistics, response_statistics
from .token_baseline import (
    gradient_variance_proxy,
    logit_gradient_proxy,
    optimal_token_baseline,
)
from .trust_region import (
    length_neutral_mask,
    sequence_error_rate_mask,
    trust_region_mask,
)

__all__ = [
    "DEFAULT_RHO",
    "aggregation_weights",
    "apply_weights",
    "broadcast_advantages",
    "clip_metrics",
    "gradient_variance_proxy",
    "group_metrics",
    "group_relative_advantages",
    "importance_weights",
    "leave_one_out_advantages",
    "length_neutral_mask",
    "linear_response_statistics",
    "logit_gradient_proxy",
    "mismatch_metrics",
    "optimal_token_baseline",
    "out_of_set_mask",
    "ppo_clip",
    "pruning_metrics",
    "ratio_policy_loss",
    "reinforce",
    "response_statistics",
    "sequence_error_rate_mask",
    "sign_length_coupling",
    "trust_region_bounds",
    "trust_region_mask",
]
