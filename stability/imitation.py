"""Imitation of a teacher beside the reward: dense at the logits, sparse at the sampled token.

Shapes: B sequences, T tokens. p the policy, q the teacher, c_t = lp_t - lq_t of the sampled token,
KL_t = KL(p || q) of the whole distribution at position t, r token rewards, lambda = reward_weight.

    minimise  E_p [ sum_t c_t - lambda sum_t r_t ]      KL of whole trajectories, less the reward
    gradient  sum_t grad KL_t                           dense: closed form at the logits
              - sum_t A_t grad lp_t                     sparse, with
    A_t = lambda sum_{k>=t} gamma^(k-t) r_k - sum_{k>t} gamma^(k-t) c_k

gamma = 1 is the exact gradient; gamma = 0 is on-policy distillation (each position alone, plus the
reward of its own token). KL_t comes from `trimtab.triton_kernels.divergence.token_kl` (both sets of
logits) or `trimtab.triton_kernels.imitation.teacher_kl` (a teacher's top k). Supervised fine-tuning
that keeps entropy is `trimtab.triton_kernels.gem.gem_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._numerics import check_finite, check_mask, check_shape, check_tokens, masked, wide
from .losses import reinforce
from .statistics import reward_to_go


@torch.no_grad()
def imitation_advantages(
    costs: Tensor,
    token_rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    reward_weight: float = 1.0,
) -> Tensor:
    """lambda sum_{k>=t} gamma^(k-t) r_k - sum_{k>t} gamma^(k-t) c_k, the sparse part's advantage.

    Args:
        costs: [B, T] lp - lq of the sampled tokens, nats; or KL_t of the whole distribution, which
            has the same mean and less variance.
        token_rewards: [B, T]; an outcome reward sits on a generated token (masked ones are
            ignored).
        mask: [B, T] bool, True at a generated token; a gap in it neither adds nor discounts.
        gamma: discount a generated token, in [0, 1].
        reward_weight: lambda, >= 0.

    Returns:
        [B, T] in at least fp32, detached, 0 at masked positions. A baseline may be subtracted: any
        number that does not depend on the token itself.

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, or a number is out of
            range.

    Source:
        arXiv 2512.23097 (abstract read; the formula is derived here).
    """
    check_mask(mask)
    check_tokens("costs", costs, mask)
    check_tokens("token_rewards", token_rewards, mask)
    if not 0 <= gamma <= 1:
        raise ValueError(f"expected gamma in [0, 1], got {gamma}")
    if not 0 <= reward_weight < math.inf:
        raise ValueError(f"expected reward_weight >= 0, got {reward_weight}")
    cost = masked(costs.double(), mask)
    later = reward_to_go(cost, mask, gamma) - cost
    advantages = reward_weight * reward_to_go(token_rewards, mask, gamma) - later
    return advantages.to(wide(costs).dtype)


def hybrid_imitation_loss(
    token_kl: Tensor,
    logp: Tensor,
    advantages: Tensor,
    importance: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Dense plus sparse: KL_t - sg(importance A) lp, whose gradient is that of the module's text.

    Args:
        token_kl: [B, T] KL_t, nats, differentiable.
        logp: [B, T] log-probability of the sampled token, nats, differentiable.
        advantages: [B, T] from `imitation_advantages`, with a baseline or without.
        importance: [B, T] weights pi / pi_rollout of the sparse part; None: 1.
        mask: [B, T] bool; None: every position counts.

    Returns:
        Loss of each token, [B, T] in at least fp32. The value is no objective; sum it over a
        response and average over responses ("seq_mean_token_sum_norm" up to its constant): other
        rules give each response another weight and so another objective.

    Raises:
        ValueError: shapes do not match, or an input that counts is not finite.

    Source:
        arXiv 2512.23097 (abstract read; derived here).
    """
    sparse = reinforce(logp, advantages, importance, mask=mask)
    check_shape("token_kl", token_kl, tuple(logp.shape), "shaped as logp")
    check_finite("token_kl", token_kl.detach(), mask)
    dense = wide(token_kl) if mask is None else masked(wide(token_kl), mask)
    return dense + sparse
