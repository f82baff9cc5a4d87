"""Numbers to watch: groups that teach, what PPO's clipping takes away, where entropy is going.

Shapes: B sequences, T tokens. r = pi / pi_old of the sampled token, A = advantage. With a process
group the numbers are those of all ranks' rows, and every rank must call. Monitors (monitors.py)
judge them. More numbers: mismatch.py, `gradient_variance_proxy`, `sign_length_coupling`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._numerics import (
    agreed,
    check_finite,
    check_groups,
    check_mask,
    check_shape,
    check_tensor,
    check_tokens,
    masked,
    mean_over,
    ratio,
    total,
    valid_rows,
    wide,
)
from .aggregation import sign_length_coupling
from .statistics import group_index, segment_min, segment_sum


@torch.no_grad()
def group_metrics(
    rewards: Tensor,
    group_ids: Tensor,
    valid: Tensor | None = None,
    *,
    pass_threshold: float = 0.5,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Fractions of groups with different rewards, with passes alone and with failures alone.

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        valid: [B] bool; a rollout with False counts nowhere. None: all count.
        pass_threshold: a rollout passes when its reward is above it.
        process_group: ranks over which groups may be spread. None: this process alone.

    Returns:
        0-d tensors, empty when no rollout counts: `groups/mixed`, the share of groups whose rewards
        differ, which are those with a gradient; `groups/all_pass` and `groups/all_fail` by the
        threshold (with rewards of 0 and 1 the three sum to 1); `groups/count`.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        "groups/mixed" is the effective-gradient ratio of arXiv 2509.25849.
    """
    with agreed(process_group, rewards):
        check_tensor("rewards", rewards)
        if rewards.ndim != 1:
            raise ValueError(f"expected rewards [B], got {tuple(rewards.shape)}")
        check_groups(group_ids, rewards.shape[0])
        rows = valid_rows(valid, rewards)
        check_finite("rewards", rewards, rows)
    if not total(rows.sum(), process_group):
        return {}
    index, n = group_index(group_ids, process_group)
    passed = rows & (rewards > pass_threshold)
    sizes, passes = (segment_sum(x.long(), index, n, process_group) for x in (rows, passed))
    groups = sizes > 0
    scored = masked(wide(rewards), rows)
    lowest = segment_min(torch.where(rows, scored, torch.inf), index, n, process_group)
    highest = -segment_min(torch.where(rows, -scored, torch.inf), index, n, process_group)
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
    *,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The four quadrants outside PPO's clip range, and the signal against what clipping removes.

    Args:
        log_ratio: [B, T] lp - lp_old of the sampled tokens, nats; clamped to +-20 before the exp.
        advantages: [B, T].
        mask: [B, T] bool.
        clip_low: the range is [1 - clip_low, 1 + clip_high]; in [0, 1].
        clip_high: >= 0.
        process_group: the ranks whose rows form the batch. None: this process alone.

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
    with agreed(process_group, mask):
        check_mask(mask)
        check_tokens("log_ratio", log_ratio, mask)
        check_tokens("advantages", advantages, mask)
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"expected clip_low in [0, 1] and clip_high >= 0, got {clip_low}, {clip_high}"
        )
    if not total(mask.sum(), process_group):
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
    removed = masked((r - r.clamp(1 - clip_low, 1 + clip_high)) * a, clipped).sum()
    signals = torch.stack([masked(r * a, mask).sum(), removed])
    raw_signal, removed = total(signals, process_group).abs()
    metrics = {
        name: mean_over(hit.to(r.dtype), mask, process_group) for name, hit in quadrants.items()
    }
    metrics |= {"clip/raw_signal": raw_signal, "clip/clipped_away": removed}
    if removed > 0:
        metrics["clip/signal_ratio"] = raw_signal / removed
    return metrics


@torch.no_grad()
def entropy_metrics(
    entropy: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    lr: float = 1.0,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Mean entropy, and the first-order prediction of what the step will do to it.

    Args:
        entropy: [B, T] of the policy at each position, nats.
        logp: [B, T] of the sampled token, nats.
        advantages: [B, T].
        mask: [B, T] bool.
        lr: step size in front of the prediction. It is exact to first order for a natural-gradient
            step of this size on a softmax policy's logits, and says sign and trend for others.
        process_group: the ranks whose rows form the batch. None: this process alone.

    Returns:
        0-d tensors, empty when there is no token: `entropy/mean`, nats; `entropy/covariance` =
        Cov(lp, A) over the tokens; `entropy/predicted_change` = -lr Cov(lp, A).

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, or lr is negative.

    Source:
        arXiv 2512.16912 (read in part).
    """
    with agreed(process_group, mask):
        check_mask(mask)
        for name, x in (("entropy", entropy), ("logp", logp), ("advantages", advantages)):
            check_tokens(name, x, mask)
    if not lr >= 0:
        raise ValueError(f"expected lr >= 0, got {lr}")
    if not total(mask.sum(), process_group):
        return {}
    centred_lp, centred_a = (  # both: large advantages that are not centred would drown it in fp32
        masked(wide(x) - mean_over(wide(x), mask, process_group), mask) for x in (logp, advantages)
    )
    covariance = mean_over(centred_lp * centred_a, mask, process_group)
    return {
        "entropy/mean": mean_over(wide(entropy), mask, process_group),
        "entropy/covariance": covariance,
        "entropy/predicted_change": -lr * covariance,
    }


@torch.no_grad()
def sign_length_metrics(
    weights: Tensor,
    outcome_advantages: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    *,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """How the aggregation ties the sign of the advantage to the length of the response.

    At equal lengths every rule gives the responses of a group one weight W = sum_t w. What their
    differences add to the loss, sum (W - mean of the group's W) A, is the work of lengths alone.

    Args:
        weights: [B, T], from `aggregation_weights`.
        outcome_advantages: [B], finite where a row has a weight.
        mask: [B, T] bool, True at a generated token.
        group_ids: [B] of an integer dtype.
        process_group: the ranks whose rows form the batch; groups may be spread over them. None:
            this process alone.

    Returns:
        0-d tensors, empty when no row with a weight has an advantage: `coupling/sum` =
        `sign_length_coupling`, sum(w A); `coupling/by_length`, the sum above, and
        `coupling/share`, that over sum(W |A|); `coupling/length_positive`,
        `coupling/length_negative`: mean tokens of the responses of either sign, absent when there
        is none; `coupling/length_gap`, the first over the second.

    Raises:
        ValueError: shapes do not match, or an input that counts is not finite.

    Source:
        arXiv 2605.04077 (read in part); the comparison with equal lengths is ours.
    """
    with agreed(process_group, mask):
        check_mask(mask)
        check_shape("weights", weights, mask.shape, "[B, T]")
        check_groups(group_ids, mask.shape[0])
        coupling = sign_length_coupling(weights, outcome_advantages)
    rows = (weights != 0).any(1)
    a = masked(wide(outcome_advantages), rows)
    index, n = group_index(group_ids, process_group)
    row = weights.sum(1)
    table = segment_sum(torch.stack([row, rows.to(row.dtype)], 1), index, n, process_group)
    excess = masked(row - (table[:, 0] / table[:, 1].clamp_min(1))[index], rows)
    sums = torch.stack([coupling, (excess * a).sum(), (row * a.abs()).sum()])
    coupling, by_length, power = total(sums, process_group)
    if not power > 0:
        return {}
    metrics = {
        "coupling/sum": coupling,
        "coupling/by_length": by_length,
        "coupling/share": by_length / power,
    }
    lengths = mask.sum(1).to(a.dtype)
    for name, side in (("positive", a > 0), ("negative", a < 0)):
        if total(side.sum(), process_group):
            metrics[f"coupling/length_{name}"] = mean_over(lengths, side, process_group)
    if {"coupling/length_positive", "coupling/length_negative"} <= metrics.keys():
        metrics["coupling/length_gap"] = (
            metrics["coupling/length_positive"] / metrics["coupling/length_negative"]
        )
    return metrics
