"""Correction of the mismatch between the rollout engine and the trainer, and its metrics.

Shapes: B sequences, T tokens. r = pi_train / pi_rollout of the sampled token, ln r = lp_train -
lp_rollout. Frameworks mean different things by one name; the definitions here are:

    token_truncate      w_t = min(r_t, high)
    token_mask          w_t = r_t if r_t <= high else 0
    icepop              w_t = r_t if low <= r_t <= high else 0
    sequence_truncate   w_t = min(prod_j r_j, high), one value for all tokens of the sequence
    geometric_mask      w_t = 1 if low <= (prod_j r_j)^(1 / tokens) <= high else 0, for all tokens

Log-ratios (summed over the sequence where a product is meant) are clamped to +-20 before the exp.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ._numerics import (
    MAX_LOG_RATIO,
    check_choice,
    check_mask,
    check_tokens,
    k3,
    masked,
    mean_over,
    ratio,
    row_mean,
    wide,
)

_KINDS = ("token_truncate", "token_mask", "icepop", "sequence_truncate", "geometric_mask")
_EDGES = ("1e-6", "1e-4", "1e-2", "0.1", "0.5")  # of the trainer's probability of the sampled token


@torch.no_grad()
def importance_weights(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    kind: Literal["token_truncate", "token_mask", "icepop", "sequence_truncate", "geometric_mask"],
    low: float | None = None,
    high: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights that turn samples of the rollout engine into samples of the trainer's policy.

    Args:
        log_ratio: [B, T] lp_train - lp_rollout of the sampled tokens, nats.
        mask: [B, T] bool.
        kind: which of the definitions of the module's docstring.
        low: inclusive lower bound on the ratio: required by "icepop", optional for
            "geometric_mask", refused by the others, which have none.
        high: inclusive upper bound on the ratio, > 0.

    Returns:
        Weights [B, T] in at least fp32, detached, 0 at masked positions; and metrics over the
        tokens before (`ratio_*`) and after (`weight_*`), empty when there is no token.

    Raises:
        ValueError: shapes do not match, an unmasked log-ratio is not finite, or the bounds do not
            fit the kind.

    Source:
        Practice of RL frameworks, which use one name for several of these; no paper has them all.
    """
    check_mask(mask)
    check_tokens("log_ratio", log_ratio, mask)
    check_choice("kind", kind, _KINDS)
    if low is None and kind == "icepop":
        raise ValueError("expected low for kind 'icepop', got None")
    if low is not None and kind not in ("icepop", "geometric_mask"):
        raise ValueError(f"expected low=None for kind {kind!r}, got {low}")
    floor = 0.0 if low is None else low
    if not 0 <= floor <= high < math.inf or high == 0:
        raise ValueError(f"expected 0 <= low <= high and high > 0, got low={low}, high={high}")
    log_r = masked(wide(log_ratio), mask)
    if kind == "sequence_truncate":
        r = ratio(log_r.sum(1, keepdim=True)).expand_as(mask)
    elif kind == "geometric_mask":
        r = ratio(row_mean(log_r, mask)[:, None]).expand_as(mask)
    else:
        r = ratio(log_r)
    outside = (r < floor) | (r > high)
    if kind.endswith("truncate"):
        weights = r.clamp_max(high)
    else:
        inside = torch.ones_like(r) if kind == "geometric_mask" else r
        weights = masked(inside, ~outside)
    weights = masked(weights, mask)
    if not mask.any():
        return weights, {}
    return weights, {
        "importance/ratio_mean": mean_over(r, mask),
        "importance/ratio_max": masked(r, mask).max(),
        "importance/outside_fraction": mean_over(outside.to(r.dtype), mask),
        "importance/weight_mean": mean_over(weights, mask),
        "importance/weight_ess": _effective_fraction(weights, mask),
    }


@torch.no_grad()
def mismatch_metrics(logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far apart the trainer and the rollout engine are on the sampled tokens.

    Args:
        logp: [B, T] of the trainer, nats.
        rollout_logp: [B, T] of the rollout engine, nats, at the same temperature.
        mask: [B, T] bool.

    Returns:
        0-d tensors under `mismatch/`, over all tokens unless said otherwise. `k1` and `k3`: two
        estimates of KL(rollout || train), nats. `abs_dlogp_mean`, `abs_dlogp_max`: of |lp_train -
        lp_rollout|. `ppl_train`, `ppl_rollout`: mean over responses of exp(-mean_t lp);
        `log_ppl_gap`: mean over responses of ln ppl_train - ln ppl_rollout. `chi2_token`: mean r^2
        - 1; `chi2_sequence`: the same of the product of r over a response. `ess`: (sum r)^2 /
        (tokens * sum r^2), 1 when all are equal. `abs_dlogp/p_A_B`: mean |lp_train - lp_rollout|
        where the trainer's probability is in [A, B); a bucket without a token is absent. All are
        absent when there is no token.

    Raises:
        ValueError: shapes do not match, or an unmasked input is not finite.

    Source:
        The buckets: arXiv 2512.23087 (abstract read), whose bound says that the mismatch is in the
        tail.
    """
    check_mask(mask)
    check_tokens("logp", logp, mask)
    check_tokens("rollout_logp", rollout_logp, mask)
    if not mask.any():
        return {}
    train, rollout = masked(wide(logp), mask), masked(wide(rollout_logp), mask)
    log_r = train - rollout
    gap, r = log_r.abs(), ratio(log_r)
    rows = mask.any(1)
    surprise_train, surprise_rollout = row_mean(-train, mask), row_mean(-rollout, mask)
    metrics = {
        "mismatch/k1": mean_over(-log_r, mask),
        "mismatch/k3": mean_over(k3(log_r), mask),
        "mismatch/abs_dlogp_mean": mean_over(gap, mask),
        "mismatch/abs_dlogp_max": gap.max(),
        "mismatch/ppl_train": mean_over(surprise_train.clamp_max(MAX_LOG_RATIO).exp(), rows),
        "mismatch/ppl_rollout": mean_over(surprise_rollout.clamp_max(MAX_LOG_RATIO).exp(), rows),
        "mismatch/log_ppl_gap": mean_over(surprise_train - surprise_rollout, rows),
        "mismatch/chi2_token": mean_over(r.square(), mask) - 1,
        "mismatch/chi2_sequence": mean_over(ratio(log_r.sum(1)).square(), rows) - 1,
        "mismatch/ess": _effective_fraction(r, mask),
    }
    return metrics | _gap_by_probability(gap, train, mask)


def _gap_by_probability(gap: Tensor, logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    edges = logp.new_tensor([math.log(float(edge)) for edge in _EDGES])
    bucket = torch.bucketize(logp[mask], edges, right=True)  # an edge belongs above it
    sums = gap.new_zeros(len(_EDGES) + 1).index_add(0, bucket, gap[mask])
    counts = torch.bincount(bucket, minlength=len(_EDGES) + 1)
    bounds = ("0", *_EDGES, "1")
    return {
        f"mismatch/abs_dlogp/p_{bounds[i]}_{bounds[i + 1]}": sums[i] / count
        for i, count in enumerate(counts.tolist())
        if count
    }


def _effective_fraction(weights: Tensor, mask: Tensor) -> Tensor:
    """(sum w)^2 / (tokens * sum w^2), 0 when every weight is 0."""
    kept = masked(weights, mask)
    power = kept.square().sum()
    return kept.sum().square() / (mask.sum() * torch.where(power > 0, power, 1.0))
