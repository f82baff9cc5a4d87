"""Per-token policy losses [B, T], and the one reduction that turns them into a scalar.

Shapes: B sequences, T tokens. A = advantage, lp = log-probability of the sampled token under the
policy that is trained; sg = no gradient. Only `logp` carries a gradient. Every loss takes a `mask`
(None: every position counts); at a masked position value and gradient are 0, whatever the inputs
hold there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._numerics import MAX_LOG_RATIO, check_finite, check_mask, check_shape, masked, wide


def reinforce(
    logp: Tensor,
    advantages: Tensor,
    importance: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Score-function loss: -sg(importance) * A * lp.

    Args:
        logp: [B, T], nats.
        advantages: [B, T].
        importance: [B, T] weights from `importance_weights`; None: 1.
        mask: [B, T] bool.

    Returns:
        Loss of each token, [B, T] in at least fp32.

    Raises:
        ValueError: shapes do not match, or an input that counts is not finite.

    Source:
        REINFORCE, Williams 1992.
    """
    if importance is None:
        lp, a = _prepared(mask, logp=logp, advantages=advantages)
        return -a * lp
    lp, a, weight = _prepared(mask, logp=logp, advantages=advantages, importance=importance)
    return -weight * a * lp


def ratio_policy_loss(
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    *,
    max_log_ratio: float = MAX_LOG_RATIO,
    mask: Tensor | None = None,
) -> Tensor:
    """-A * rho with rho = exp(lp - lp_rollout), whose gradient is that of Trust Region Masking.

    Args:
        logp: [B, T], nats.
        rollout_logp: [B, T] of the rollout engine, nats, at the same temperature.
        advantages: [B, T].
        max_log_ratio: in (0, 20]; |ln rho| is clamped to it before the exp, and a token beyond it
            has no gradient.
        mask: [B, T] bool.

    Returns:
        Loss of each token, [B, T] in at least fp32.

    Raises:
        ValueError: shapes do not match, an input that counts is not finite, or the clamp is out of
            range.

    Source:
        arXiv 2512.23075: the gradient is A rho grad lp; the sequences to keep come from
        `trust_region_mask`.
    """
    if not 0 < max_log_ratio <= MAX_LOG_RATIO:
        raise ValueError(f"expected max_log_ratio in (0, {MAX_LOG_RATIO}], got {max_log_ratio}")
    lp, old, a = _prepared(mask, logp=logp, rollout_logp=rollout_logp, advantages=advantages)
    return -a * (lp - old).clamp(-max_log_ratio, max_log_ratio).exp()


def ppo_clip(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(lp - lp_old).

    Args:
        logp: [B, T], nats.
        old_logp: [B, T] of the policy the ratio starts from, nats.
        advantages: [B, T].
        clip_low: in [0, 1].
        clip_high: >= 0.
        dual_clip: c > 1: where A < 0 the loss is at most -c A, so a large ratio has no gradient;
            None: off.
        mask: [B, T] bool.

    Returns:
        Loss of each token, [B, T] in at least fp32; |lp - lp_old| is clamped to 20 before the exp.

    Raises:
        ValueError: shapes do not match, an input that counts is not finite, or a bound is out of
            range.

    Source:
        PPO, arXiv 1707.06347; bounds that differ ("clip higher") are DAPO's, arXiv 2503.14476.
    """
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"expected clip_low in [0, 1] and clip_high >= 0, got {clip_low}, {clip_high}"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"expected dual_clip > 1 or None, got {dual_clip}")
    lp, old, a = _prepared(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    r = (lp - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)


def apply_weights(token_loss: Tensor, weights: Tensor, keep: Tensor | None = None) -> Tensor:
    """The scalar loss: sum of w * l over the tokens that have a weight.

    Args:
        token_loss: [B, T], finite where a token counts.
        weights: [B, T], from `aggregation_weights`.
        keep: [B] bool, from `trust_region_mask`: sequences with False add 0, and the weights stay
            as they are, so the denominator is the total. For the kept count as denominator, pass
            `mask & keep[:, None]` and `valid=keep` to `aggregation_weights` instead.

    Returns:
        0-d tensor in at least fp32.

    Raises:
        ValueError: shapes do not match, or a loss that counts is not finite.

    Source:
        arXiv 2512.23075: N is the total number of sequences, not of the kept ones.
    """
    check_shape("token_loss", token_loss, tuple(weights.shape), "shaped as weights")
    check_finite("weights", weights)
    counted = weights != 0
    if keep is not None:
        check_shape("keep", keep, weights.shape[:1], "[B]")
        if keep.dtype != torch.bool:
            raise ValueError(f"expected keep of torch.bool, got {keep.dtype}")
        counted = counted & keep[:, None]
    check_finite("token_loss", token_loss.detach(), counted)
    return (masked(wide(token_loss), counted) * weights.detach()).sum()


def _prepared(mask: Tensor | None, **inputs: Tensor) -> list[Tensor]:
    """The checked inputs, at least fp32, zero where masked; all but `logp` without gradient.

    Masked before the arithmetic: 0 * NaN in the backward pass would reach the logits.
    """
    shape = tuple(inputs["logp"].shape)
    if mask is not None:
        check_mask(mask)
        check_shape("logp", inputs["logp"], mask.shape, "[B, T]")
    for name, x in inputs.items():
        check_shape(name, x, shape, "shaped as logp")
        check_finite(name, x.detach(), mask)
    widened = [wide(x if name == "logp" else x.detach()) for name, x in inputs.items()]
    return widened if mask is None else [masked(x, mask) for x in widened]
