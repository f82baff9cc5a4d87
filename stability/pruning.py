"""Dynamic vocabulary pruning: what becomes of a token outside the safe set, and what to log.

The safe set of one token is S = {v : p(v) >= rho * max_u p(u)}, on logits divided by the
temperature. The statistics themselves come from `response_statistics(..., prune=rho)`. Every engine
prunes with its own logits, so a token the rollout engine sampled can be outside the trainer's S.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..triton_kernels.token_stats import TokenStats
from ._numerics import check_choice, check_mask, check_shape, check_tokens, mean_over

DEFAULT_RHO = math.exp(-13)  # the paper's value is recalled, not verified


def out_of_set_mask(
    in_safe_set: Tensor,
    mask: Tensor,
    *,
    policy: Literal["include", "mask_token", "reject_sequence"] = "include",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mask of the tokens that train, given which sampled tokens lie in the trainer's safe set.

    Args:
        in_safe_set: [B, T] bool, from `response_statistics(..., prune=rho)`.
        mask: [B, T] bool, True at a generated token.
        policy: "include" trains on such a token, which the statistics force into S; "mask_token"
            drops it; "reject_sequence" drops every token of its sequence.

    Returns:
        The mask [B, T] bool and metrics (fractions of the unmasked tokens and of the sequences); no
        metrics when there is no token.

    Raises:
        ValueError: shapes or dtypes do not match, or the policy is unknown.

    Source:
        arXiv 2512.23087 (abstract read; the three policies are derived here).
    """
    check_mask(mask)
    check_shape("in_safe_set", in_safe_set, mask.shape, "[B, T]")
    if in_safe_set.dtype != torch.bool:
        raise ValueError(f"expected in_safe_set of torch.bool, got {in_safe_set.dtype}")
    check_choice("policy", policy, ("include", "mask_token", "reject_sequence"))
    outside = mask & ~in_safe_set
    if policy == "include":
        kept = mask
    elif policy == "mask_token":
        kept = mask & in_safe_set
    else:
        kept = mask & ~outside.any(1, keepdim=True)
    if not mask.any():
        return kept, {}
    rows = mask.any(1)
    return kept, {
        "pruning/out_of_set_fraction": mean_over(outside.float(), mask),
        "pruning/out_of_set_sequences": mean_over(outside.any(1).float(), rows),
        "pruning/dropped_tokens": mean_over((mask & ~kept).float(), mask),
    }


def pruning_metrics(stats: TokenStats, mask: Tensor) -> dict[str, Tensor]:
    """Kept mass, size of the safe set and out-of-set fraction over the unmasked tokens.

    Args:
        stats: of [B, T] tensors, from `response_statistics(..., prune=rho)`.
        mask: [B, T] bool.

    Returns:
        0-d tensors `pruning/kept_mass_mean`, `pruning/kept_mass_min` (probability under the full
        softmax, label included), `pruning/safe_count_mean` (tokens) and
        `pruning/out_of_set_fraction`; from a fused head also `pruning/skipped_fraction`, the share
        of the vocabulary that its backward leaves out. Empty when there is no token.

    Raises:
        ValueError: the statistics were computed without pruning, or shapes do not match.

    Source:
        arXiv 2512.23087 (abstract read). Differs from the paper: the mass is of S and the sampled
        token.
    """
    check_mask(mask)
    if stats.log_kept_mass is None or stats.safe_count is None or stats.in_safe_set is None:
        raise ValueError("expected stats computed with prune=rho, got stats without a safe set")
    check_tokens("stats.log_kept_mass", stats.log_kept_mass.detach(), mask)
    if not mask.any():
        return {}
    kept_mass = stats.log_kept_mass.detach().clamp_max(0).exp()
    skipped = {}
    if stats.skipped_fraction is not None:
        skipped["pruning/skipped_fraction"] = mean_over(stats.skipped_fraction, mask)
    return skipped | {
        "pruning/kept_mass_mean": mean_over(kept_mass, mask),
        "pruning/kept_mass_min": torch.where(mask, kept_mass, 1.0).min(),
        "pruning/safe_count_mean": mean_over(stats.safe_count.to(kept_mass.dtype), mask),
        "pruning/out_of_set_fraction": mean_over((~stats.in_safe_set).to(kept_mass.dtype), mask),
    }
