"""Policy losses, and the one reduction that turns them into a scalar.

    ppo_clip            -min(r A, clip(r) A), asymmetric, dual             per token
    ratio_policy_loss   -r A, for trust-region masks                       per token
    reinforce           -sg(w) A lp                                        per token
    gspo                ppo_clip on the response's geometric-mean ratio    per token
    cispo               -sg(clip(r)) A lp                                  per token
    dppo_tv, dppo_kl    -sg(min(r, C)) A lp where the divergence allows    per token
    reval_loss          squared residual of the path's soft Bellman sum    per response

Shapes: B sequences, T tokens. A = advantage, lp = log-probability of the sampled token under the
policy that is trained; sg = no gradient; r = exp(lp - lp_old). Only `logp` carries a gradient (in
`reval_loss` also `value`). Every loss takes a `mask` (None: every position counts); at a masked
position value and gradient are 0, whatever the inputs hold there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._numerics import (
    MAX_LOG_RATIO,
    check_finite,
    check_mask,
    check_shape,
    masked,
    ratio,
    row_mean,
    wide,
)


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
    _check_clip(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"expected dual_clip > 1 or None, got {dual_clip}")
    lp, old, a = _prepared(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    r = (lp - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """-min(s A, clip(s) A) with s = exp(mean_t (lp - lp_old)), one ratio for the whole response.

    The token's share of the gradient is that of the paper's token form, s_t = sg(s) exp(lp -
    sg(lp)): with advantages that are equal within a response and "seq_mean" weights the gradient is
    that of the sequence loss.

    Args:
        logp: [B, T], nats.
        old_logp: [B, T] of the policy the ratio starts from, nats.
        advantages: [B, T].
        mask: [B, T] bool; required, because the ratio is a mean over the response.
        clip_low: in [0, 1]; the range is [1 - clip_low, 1 + clip_high].
        clip_high: >= 0.

    Returns:
        Loss of each token, [B, T] in at least fp32; |mean log-ratio| is clamped to 20, and a
        response beyond it has no gradient.

    Raises:
        ValueError: shapes do not match, an input that counts is not finite, or a bound is out of
            range.

    Source:
        GSPO, arXiv 2507.18071.
    """
    _check_clip(clip_low, clip_high)
    lp, old, a = _prepared(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    log_s = row_mean((lp - old).detach(), mask)[:, None]
    own = masked(lp - lp.detach(), log_s.abs() <= MAX_LOG_RATIO)  # 0, and the gradient
    s = log_s.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * own.exp()
    return masked(torch.maximum(-a * s, -a * s.clamp(1 - clip_low, 1 + clip_high)), mask)


def cispo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A lp: the weight is clipped, every token trains.

    Args:
        logp: [B, T], nats.
        old_logp: [B, T] of the policy the ratio starts from, nats.
        advantages: [B, T].
        clip_low: in [0, 1]; 1 leaves small ratios as they are, as the paper does.
        clip_high: >= 0; the default is ours.
        mask: [B, T] bool.

    Returns:
        Loss of each token, [B, T] in at least fp32; |lp - lp_old| is clamped to 20 before the exp.

    Raises:
        ValueError: shapes do not match, an input that counts is not finite, or a bound is out of
            range.

    Source:
        CISPO, arXiv 2506.13585.
    """
    _check_clip(clip_low, clip_high)
    lp, old, a = _prepared(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    weight = ratio((lp - old).detach()).clamp(1 - clip_low, 1 + clip_high)
    return -weight * a * lp


def dppo_tv(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    threshold_low: float = 0.2,
    threshold_high: float = 0.2,
    max_ratio: float = 20.0,
    mask: Tensor | None = None,
) -> Tensor:
    """-sg(min(r, max_ratio)) A lp, masked where the sampled token's p has moved far the way A goes.

    With p and q the probabilities of the sampled token under the two policies: where A > 0 a token
    trains while p - q <= threshold_high, elsewhere while q - p <= threshold_low (|p - q| is the
    total variation of the two-outcome distribution: sampled token or not).

    Args:
        logp: [B, T], nats, <= 0.
        old_logp: [B, T] of the policy the ratio starts from (the rollout engine's, if it is to be
            corrected too), nats, <= 0.
        advantages: [B, T].
        threshold_low: in [0, 1].
        threshold_high: in [0, 1].
        max_ratio: > 0; upper bound of the weight.
        mask: [B, T] bool.

    Returns:
        Loss of each token, [B, T] in at least fp32.

    Raises:
        ValueError: shapes do not match, an input that counts is not finite, or a bound is out of
            range.

    Source:
        DPPO, arXiv 2602.04879, the binary total variation. The default thresholds are ours.
    """
    for name, value in (("threshold_low", threshold_low), ("threshold_high", threshold_high)):
        if not 0 <= value <= 1:
            raise ValueError(f"expected {name} in [0, 1], got {value}")
    lp, old, a = _prepared(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    moved = _probability(lp) - _probability(old)
    trains = torch.where(a > 0, moved <= threshold_high, moved >= -threshold_low)
    return _truncated_reinforce(lp, old, a, trains, max_ratio)


def dppo_kl(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    threshold_low: float = 0.05,
    threshold_high: float = 0.05,
    max_ratio: float = 20.0,
    mask: Tensor | None = None,
) -> Tensor:
    """`dppo_tv` with the KL of the two-outcome distributions, KL(q || p), in place of |p - q|.

    Args:
        logp: [B, T], nats, <= 0.
        old_logp: [B, T] of the policy the ratio starts from, nats, <= 0.
        advantages: [B, T].
        threshold_low: nats, >= 0; where A <= 0 a token whose p has fallen trains up to it.
        threshold_high: nats, >= 0; where A > 0 a token whose p has risen trains up to it.
        max_ratio: > 0; upper bound of the weight.
        mask: [B, T] bool.

    Returns:
        Loss of each token, [B, T] in at least fp32.

    Raises:
        ValueError: shapes do not match, an input that counts is not finite, or a bound is out of
            range.

    Source:
        DPPO, arXiv 2602.04879, the binary KL. The default thresholds are ours.
    """
    for name, value in (("threshold_low", threshold_low), ("threshold_high", threshold_high)):
        if not value >= 0:
            raise ValueError(f"expected {name} >= 0, got {value}")
    lp, old, a = _prepared(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    p, q = _probability(lp), _probability(old)
    rest_p, rest_q = (-x.detach().clamp_max(0).expm1() for x in (lp, old))  # 1 - p, 1 - q
    # q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)); infinite where p is 1 and q is not
    kl = q * (old - lp.detach()) + masked(rest_q * (rest_q / rest_p).log(), rest_q > 0)
    trains = torch.where(a > 0, (kl <= threshold_high) | (p <= q), (kl <= threshold_low) | (p >= q))
    return _truncated_reinforce(lp, old, a, trains, max_ratio)


def reval_loss(
    logp: Tensor,
    ref_logp: Tensor,
    value: Tensor,
    ref_value: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    beta: float,
    detach_value: bool = False,
) -> Tensor:
    """[V(s1) - V_ref(s1) + sum_t (lp_t - lp_ref_t) - r / beta]^2 of every response.

    The logits are read as action values, V = logsumexp of the logits of the last prompt token
    (`trimtab.triton_kernels.soft_value.initial_value`, or `logsumexp` of a fused head). The loss is
    right off-policy: the responses may come from any policy with full support.

    Args:
        logp: [B, T], nats.
        ref_logp: [B, T] of the reference policy, nats, at the same temperature.
        value: [B] V(s1) of the policy, nats; its gradient is part of the loss.
        ref_value: [B] V(s1) of the reference, nats.
        rewards: [B], centred by the group mean (`dr_grpo_advantages`); a truncated response is
            masked out whole, or has reward 0.
        mask: [B, T] bool; an all-masked row has loss 0.
        beta: > 0; 0.002 for responses of about 5k tokens, 0.02 for about 600.
        detach_value: no gradient through V(s1). Off-policy that converges to a wrong policy.

    Returns:
        Loss of each response, [B] in at least fp32; the objective is its mean over responses, which
        is `apply_weights(loss, weights)` with weights [B] of 1 / N, N over all ranks and parts.

    Raises:
        ValueError: shapes do not match, an input that counts is not finite, or beta is not
            positive.

    Source:
        ReVal, arXiv 2603.23355.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"expected beta > 0, got {beta}")
    lp, ref = _prepared(mask, logp=logp, ref_logp=ref_logp)
    rows = mask.any(1)
    per_response = {"value": value, "ref_value": ref_value, "rewards": rewards}
    for name, x in per_response.items():
        check_shape(name, x, mask.shape[:1], "[B]")
        check_finite(name, x.detach(), rows)
    v, v_ref, r = (masked(wide(x), rows) for x in per_response.values())
    if detach_value:
        v = v.detach()
    path = (lp - ref).sum(1)
    return masked(v - v_ref.detach() + path - r.detach() / beta, rows).square()


def apply_weights(token_loss: Tensor, weights: Tensor, keep: Tensor | None = None) -> Tensor:
    """The scalar loss: sum of w * l over the tokens that have a weight.

    Args:
        token_loss: [B, T], finite where a token counts; or [B], of whole responses.
        weights: shaped as the loss, from `aggregation_weights`.
        keep: [B] bool, from `trust_region_mask`: sequences with False add 0, and the weights stay
            as they are, so the denominator is the total. For the kept count as denominator, pass
            `keep` and `denominator="kept"` to `aggregation_weights` instead.

    Returns:
        0-d tensor in at least fp32.

    Raises:
        ValueError: shapes do not match, or a loss that counts is not finite.

    Source:
        arXiv 2512.23075: N is the total number of sequences, not of the kept ones.
    """
    check_shape("token_loss", token_loss, tuple(weights.shape), "shaped as weights")  # no broadcast
    check_finite("weights", weights)
    counted = weights != 0
    if keep is not None:
        check_shape("keep", keep, weights.shape[:1], "[B]")
        if keep.dtype != torch.bool:
            raise ValueError(f"expected keep of torch.bool, got {keep.dtype}")
        counted = counted & keep.view(-1, *[1] * (weights.ndim - 1))
    check_finite("token_loss", token_loss.detach(), counted)
    return (masked(wide(token_loss), counted) * weights.detach()).sum()


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"expected clip_low in [0, 1] and clip_high >= 0, got {clip_low}, {clip_high}"
        )


def _probability(logp: Tensor) -> Tensor:
    return logp.detach().clamp_max(0).exp()


def _truncated_reinforce(
    lp: Tensor, old: Tensor, a: Tensor, trains: Tensor, max_ratio: float
) -> Tensor:
    if not max_ratio > 0:
        raise ValueError(f"expected max_ratio > 0, got {max_ratio}")
    weight = ratio((lp - old).detach()).clamp_max(max_ratio)
    return masked(-weight * a * lp, trains)


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
