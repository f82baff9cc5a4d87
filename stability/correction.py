"""Weights that correct the mismatch between the rollout engine and the trainer.

Shapes: B sequences, T tokens. r = pi_train / pi_rollout of the sampled token, ln r = lp_train -
lp_rollout, n = tokens of the response. What the frameworks mean by their names, here:

    ratio s of level      "token" r_t      "sequence" prod_j r_j      "geometric" (prod_j r_j)^(1/n)
    weight by outside     "truncate" min(max(s, low), high)     "zero" s [low <= s <= high]
                          "reject" [low <= s <= high]

    truncated IS                 level="token" or "sequence", outside="truncate"
    masked IS                    level="token" or "sequence", outside="zero"
    IcePop                       level="token", outside="zero", low and high
    geometric sequence mask      level="geometric", outside="reject", low and high

A sequence's weight stands at each of its tokens. Log-ratios (summed or averaged over the sequence
first where that is meant) are clamped to +-20 before the exp. Trust-region masks are in
trust_region.py; metrics of the mismatch in mismatch.py.
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
    masked,
    maximum,
    mean_over,
    ratio,
    row_mean,
    total,
    wide,
)


@torch.no_grad()
def importance_weights(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence", "geometric"] = "token",
    outside: Literal["truncate", "zero", "reject"] = "truncate",
    low: float | None = None,
    high: float = 2.0,
    normalize: bool = False,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights that turn samples of the rollout engine into samples of the trainer's policy.

    With `normalize` call it once on all rows of an optimizer step, then split into micro-batches.

    Args:
        log_ratio: [B, T] lp_train - lp_rollout of the sampled tokens, nats.
        mask: [B, T] bool.
        level: whose ratio, see the module's docstring.
        outside: what becomes of a ratio outside the bounds, and with "reject" of one inside.
        low: inclusive lower bound on the ratio; None: 0.
        high: inclusive upper bound on the ratio, > 0.
        normalize: divide by the mean weight of the batch (over its tokens; at the other levels over
            its responses), so that weights shift credit and not the step size. Weights that are all
            0 stay 0.
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        Weights [B, T] in at least fp32, detached, 0 at masked positions; and metrics, empty when
        there is no token: before, `importance/ratio_mean`, `ratio_max`, `fraction_high` and
        `fraction_low` (share of the tokens above and below the bounds); after,
        `importance/weight_mean`, `weight_ess`; with normalize, `importance/normalizer`, the mean
        weight before it.

    Raises:
        ValueError: shapes do not match, an unmasked log-ratio is not finite, or the bounds are no
            interval.

    Source:
        Practice of RL frameworks, which use one name for several of these; no paper has them all.
        Masking whole sequences by the geometric mean and truncation are in verl's rollout
        correction, masking tokens in IcePop.
    """
    with agreed(process_group, mask):
        check_mask(mask)
        check_tokens("log_ratio", log_ratio, mask)
    check_choice("level", level, ("token", "sequence", "geometric"))
    check_choice("outside", outside, ("truncate", "zero", "reject"))
    floor = 0.0 if low is None else low
    if not 0 <= floor <= high < math.inf or high == 0:
        raise ValueError(f"expected 0 <= low <= high and high > 0, got low={low}, high={high}")
    log_r = masked(wide(log_ratio), mask)
    if level == "sequence":
        log_r = log_r.sum(1, keepdim=True).expand_as(mask)
    elif level == "geometric":
        log_r = row_mean(log_r, mask)[:, None].expand_as(mask)
    r = ratio(log_r)
    above, below = r > high, r < floor
    if outside == "truncate":
        weights = r.clamp(floor, high)
    else:
        weights = masked(r if outside == "zero" else torch.ones_like(r), ~(above | below))
    weights = masked(weights, mask)
    metrics = {}
    if normalize:
        if level == "token":
            mean = mean_over(weights, mask, process_group)
        else:
            mean = mean_over(row_mean(weights, mask), mask.any(1), process_group)
        metrics["importance/normalizer"] = mean
        weights = weights / torch.where(mean > 0, mean, 1)
    if not total(mask.sum(), process_group):
        return weights, {}
    largest = masked(r, mask).max() if mask.numel() else r.new_zeros(())
    return weights, metrics | {
        "importance/ratio_mean": mean_over(r, mask, process_group),
        "importance/ratio_max": maximum(largest, process_group),
        "importance/fraction_high": mean_over(above.to(r.dtype), mask, process_group),
        "importance/fraction_low": mean_over(below.to(r.dtype), mask, process_group),
        "importance/weight_mean": mean_over(weights, mask, process_group),
        "importance/weight_ess": _effective_fraction(weights, mask, process_group),
    }


def _effective_fraction(
    weights: Tensor, mask: Tensor, process_group: ProcessGroup | None
) -> Tensor:
    """(sum w)^2 / (tokens * sum w^2), 0 when every weight is 0."""
    first = mean_over(weights, mask, process_group)
    second = mean_over(weights.square(), mask, process_group)
    return first.square() / torch.where(second > 0, second, 1.0)
