"""Advantages of a batch of rollouts, by the name that the configuration gives them.

Shapes: B rollouts, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..stability import (
    dr_grpo_advantages,
    grpo_advantages,
    imitation_advantages,
    opo_advantages,
    reinforce_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
    tree_advantages,
)
from ..stability.statistics import group_index, segment_sum
from .batch import RolloutBatch
from .update_config import ImitationConfig, UpdateConfig


@torch.no_grad()
def outcome_advantages(
    batch: RolloutBatch, config: UpdateConfig, process_group: ProcessGroup | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One advantage of each rollout, known before the policy is asked for anything.

    Args:
        batch: every rollout of this process's share of the batch, in whole groups.
        config: the rule.
        process_group: ranks that share the batch, for the rule that normalises over all of it;
            every one of them must call. None: this process alone.

    Returns:
        [B] advantages: of `otb`, which has one a token, the centred reward, whose sign decides the
        side in balanced aggregation; of the loss reval the centred reward that it fits. And
        metrics, 0-d tensors by name.
    """
    rewards, ids = batch.rewards, batch.group_ids
    name = config.advantage_used
    if config.loss == "reval":
        centred = dr_grpo_advantages(rewards, ids)
        if config.reval.truncated == "zero":
            centred = centred.masked_fill(batch.truncated, 0.0)
        return centred, {}
    if name == "grpo":
        return grpo_advantages(rewards, ids), {}
    if name == "rloo":
        return rloo_advantages(rewards, ids), {}
    if name == "opo":
        return opo_advantages(rewards, batch.mask.sum(-1), ids), {}
    if name == "reinforce":
        return reinforce_advantages(rewards), {}
    if name == "reinforce_pp":
        of_tokens = reinforce_pp_advantages(
            last_token_rewards(batch), batch.mask, process_group=process_group
        )
        return of_tokens[:, 0], {}  # gamma is 1: the same at every token
    if name == "remax":
        return _remax(batch, config.remax_clip)
    if name == "tree":
        assert batch.paths is not None
        return tree_advantages(rewards, ids, batch.paths, combine=config.tree_combine), {}
    return dr_grpo_advantages(rewards, ids), {}


def last_token_rewards(batch: RolloutBatch) -> Tensor:
    """[B, T] fp32: the reward of each rollout at the last token that the policy sampled."""
    token_rewards = batch.rewards.new_zeros(batch.mask.shape)
    rows = torch.arange(len(batch), device=batch.rewards.device)
    columns = torch.arange(batch.mask.shape[1], device=batch.rewards.device)
    token_rewards[rows, (columns * batch.mask).argmax(-1)] = batch.rewards
    return token_rewards


def imitation_token_advantages(
    costs: Tensor, batch: RolloutBatch, config: ImitationConfig
) -> Tensor:
    """[B, T] advantages of the sparse part of imitation.

    Args:
        costs: [B, T] KL to the teacher, nats, detached.
        batch: B rollouts in whole groups.
        config: discount, weight of the reward and baseline.

    Returns:
        [B, T]; with a baseline less the mean of the group's other rollouts that reach the position,
        which does not depend on the token. A position that one rollout alone reaches has none.
    """
    advantages = imitation_advantages(
        costs,
        last_token_rewards(batch),
        batch.mask,
        gamma=config.gamma,
        reward_weight=config.reward_weight,
    )
    if not config.baseline:
        return advantages
    index, groups = group_index(batch.group_ids)
    there = batch.mask.to(advantages.dtype)
    sums = segment_sum(torch.stack([advantages * there, there], -1), index, groups)[index]
    others = sums[..., 1] - 1
    mean = (sums[..., 0] - advantages) / others.clamp_min(1)
    return torch.where(batch.mask & (others > 0), advantages - mean, advantages)


def _remax(batch: RolloutBatch, clip: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The greedy rollouts of the prompts stand behind the others: they are in no loss."""
    assert batch.greedy_rewards is not None
    greedy = batch.greedy_rewards
    of_prompt = torch.full(greedy.shape, -1, dtype=torch.long, device=greedy.device)
    of_prompt[batch.group_index] = batch.group_ids
    asked = torch.zeros_like(greedy, dtype=torch.bool)
    asked[batch.group_index] = True  # a prompt whose rewards are all lost has no rollouts
    rewards = torch.cat([batch.rewards, greedy[asked]])
    is_greedy = torch.zeros_like(rewards, dtype=torch.bool)
    is_greedy[len(batch) :] = True
    advantages, metrics = remax_advantages(
        rewards,
        torch.cat([batch.group_ids, of_prompt[asked]]),
        is_greedy,
        clip=clip,
        valid=rewards.isfinite(),
    )
    return advantages[: len(batch)], metrics
