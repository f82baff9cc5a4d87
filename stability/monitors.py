"""Monitors: how many groups can teach anything, and what PPO's clipping takes away.

Shapes: B sequences, T tokens. r = pi / pi_old of the sampled token, A = advantage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._numerics import (
    check_finite,
    check_groups,
    check_mask,
    check_tokens,
    masked,
    mean_over,
    ratio,
    valid_rows,
    wide,
)
from .statistics import group_index, segment_min, segment_sum


@torch.no_grad()
def group_metrics(
    rewards: Tensor,
    group_ids: Tensor,
    valid: Tensor | None = None,
    *,
    pass_threshold: float = 0.5,
) -> dict[str, Tensor]:
    """Fractions of groups with different rewards, with passes alone and with failures alone.

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        valid: [B] bool; a rollout with False counts nowhere. None: all count.
        pass_threshold: a rollout passes when its reward is above it.

    Returns:
        0-d tensors, empty when no rollout counts: `groups/mixed`, the share of groups whose rewards
        differ, which are those with a gradient; `groups/all_pass` and `groups/all_fail` by the
        threshold (with rewards of 0 and 1 the three sum to 1); `groups/count`.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        "groups/mixed" is the effective-gradient ratio of arXiv 2509.25849.
    """
    if rewards.ndim != 1:
        raise ValueError(f"expected rewards [B], got {tuple(rewards.shape)}")
    check_groups(group_ids, rewards.shape[0])
    rows = valid_rows(valid, rewards)
    check_finite("rewards", rewards, rows)
    if not rows.any():
        return {}
    index, n = group_index(group_ids)
    passed = rows & (rewards > pass_threshold)
    sizes, passes = (segment_sum(x.long(), index, n) for x in (rows, passed))
    groups = sizes > 0
    scored = masked(wide(rewards), rows)
    lowest = segment_min(torch.where(rows, scored, torch.inf), index, n)
    highest = -segment_min(torch.where(rows, -scored, torch.inf), index, n)
    return {
        "groups/mixed": mean_over((highest > lowest).float(), groups),
        "groups/all_pass": mean_over((passes == sizes).float(), groups),
        "groups/all_fail": mean_over((passes == 0).float(), groups),
        "groups/count": groups.sum(),
    }


@torch.no_grad()
def clip_metrics(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> dict[str, Tensor]:
    """The four quadrants outside PPO's clip range, and the signal against what clipping removes.

    Args:
        log_ratio: [B, T] lp - lp_old of the sampled tokens, nats; clamped to +-20 before the exp.
        advantages: [B, T].
        mask: [B, T] bool.
        clip_low: the range is [1 - clip_low, 1 + clip_high]; in [0, 1].
        clip_high: >= 0.

    Returns:
        0-d tensors, empty when there is no token. Fractions of the tokens: `clip/clipped_high` (r
        above the range, A > 0), `clip/clipped_low` (r below, A < 0), and the two where PPO leaks
        the full gradient, `clip/leaked_high` (above, A < 0) and `clip/leaked_low` (below, A > 0).
        `clip/raw_signal` = |sum r A|; `clip/clipped_away` = |sum (r - clip(r)) A| over the clipped
        tokens; `clip/signal_ratio`, the first over the second, is absent when nothing is clipped.

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, or a bound is out of
            range.

    Source:
        arXiv 2512.16912 (read in part): a ratio of about 17 is healthy.
    """
    check_mask(mask)
    check_tokens("log_ratio", log_ratio, mask)
    check_tokens("advantages", advantages, mask)
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"expected clip_low in [0, 1] and clip_high >= 0, got {clip_low}, {clip_high}"
        )
    if not mask.any():
        return {}
    r = ratio(masked(wide(log_ratio), mask))
    a = masked(wide(advantages), mask)
    above, below = mask & (r > 1 + clip_high), mask & (r < 1 - clip_low)
    quadrants = {
        "clip/clipped_high": above & (a > 0),
        "clip/clipped_low": below & (a < 0),
        "clip/leaked_high": above & (a < 0),
        "clip/leaked_low": below & (a > 0),
    }
    clipped = quadrants["clip/clipped_high"] | quadrants["clip/clipped_low"]
    raw_signal = masked(r * a, mask).sum().abs()
    removed = masked((r - r.clamp(1 - clip_low, 1 + clip_high)) * a, clipped).sum().abs()
    metrics = {name: mean_over(hit.to(r.dtype), mask) for name, hit in quadrants.items()}
    metrics |= {"clip/raw_signal": raw_signal, "clip/clipped_away": removed}
    if removed > 0:
        metrics["clip/signal_ratio"] = raw_signal / removed
    return metrics
