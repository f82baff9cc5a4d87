"""Remedies that keep RL runs stable: advantages, weights, masks, losses and monitors.

Every function takes and returns tensors [B, T] and a mask, never a trainer. The data's way:
response_statistics or pruned_statistics -> advantages -> importance_weights and trust_region_mask
-> aggregation_weights -> a loss -> apply_weights. Packed rows come and go by `pad_packed`. What
counts rows of a whole batch takes a `process_group`: every rank gets the result of one process.
"""

from .advantages import (
    broadcast_advantages,
    dr_grpo_advantages,
    grpo_advantages,
    kl_penalty,
    opo_advantages,
    reinforce_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
    tree_advantages,
)
from .aggregation import aggregation_weights, sign_length_coupling
from .correction import importance_weights
from .divergence_bounds import trust_region_bounds, trust_region_indicators
from .imitation import hybrid_imitation_loss, imitation_advantages
from .losses import (
    apply_weights,
    cispo,
    dppo_kl,
    dppo_tv,
    gspo,
    ppo_clip,
    ratio_policy_loss,
    reinforce,
    reval_loss,
)
from .metrics import clip_metrics, entropy_metrics, group_metrics, sign_length_metrics
from .mismatch import MismatchReport, mismatch_report
from .monitors import (
    ClipEntropyMonitor,
    GradientNormMonitor,
    MismatchMonitor,
    SignLengthMonitor,
    VarianceMonitor,
)
from .pruning import (
    DEFAULT_RHO,
    PrunedStatistics,
    out_of_set_mask,
    pad_support,
    pruned_statistics,
    pruning_metrics,
    replayed_statistics,
)
from .readings import Reading, overall
from .statistics import (
    linear_response_statistics,
    pack_padded,
    pad_packed,
    response_statistics,
)
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
from .watch import HOST_NAMES, StabilityWatch, Verdict

__all__ = [
    "DEFAULT_RHO",
    "HOST_NAMES",
    "ClipEntropyMonitor",
    "GradientNormMonitor",
    "MismatchMonitor",
    "MismatchReport",
    "PrunedStatistics",
    "Reading",
    "SignLengthMonitor",
    "StabilityWatch",
    "VarianceMonitor",
    "Verdict",
    "aggregation_weights",
    "apply_weights",
    "broadcast_advantages",
    "cispo",
    "clip_metrics",
    "dppo_kl",
    "dppo_tv",
    "dr_grpo_advantages",
    "entropy_metrics",
    "gradient_variance_proxy",
    "group_metrics",
    "grpo_advantages",
    "gspo",
    "hybrid_imitation_loss",
    "imitation_advantages",
    "importance_weights",
    "kl_penalty",
    "length_neutral_mask",
    "linear_response_statistics",
    "logit_gradient_proxy",
    "mismatch_report",
    "opo_advantages",
    "optimal_token_baseline",
    "out_of_set_mask",
    "overall",
    "pack_padded",
    "pad_packed",
    "pad_support",
    "ppo_clip",
    "pruned_statistics",
    "pruning_metrics",
    "ratio_policy_loss",
    "reinforce",
    "reinforce_advantages",
    "reinforce_pp_advantages",
    "remax_advantages",
    "replayed_statistics",
    "response_statistics",
    "reval_loss",
    "rloo_advantages",
    "sequence_error_rate_mask",
    "sign_length_coupling",
    "sign_length_metrics",
    "tree_advantages",
    "trust_region_bounds",
    "trust_region_indicators",
    "trust_region_mask",
]
