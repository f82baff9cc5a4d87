"""The objective of one batch: logits, statistics, advantages, weights, loss.

Shapes: B rollouts, T response tokens, N = real tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from ..stability import (
    aggregation_weights,
    apply_weights,
    broadcast_advantages,
    cispo,
    clip_metrics,
    dppo_kl,
    dppo_tv,
    gradient_variance_proxy,
    gspo,
    hybrid_imitation_loss,
    importance_weights,
    kl_penalty,
    mismatch_report,
    optimal_token_baseline,
    out_of_set_mask,
    ppo_clip,
    pruning_metrics,
    ratio_policy_loss,
    reinforce,
    reval_loss,
    sign_length_coupling,
    trust_region_mask,
)
from ..stability._numerics import k3
from ..triton_kernels.divergence import token_kl
from ..triton_kernels.imitation import teacher_kl
from ..triton_kernels.linear_token_stats import linear_token_stats
from ..triton_kernels.token_stats import TokenStats, token_stats
from .advantages import imitation_token_advantages, last_token_rewards
from .batch import RolloutBatch
from .responses import response_hidden, response_logits
from .update_config import UpdateConfig

Metrics = dict[str, Tensor]
LogitsOf = Callable[[RolloutBatch], Tensor]


class Statistics(NamedTuple):
    """What the objective reads of the policy and of the models beside it, of the same tokens.

    Args:
        policy: [B, T] statistics, 0 at padding; differentiable.
        reference: the reference's, without gradient; or None.
        teacher_kl: [B, T] KL(policy || teacher), nats, differentiable; or None.
    """

    policy: TokenStats
    reference: TokenStats | None = None
    teacher_kl: Tensor | None = None


def policy_statistics(
    policy: PreTrainedModel,
    batch: RolloutBatch,
    config: UpdateConfig,
    temperature: float,
    teacher: PreTrainedModel | None = None,
) -> Statistics:
    """Statistics of the batch's tokens under the policy being trained.

    Args:
        policy: causal LM.
        batch: B rollouts.
        config: route, head, pruning and imitation.
        temperature: of the rollouts, and of the teacher.
        teacher: of the loss imitation, whose head is `logits`.

    Returns:
        Statistics without a reference, differentiable in the policy.
    """

    def padded(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.new_zeros(batch.mask.shape).masked_scatter(batch.mask, x)

    def responses(model: PreTrainedModel) -> tuple:
        return model, batch.prompts, batch.tokens, batch.written, batch.group_index

    def sampled(x: Tensor) -> Tensor:
        """Rows of the policy's own tokens, among those of all."""
        return x if batch.present is None else x[batch.mask[batch.present]]

    labels = batch.tokens[batch.mask]
    rho = None if config.pruning is None else config.pruning.rho
    if config.head == "fused":
        hidden, head = response_hidden(*responses(policy), route=config.route)
        flat = linear_token_stats(
            sampled(hidden),
            head.weight,
            labels,
            bias=head.bias,
            softcap=head.softcap,
            temperature=temperature,
            prune=rho,
        )
        return Statistics(TokenStats(*map(padded, flat)))
    logits = sampled(response_logits(*responses(policy), route=config.route))
    stats = TokenStats(
        *map(padded, token_stats(logits, labels, temperature=temperature, prune=rho))
    )
    if teacher is None:
        return Statistics(stats)
    with torch.no_grad():
        taught = sampled(response_logits(*responses(teacher), route=config.route))
    top_k = config.imitation.teacher_top_k
    if top_k is None:
        kl = token_kl(logits, taught, temperature=temperature)
    else:
        at_least_fp32 = taught.to(torch.promote_types(taught.dtype, torch.float32))
        logp, ids = (at_least_fp32 / temperature).log_softmax(-1).topk(top_k)
        kl = teacher_kl(logits, ids, logp, temperature=temperature)
    return Statistics(stats, teacher_kl=padded(kl))


@dataclass(frozen=True)
class Prepared:
    """A batch, or whole groups of it, and what is known of it before any part is computed.

    Args:
        batch: B rollouts.
        outcome: [B] one advantage a rollout; its sign is the side in balanced aggregation. With
            the loss reval the centred reward.
        weights: [B, T] of `token_weights`; with the loss reval [B] of each response.
        old_logp: [B, T] trainer's log-probs when the batch was first seen, detached.
    """

    batch: RolloutBatch
    outcome: Tensor
    weights: Tensor
    old_logp: Tensor

    def select(self, rows: Tensor) -> Prepared:
        """The chosen rollouts, trimmed as `RolloutBatch.select` does."""
        part = self.batch.select(rows)
        width = part.mask.shape[1]
        weights = self.weights[rows]
        if weights.ndim == 2:
            weights = weights[:, :width]
        return Prepared(part, self.outcome[rows], weights, self.old_logp[rows][:, :width])


def token_weights(
    batch: RolloutBatch,
    outcome: Tensor,
    config: UpdateConfig,
    max_tokens: int,
    process_group: ProcessGroup | None,
    keep: Tensor | None = None,
) -> Tensor:
    """Weight of each token, with counts over the whole batch and all processes.

    Args:
        batch: every rollout of this process's share of the batch.
        outcome: [B] of `outcome_advantages`.
        config: the rule.
        max_tokens: the constant of `seq_mean_token_sum_norm`.
        process_group: None in a single process.
        keep: [B] bool; given, only these rollouts count (`denominator: kept`).

    Returns:
        [B, T] fp32, >= 0, 0 where no token is; with the loss reval [B], of each response.
    """
    if config.loss == "reval":
        counted = torch.ones_like(batch.rewards)
        if config.reval.truncated == "mask":
            counted = counted.masked_fill(batch.truncated, 0.0)
        count = counted.sum()
        if process_group is not None:
            torch.distributed.all_reduce(count, group=process_group)
        return counted / count.clamp_min(1)
    return aggregation_weights(
        batch.mask,
        batch.group_ids,
        outcome,
        rule=config.aggregation_used,
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
        means: of the part by name: 0-d sum and count.
    """

    loss: Tensor
    stats: TokenStats
    advantages: Tensor
    means: dict[str, tuple[Tensor, Tensor]]


def objective(found: Statistics, part: Prepared, config: UpdateConfig) -> Objective:
    """Loss of (a part of) a batch, such that the parts' losses add up to the batch's.

    Args:
        found: statistics under the policy being trained, and what the loss needs beside them.
        part: whole groups.
        config: the parts that are switched on.

    Returns:
        Objective.
    """
    stats, batch = found.policy, part.batch
    seen = TokenStats(*(x if x is None else x.detach() for x in stats))
    if config.loss == "reval":
        return _reval(found, seen, part, config)
    keep, _ = trusted_rollouts(seen, batch, config)
    mask, _ = trained_tokens(seen, batch, config)
    # pi_old / pi_rollout: the part of the ratio that no update has made
    correction = _importance(part.old_logp, batch, config)
    means: dict[str, tuple[Tensor, Tensor]] = {}
    if config.loss == "imitation":
        assert found.teacher_kl is not None
        costs = found.teacher_kl.detach()
        advantages = imitation_token_advantages(costs, batch, config.imitation)
        importance = _importance(seen.logp, batch, config)
        token_loss = hybrid_imitation_loss(
            found.teacher_kl, stats.logp, advantages, importance, mask=mask
        )
        means["imitation/kl"] = _sum_and_count(costs, batch.mask)
    else:
        advantages = token_advantages(seen, part, correction, config)
        if config.reference is not None and config.reference.penalty == "advantage":
            assert found.reference is not None
            advantages = kl_penalty(
                advantages,
                seen.logp,
                found.reference.logp,
                batch.mask,
                coefficient=config.reference.kl,
            )
        token_loss = _policy_loss(stats, seen, part, advantages, correction, mask, config)
    if found.reference is not None and config.reference is not None:
        divergence = k3(torch.where(mask, found.reference.logp - stats.logp, 0.0))
        if config.reference.penalty == "loss":
            token_loss = token_loss + config.reference.kl * divergence
        means["reference/k3"] = _sum_and_count(divergence.detach(), mask)
    loss = apply_weights(token_loss, part.weights * mask, keep)
    return Objective(loss, seen, advantages, means)


def _importance(logp: Tensor, batch: RolloutBatch, config: UpdateConfig) -> Tensor:
    """[B, T] weights of the engine's rollouts as those of a policy with these log-probs."""
    options = dataclasses.asdict(config.correction)
    weights, _ = importance_weights(logp - batch.rollout_logp, batch.mask, **options)
    return weights


def _policy_loss(
    stats: TokenStats,
    seen: TokenStats,
    part: Prepared,
    advantages: Tensor,
    correction: Tensor,
    mask: Tensor,
    config: UpdateConfig,
) -> Tensor:
    """[B, T] of the configured policy gradient."""
    batch, logp = part.batch, stats.logp
    if config.loss == "ratio":
        return ratio_policy_loss(logp, batch.rollout_logp, advantages, mask=mask)
    if config.loss == "reinforce":
        importance = _importance(seen.logp, batch, config)
        return reinforce(logp, advantages, importance, mask=mask)
    low, high = config.bounds
    if config.loss in ("dppo_tv", "dppo_kl"):  # their ratio starts from the engine
        loss = dppo_tv if config.loss == "dppo_tv" else dppo_kl
        bounds = {"threshold_low": low, "threshold_high": high}
        return loss(logp, batch.rollout_logp, advantages, mask=mask, **bounds)
    loss = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo}[config.loss]
    bounds = {"clip_low": low, "clip_high": high}
    return loss(logp, part.old_logp, advantages * correction, mask=mask, **bounds)


def _reval(found: Statistics, seen: TokenStats, part: Prepared, config: UpdateConfig) -> Objective:
    batch, reference = part.batch, found.reference
    assert reference is not None
    loss = reval_loss(
        found.policy.logp,
        reference.logp,
        # the first response token is predicted at the last prompt token
        found.policy.logsumexp[:, 0],
        reference.logsumexp[:, 0],
        part.outcome,
        batch.mask,
        beta=config.reval.beta,
        detach_value=config.reval.detach_value,
    )
    counted = part.weights > 0
    drift = (seen.logp - reference.logp).masked_fill(~batch.mask, 0.0).sum(-1)
    means = {
        "reval/abs_residual": _sum_and_count(loss.detach().sqrt(), counted),
        "reval/value_drift": _sum_and_count((seen.logsumexp - reference.logsumexp)[:, 0], counted),
        "reval/path_drift": _sum_and_count(drift, counted),
        "reval/target": _sum_and_count(part.outcome.abs() / config.reval.beta, counted),
    }
    advantages = broadcast_advantages(part.outcome, batch.mask)
    return Objective(apply_weights(loss, part.weights), seen, advantages, means)


def _sum_and_count(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, x, 0.0).sum(), mask.sum()


def trained_tokens(
    stats: TokenStats, batch: RolloutBatch, config: UpdateConfig
) -> tuple[Tensor, Metrics]:
    """[B, T] bool: tokens in the loss; all of them unless pruning drops some."""
    if config.pruning is None:
        return batch.mask, {}
    return out_of_set_mask(stats.in_safe_set, batch.mask, policy=config.pruning.out_of_set)


def token_advantages(
    stats: TokenStats, part: Prepared, correction: Tensor, config: UpdateConfig
) -> Tensor:
    """[B, T] advantages by the configured rule; `correction` is pi_old / pi_rollout, truncated."""
    batch = part.batch
    if config.advantage_used != "otb":
        return broadcast_advantages(part.outcome, batch.mask)
    options = config.token_baseline
    return optimal_token_baseline(
        last_token_rewards(batch).to(stats.logp.dtype),
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
    parts: list[tuple[Tensor, Objective]], prepared: Prepared, config: UpdateConfig
) -> Metrics:
    """Metrics of a whole batch, whatever parts it was computed in.

    Args:
        parts: [B] bool rows of each part and what it gave; together they cover the batch.
        prepared: B rollouts, at least one. The mismatch is between its `old_logp` and the
            engine's, before any update.
        config: the parts of the pack that are switched on.

    Returns:
        0-d tensors by name.
    """
    batch, old_logp = prepared.batch, prepared.old_logp
    stats = TokenStats(*(_joined(parts, batch, field) for field in TokenStats._fields))
    advantages = _joined(parts, batch, "advantages")
    mask, metrics = trained_tokens(stats, batch, config)
    metrics = metrics | trusted_rollouts(stats, batch, config)[1]
    if config.pruning is not None:
        metrics |= pruning_metrics(stats, batch.mask)
    if config.loss == "ppo_clip":
        drift = stats.logp - old_logp
        metrics |= clip_metrics(drift, advantages, mask, *config.bounds)
    for name in parts[0][1].means:
        sums, counts = zip(*(part.means[name] for _, part in parts), strict=True)
        metrics[name] = sum(sums) / sum(counts).clamp_min(1)
    metrics["loss"] = torch.stack([part.loss.detach() for _, part in parts]).sum()
    metrics["entropy"] = stats.entropy[batch.mask].mean()
    if prepared.weights.ndim == 2:
        metrics["sign_length_coupling"] = sign_length_coupling(prepared.weights, prepared.outcome)
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
