"""Trust region masking: drop whole sequences on which the trainer has left the rollout policy.

Shapes: B sequences, T tokens. rho = pi / pi_rollout, log_ratio = ln rho = lp_train - lp_rollout, in
nats. A kept sequence keeps all its tokens. Masks never enter the denominator by themselves: weights
come from `aggregation_weights`, `apply_weights(..., keep=...)` zeroes sequences and leaves N total.

Source: arXiv 2512.23075.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._numerics import (
    agreed,
    check_choice,
    check_mask,
    check_tokens,
    excess,
    k3,
    masked,
    maximum,
    mean_over,
    row_mean,
    total,
    wide,
)

_STATISTICS = ("k2", "k3", "abs_log_ratio", "exact_kl")


@torch.no_grad()
def trust_region_mask(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    max_statistic: Literal["k2", "k3", "abs_log_ratio", "exact_kl"] = "k2",
    max_threshold: float = 0.05,
    mean_statistic: Literal["k2", "k3", "abs_log_ratio", "exact_kl"] = "k3",
    mean_threshold: float = 0.001,
    exact_kl: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sequences whose largest and whose mean token divergence are both within their thresholds.

    Args:
        log_ratio: [B, T] lp_train - lp_rollout of the sampled tokens, nats.
        mask: [B, T] bool.
        max_statistic: "k2" = (ln rho)^2 / 2, "k3" = rho - 1 - ln rho, "abs_log_ratio" = |ln rho|,
            or "exact_kl".
        max_threshold: upper bound, inclusive, on the statistic's maximum over the tokens.
        mean_statistic: of the same.
        mean_threshold: upper bound, inclusive, on the statistic's mean over the tokens.
        exact_kl: [B, T] KL(pi_rollout || pi) at each token, nats; only with it the paper's
            guarantee holds.
        process_group: the ranks whose rows the metrics are of; every one of them must call. None:
            this process alone. The mask of a row depends on no other.

    Returns:
        keep [B] bool (an all-masked row is kept) and metrics, which are empty when there is no
        token.

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, a statistic is unknown, or
            "exact_kl" is asked for and not given.

    Source:
        arXiv 2512.23075.
    """
    check_choice("max_statistic", max_statistic, _STATISTICS)
    check_choice("mean_statistic", mean_statistic, _STATISTICS)
    _check_thresholds(max_threshold=max_threshold, mean_threshold=mean_threshold)
    with agreed(process_group, mask):
        check_mask(mask)
        check_tokens("log_ratio", log_ratio, mask)
        if exact_kl is not None:
            check_tokens("exact_kl", exact_kl, mask)
    if exact_kl is None and "exact_kl" in (max_statistic, mean_statistic):
        raise ValueError("expected exact_kl [B, T] for the statistic 'exact_kl', got None")
    log_rho = masked(wide(log_ratio), mask)
    statistics = {"k2": log_rho.square() / 2, "abs_log_ratio": log_rho.abs(), "k3": k3(log_rho)}
    if exact_kl is not None:
        statistics["exact_kl"] = wide(exact_kl)
    largest = masked(statistics[max_statistic], mask).amax(1)
    average = row_mean(statistics[mean_statistic], mask)
    empty = ~mask.any(1)
    within_max, within_mean = largest <= max_threshold, average <= mean_threshold
    keep = (within_max & within_mean) | empty
    metrics = _kept_metrics(keep, average, mask, process_group)
    if metrics:
        for name, within in (("peak", within_max), ("mean", within_mean)):
            rejected = mean_over((~within).float(), ~empty, process_group)
            metrics[f"trust_region/rejected_by_{name}"] = rejected
        peak = largest.max() if len(largest) else largest.new_zeros(())
        metrics["trust_region/peak_max"] = maximum(peak, process_group)
    return keep, metrics


@torch.no_grad()
def sequence_error_rate_mask(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    threshold: float = 0.05,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sequences whose mean |rho - 1| is within a threshold ("ser"), whatever their length.

    Args:
        log_ratio: [B, T] lp_train - lp_rollout, nats.
        mask: [B, T] bool.
        threshold: inclusive; 0.03 to 0.10 is the range to choose from (the default is ours).
        process_group: the ranks whose rows the metrics are of; every one of them must call. None:
            this process alone. The mask of a row depends on no other.

    Returns:
        keep [B] bool (an all-masked row is kept) and metrics, which are empty when there is no
        token.

    Raises:
        ValueError: shapes do not match, or an unmasked input is not finite.

    Source:
        arXiv 2512.23075.
    """
    _check_thresholds(threshold=threshold)
    with agreed(process_group, mask):
        check_mask(mask)
        check_tokens("log_ratio", log_ratio, mask)
    average = row_mean(excess(masked(wide(log_ratio), mask)).abs(), mask)
    keep = (average <= threshold) | ~mask.any(1)
    return keep, _kept_metrics(keep, average, mask, process_group)


@torch.no_grad()
def length_neutral_mask(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    horizon: int,
    max_tv: float,
    max_kl: float,
    threshold: float = 0.05,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sequences whose |rho - 1|, weighted by how much is still to come, is small ("ln_trm").

    With t = 1, 2, ... counting a response's generated tokens and T the horizon:

        w_t = min(1, (T - t) eps, sqrt((T - t) delta / 2))
        accept iff sum_t |rho_t - 1| w_t / sum_t w_t <= threshold

    Args:
        log_ratio: [B, T] lp_train - lp_rollout, nats.
        mask: [B, T] bool; no row has more than `horizon` tokens.
        horizon: T, tokens; the response limit.
        max_tv: eps, the largest total variation of one token, > 0.
        max_kl: delta, the largest KL of one token, nats, > 0.
        threshold: inclusive (the paper's text writes delta for this too; here the two are apart).
        process_group: the ranks whose rows the metrics are of; every one of them must call. None:
            this process alone. The mask of a row depends on no other.

    Returns:
        keep [B] bool (a row whose weights sum to 0 is kept) and metrics, empty when there is no
        token.

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, a scalar is out of its
            range, or a row is longer than the horizon.

    Source:
        arXiv 2512.23075.
    """
    _check_positive(max_tv=max_tv, max_kl=max_kl)
    _check_thresholds(threshold=threshold)
    with agreed(process_group, mask):
        check_mask(mask)
        check_tokens("log_ratio", log_ratio, mask)
        if horizon < 1 or (mask.sum(1) > horizon).any():
            raise ValueError(f"expected horizon >= tokens of every row, got {horizon}")
    log_rho = wide(log_ratio)
    to_come = (horizon - mask.cumsum(1)).to(log_rho.dtype)
    weight = masked((to_come * max_tv).minimum((to_come * max_kl / 2).sqrt()).clamp_max(1), mask)
    total = weight.sum(1)
    weighted = (excess(masked(log_rho, mask)).abs() * weight).sum(1)
    average = weighted / torch.where(total > 0, total, 1.0)
    keep = average <= threshold
    return keep, _kept_metrics(keep, average, mask, process_group)


def _kept_metrics(
    keep: Tensor, average: Tensor, mask: Tensor, process_group: ProcessGroup | None
) -> dict[str, Tensor]:
    rows = mask.any(1)
    if not total(rows.sum(), process_group):
        return {}
    kept = keep.float()
    return {
        "trust_region/kept_sequences": mean_over(kept, rows, process_group),
        "trust_region/kept_tokens": mean_over(
            kept[:, None].expand(mask.shape), mask, process_group
        ),
        "trust_region/mean_before": mean_over(average, rows, process_group),
        "trust_region/mean_after": mean_over(average, rows & keep, process_group),
    }


def _check_thresholds(**thresholds: float) -> None:
    for name, value in thresholds.items():
        if not value >= 0:
            raise ValueError(f"expected {name} >= 0, got {value}")


def _check_positive(**scalars: float) -> None:
    for name, value in scalars.items():
        if not 0 < value < math.inf:
            raise ValueError(f"expected {name} > 0 and finite, got {value}")
