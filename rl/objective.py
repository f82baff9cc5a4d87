"""The objective of one batch: logits, statistics, advantages, weights, loss.

Shapes: B rollouts, T response tokens, N = real tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..stability import (
    aggregation_weights,
    apply_weights,
    broadcast_advantages,
    clip_metrics,
    dr_grpo_advantages,
    gradient_variance_proxy,
    grpo_advantages,
    importance_weights,
    mismatch_report,
    optimal_token_baseline,
    out_of_set_mask,
    ppo_clip,
    pruning_metrics,
    ratio_policy_loss,
    reinforce,
    rloo_advantages,
    sign_length_coupling,
    trust_region_mask,
)
from ..triton_kernels.linear_token_stats import linear_token_stats
from ..triton_kernels.token_stats import TokenStats, token_stats
from .batch import RolloutBatch
from .config import UpdateConfig
from .responses import response_hidden, response_logits

Metrics = dict[str, Tensor]


def policy_statistics(
    policy: PreTrainedModel, batch: RolloutBatch, config: UpdateConfig, temperature: float
) -> TokenStats:
    """Statistics of the batch's tokens under the policy being trained.

    Args:
        policy: causal LM.
        batch: B rollouts.
        config: route, head and pruning.
        temperature: of the rollouts.

    Returns:
        TokenStats of [B, T] tensors, 0 at padding; differentiable.
    """
    responses = (policy, batch.prompts, batch.tokens, batch.mask, batch.group_index)
    labels = batch.tokens[batch.mask]
    rho = None if config.pruning is None else config.pruning.rho
    if config.head == "fused":
        hidden, head = response_hidden(*responses, route=config.route)
        flat = linear_token_stats(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            softcap=head.softcap,
            temperature=temperature,
            prune=rho,
        )
    else:
        logits = response_logits(*responses, route=config.route)
        flat = token_stats(logits, labels, temperature=temperature, prune=rho)

    def padded(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.new_zeros(batch.mask.shape).masked_scatter(batch.mask, x)

    return TokenStats(*map(padded, flat))


def outcome_advantages(batch: RolloutBatch, config: UpdateConfig) -> Tensor:
    """[B] one advantage per rollout; its sign decides the side in balanced aggregation."""
    if config.advantage == "leave_one_out":
        return rloo_advantages(batch.rewards, batch.group_ids)
    if config.advantage == "group_std":
        return grpo_advantages(batch.rewards, batch.group_ids)
    return dr_grpo_advantages(batch.rewards, batch.group_ids)


def token_weights(
    batch: RolloutBatch,
    config: UpdateConfig,
    max_tokens: int,
    process_group: torch.distributed.ProcessGroup | None,
    keep: Tensor | None = None,
) -> Tensor:
    """[B, T] weight of each token, with counts over the whole batch and all processes.

    Args:
        batch: every rollout of this process's share of the batch.
        config: the rule.
        max_tokens: the constant of `seq_mean_token_sum_norm`.
        process_group: None in a single process.
        keep: [B] bool; given, only these rollouts count (`denominator: kept`).

    Returns:
        [B, T] fp32, >= 0; 0 where no token is.
    """
    return aggregation_weights(
        batch.mask,
        batch.group_ids,
        outcome_advantages(batch, config),
        rule=config.aggregation,
        max_length=max_tokens,
        zero_advantage=config.zero_advantage,
        keep=keep,
        denominator="kept",
        process_group=process_group,
    )


def trusted_rollouts(
    stats: TokenStats, batch: RolloutBatch, config: UpdateConfig
) -> tuple[Tensor, Metrics]:
    """[B] bool: rollouts inside the trust region (all of them when it is off)."""
    if config.trust_region is None:
        return batch.mask.new_ones(len(batch)), {}
    return trust_region_mask(
        stats.logp.detach() - batch.rollout_logp,
        batch.mask,
        max_statistic=config.trust_region.max_statistic,
        max_threshold=config.trust_region.max_threshold,
        mean_threshold=config.trust_region.mean_threshold,
    )


class Objective(NamedTuple):
    """What one part of a batch gives.

    Args:
        loss: scalar with a graph; the parts' losses add up to the batch's.
        stats: [B, T] statistics, detached.
        advantages: [B, T].
    """

    loss: Tensor
    stats: TokenStats
    advantages: Tensor


def objective(
    stats: TokenStats,
    batch: RolloutBatch,
    weights: Tensor,
    old_logp: Tensor,
    config: UpdateConfig,
) -> Objective:
    """Loss of (a part of) a batch, such that the parts' losses add up to the batch's.

    Args:
        stats: [B, T] statistics under the policy being trained.
        batch: whole groups.
        weights: [B, T] of `token_weights`.
        old_logp: [B, T] trainer's log-probs when the batch was first seen, detached.
        config: the parts that are switched on.

    Returns:
        Objective.
    """
    seen = TokenStats(*(x if x is None else x.detach() for x in stats))
    keep, _ = trusted_rollouts(seen, batch, config)
    mask, _ = trained_tokens(seen, batch, config)
    # pi_old / pi_rollout, at most 2: the part of the ratio that no update has made
    correction, _ = importance_weights(old_logp - batch.rollout_logp, batch.mask)
    advantages = token_advantages(seen, batch, correction, config)
    if config.loss == "ratio":
        token_loss = ratio_policy_loss(stats.logp, batch.rollout_logp, advantages, mask=mask)
    elif config.loss == "ppo_clip":
        token_loss = ppo_clip(
            stats.logp,
            old_logp,
            advantages * correction,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            mask=mask,
        )
    else:
        importance, _ = importance_weights(seen.logp - batch.rollout_logp, batch.mask)
        token_loss = reinforce(stats.logp, advantages, importance, mask=mask)
    return Objective(apply_weights(token_loss, weights * mask, keep), seen, advantages)


def trained_tokens(
    stats: TokenStats, batch: RolloutBatch, config: UpdateConfig
) -> tuple[Tensor, Metrics]:
    """[B, T] bool: tokens in the loss; all of them unless pruning drops some."""
    if config.pruning is None:
        return batch.mask, {}
    return out_of_set_mask(stats.in_safe_set, batch.mask, policy=config.pruning.out_of_set)


def token_advantages(
    stats: TokenStats, batch: RolloutBatch, correction: Tensor, config: UpdateConfig
) -> Tensor:
    """[B, T] advantages by the configured rule; `correction` is pi_old / pi_rollout, truncated."""
    if config.advantage != "token_baseline":
        return broadcast_advantages(outcome_advantages(batch, config), batch.mask)
    options = config.token_baseline
    last = batch.mask.sum(-1) - 1
    token_rewards = torch.zeros_like(stats.logp)
    rows = torch.arange(len(batch), device=last.device)
    token_rewards[rows, last] = batch.rewards.to(stats.logp.dtype)
    return optimal_token_baseline(
        token_rewards,
        batch.mask,
        stats.logp,
        stats.sum_p2,
        batch.group_ids,
        alignment=options.alignment,
        leave_one_out=options.leave_one_out,
        importance=correction,
        tail=options.tail,
    )


def batch_metrics(
    parts: list[tuple[Tensor, Objective]],
    batch: RolloutBatch,
    weights: Tensor,
    old_logp: Tensor,
    config: UpdateConfig,
) -> Metrics:
    """Metrics of a whole batch, whatever parts it was computed in.

    Args:
        parts: [B] bool rows of each part and what it gave; together they cover the batch.
        batch: B rollouts, at least one.
        weights: [B, T] of `token_weights`.
        old_logp: [B, T] trainer's log-probs when the batch was first seen: the mismatch is between
            these and the engine's, before any update.
        config: the parts of the pack that are switched on.

    Returns:
        0-d tensors by name.
    """
    stats = TokenStats(*(_joined(parts, batch, field) for field in TokenStats._fields))
    advantages = _joined(parts, batch, "advantages")
    mask, metrics = trained_tokens(stats, batch, config)
    metrics = metrics | trusted_rollouts(stats, batch, config)[1]
    if config.pruning is not None:
        metrics |= pruning_metrics(stats, batch.mask)
    if config.loss == "ppo_clip":
        drift = stats.logp - old_logp
        metrics |= clip_metrics(drift, advantages, mask, config.clip_low, config.clip_high)
    metrics["loss"] = torch.stack([part.loss.detach() for _, part in parts]).sum()
    metrics["entropy"] = stats.entropy[batch.mask].mean()
    metrics["sign_length_coupling"] = sign_length_coupling(
        weights, outcome_advantages(batch, config)
    )
    metrics |= mismatch_report(old_logp, batch.rollout_logp, batch.mask).metrics()
    return metrics | gradient_variance_proxy(advantages, stats.logp, stats.sum_p2, batch.mask)


def _joined(
    parts: list[tuple[Tensor, Objective]], batch: RolloutBatch, field: str
) -> Tensor | None:
    """[B, T] of a field of the parts, each of which may be narrower."""
    whole = None
    for rows, part in parts:
        values = part.advantages if field == "advantages" else getattr(part.stats, field)
        if values is None:
            return None
        if whole is None:
            whole = values.new_zeros(batch.mask.shape)
        whole[rows.nonzero(), torch.arange(values.shape[1], device=values.device)] = values
    return whole
