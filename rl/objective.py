"""The objective of one batch: logits, statistics, advantages, weights, loss.

Shapes: B rollouts, T response tokens, N = real tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..stability import (
    aggregation_weights,
    apply_weights,
    broadcast_advantages,
    clip_metrics,
    gradient_variance_proxy,
    group_relative_advantages,
    importance_weights,
    leave_one_out_advantages,
    mismatch_metrics,
    optimal_token_baseline,
    out_of_set_mask,
    ppo_clip,
    pruning_metrics,
    ratio_policy_loss,
    reinforce,
    trust_region_mask,
)
from ..triton_kernels.token_stats import TokenStats, token_stats
from .batch import RolloutBatch
from .config import UpdateConfig
from .prefix import response_logits

Metrics = dict[str, Tensor]


def policy_statistics(
    policy: PreTrainedModel, batch: RolloutBatch, config: UpdateConfig, temperature: float
) -> TokenStats:
    """Statistics of the batch's tokens under the policy being trained.

    Args:
        policy: causal LM.
        batch: B rollouts.
        config: route and pruning.
        temperature: of the rollouts.

    Returns:
        TokenStats of [B, T] tensors, 0 at padding; differentiable.
    """
    logits = response_logits(
        policy, batch.prompts, batch.tokens, batch.mask, batch.group_index, route=config.route
    )
    rho = None if config.pruning is None else config.pruning.rho
    flat = token_stats(logits, batch.tokens[batch.mask], temperature=temperature, prune=rho)

    def padded(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.new_zeros(batch.mask.shape).masked_scatter(batch.mask, x)

    return TokenStats(*map(padded, flat))


def outcome_advantages(batch: RolloutBatch, config: UpdateConfig) -> Tensor:
    """[B] one advantage per rollout; its sign decides the side in balanced aggregation."""
    if config.advantage == "leave_one_out":
        return leave_one_out_advantages(batch.rewards, batch.group_ids)
    return group_relative_advantages(
        batch.rewards, batch.group_ids, normalize_std=config.advantage == "group_std"
    )


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
        valid=keep,
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


def objective(
    stats: TokenStats,
    batch: RolloutBatch,
    weights: Tensor,
    old_logp: Tensor,
    config: UpdateConfig,
) -> tuple[Tensor, Metrics]:
    """Loss of (a part of) a batch, such that the parts' losses add up to the batch's.

    Args:
        stats: [B, T] statistics under the policy being trained.
        batch: whole groups.
        weights: [B, T] of `token_weights`.
        old_logp: [B, T] trainer's log-probs when the batch was first seen, detached.
        config: the parts that are switched on.

    Returns:
        The scalar loss and the metrics of this part.
    """
    logp = stats.logp.detach()
    mask, metrics = batch.mask, {}
    keep, found = trusted_rollouts(stats, batch, config)
    metrics |= found
    if config.pruning is not None:
        metrics |= pruning_metrics(stats, mask)
        mask, found = out_of_set_mask(stats.in_safe_set, mask, policy=config.pruning.out_of_set)
        metrics |= found

    # pi_old / pi_rollout: the part of the ratio that no update has made
    correction, _ = importance_weights(
        old_logp - batch.rollout_logp, batch.mask, kind="token_truncate"
    )
    if config.advantage == "token_baseline":
        options = config.token_baseline
        last = batch.mask.sum(-1) - 1
        token_rewards = torch.zeros_like(logp)
        token_rewards[torch.arange(len(batch), device=last.device), last] = batch.rewards.to(
            logp.dtype
        )
        advantages = optimal_token_baseline(
            token_rewards,
            batch.mask,
            logp,
            stats.sum_p2.detach(),
            batch.group_ids,
            alignment=options.alignment,
            leave_one_out=options.leave_one_out,
            importance=correction,
            tail=options.tail,
        )
    else:
        advantages = broadcast_advantages(outcome_advantages(batch, config), batch.mask)

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
        metrics |= clip_metrics(
            logp - old_logp, advantages, mask, config.clip_low, config.clip_high
        )
    else:
        importance, _ = importance_weights(
            logp - batch.rollout_logp, batch.mask, kind="token_truncate"
        )
        token_loss = reinforce(stats.logp, advantages, importance, mask=mask)
    loss = apply_weights(token_loss, weights * mask, keep)

    metrics["entropy"] = stats.entropy.detach()[batch.mask].mean()
    metrics |= mismatch_metrics(logp, batch.rollout_logp, batch.mask)
    metrics |= gradient_variance_proxy(advantages, logp, stats.sum_p2.detach(), batch.mask)
    return loss, metrics
