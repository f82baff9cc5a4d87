"""Optimal Token Baseline: one baseline per group and token position, weighted by gradient energy.

Shapes: B sequences in groups that share a prompt, T tokens. m = mask, r = token reward, p =
softmax(z), y = sampled token, is = truncated importance weight (1 when absent), sums over i run
over one group.

    w_t = 1 - 2 p(y_t) + sum_v p(v)^2 = ||onehot(y_t) - p||^2      in [0, 2)
    W_t = sum_{j<=t} m_j is_j^2 w_j                                energy so far
    R_t = sum_{k>=t} m_k r_k                                       reward to go, no discount
    B_t = sum_i m R W / (sum_i m W + 1e-8)
    A_t = (R_t - B_t) m_t                                          no division by a deviation

Source: arXiv 2602.07078. Cost: a few fp64 tensors of [B, T]; nothing of the vocabulary's size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._numerics import (
    agreed,
    check_choice,
    check_groups,
    check_mask,
    check_shape,
    check_tokens,
    masked,
    maximum,
    mean_over,
    row_mean,
    total,
    valid_rows,
    wide,
)
from .statistics import group_index, reward_to_go, segment_sum

_EPS = 1e-8


def logit_gradient_proxy(logp: Tensor, sum_p2: Tensor) -> Tensor:
    """Squared norm of d logp / d logits of a sampled token, from two of its statistics.

    Args:
        logp: any shape, log-probability of the sampled token in nats, <= 0.
        sum_p2: as logp, sum over the vocabulary of p^2, in (0, 1].

    Returns:
        1 - 2 exp(logp) + sum_p2 in at least fp32, detached, as (1 - p)^2 + (sum_p2 - p^2) with the
        second term held in [0, (1 - p)^2], its range: the plain form is all rounding where p is
        close to 1.

    Raises:
        ValueError: shapes do not match.

    Source:
        arXiv 2602.07078.
    """
    check_shape("sum_p2", sum_p2, logp.shape, "shaped as logp")
    log_p = wide(logp.detach()).clamp_max(0)
    own = log_p.expm1().square()
    others = wide(sum_p2.detach()) - (2 * log_p).exp()
    return own + torch.minimum(others.clamp_min(0), own)


@torch.no_grad()
def optimal_token_baseline(
    token_rewards: Tensor,
    mask: Tensor,
    logp: Tensor,
    sum_p2: Tensor,
    group_ids: Tensor,
    *,
    alignment: Literal["column", "model_token"] = "column",
    leave_one_out: bool = False,
    importance: Tensor | None = None,
    tail: Literal["zero_baseline", "keep"] = "zero_baseline",
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Reward to go minus the energy-weighted mean reward to go of the group at the same position.

    A position is masked or counts; a gap in the mask (a tool's tokens) adds nothing to W and R and
    has no part in any baseline. The baseline reads `logp` and `sum_p2` of the policy that is being
    updated.

    Args:
        token_rewards: [B, T]; an outcome reward sits on a generated token (masked rewards are
            ignored).
        mask: [B, T] bool, True at a generated token.
        logp: [B, T] log-probability of the sampled token, nats.
        sum_p2: [B, T] sum over the vocabulary of p^2.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        alignment: what "the same position" is: the response's column, or the index among the
            rollout's own generated tokens. With tool calls only "model_token" is meaningful.
        leave_one_out: keep a rollout out of its own baseline. That is unbiased; the in-sample form
            shrinks the expected gradient.
        importance: [B, T] truncated weights pi / pi_rollout; they enter W squared and nothing else.
        tail: beyond the end of the group's second-longest rollout, "zero_baseline" sets B = 0, so A
            = R; "keep" lets the survivor be its own baseline, so A = 0 up to the 1e-8. With
            leave_one_out the survivor has no baseline and both give A = R.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.
        process_group: ranks over which groups may be spread; every one of them must call, with the
            same ids, and T may differ. None: this process alone.

    Returns:
        Advantages [B, T] in at least fp32, 0 at masked positions. A group with one rollout that has
        tokens takes B = 0; an all-masked rollout changes nothing for the others. As long as a
        group is certain of its tokens (W far below 1e-8), B is near 0 and A near R.

    Raises:
        ValueError: shapes or dtypes do not match, or an input that counts is not finite.

    Source:
        arXiv 2602.07078; `tail` and `alignment` as in the authors' code.
    """
    check_choice("alignment", alignment, ("column", "model_token"))
    check_choice("tail", tail, ("zero_baseline", "keep"))
    with agreed(process_group, mask):
        check_mask(mask)
        check_groups(group_ids, mask.shape[0])
        counted = mask & valid_rows(valid, mask)[:, None]
        check_tokens("token_rewards", token_rewards, counted)
        check_tokens("logp", logp, counted)
        check_tokens("sum_p2", sum_p2, counted)
        if importance is not None:
            check_tokens("importance", importance, counted)
    energy = logit_gradient_proxy(logp.double(), sum_p2.double())
    if importance is not None:
        energy = energy * importance.double().square()

    weight = masked(masked(energy, counted).cumsum(1), counted)
    to_go = reward_to_go(token_rewards, counted)
    own_index = (counted.cumsum(1) - 1).clamp_min(0)
    if alignment == "model_token":  # gaps closed, until the end
        weight, to_go = (torch.zeros_like(x).scatter_add(1, own_index, x) for x in (weight, to_go))
        end = counted.sum(1, keepdim=True)
    else:
        columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        end = torch.where(counted, columns, 0).amax(1, keepdim=True)

    width = _widest(mask, process_group)
    index, n = group_index(group_ids, process_group)

    def group_sum(values: Tensor) -> Tensor:
        """[B, T], at each row and position the sum over its group."""
        values = torch.nn.functional.pad(values, (0, width - values.shape[1]))
        return segment_sum(values, index, n, process_group)[index, : mask.shape[1]]

    numerator, denominator = group_sum(weight * to_go), group_sum(weight)
    if leave_one_out:  # fp64: what is left can be small beside what is taken away
        numerator, denominator = numerator - weight * to_go, (denominator - weight).clamp_min(0)
    baseline = numerator / (denominator + _EPS)

    reaches = torch.arange(mask.shape[1], device=mask.device) < end
    alive = group_sum(reaches.to(torch.int32))  # rollouts that are not over at the position
    alone = alive[:, :1] <= 1
    if tail == "zero_baseline":
        alone = alone | (alive <= 1)
    advantages = to_go - baseline.masked_fill(alone, 0)
    if alignment == "model_token":
        advantages = advantages.gather(1, own_index)
    return masked(advantages, counted).to(wide(token_rewards).dtype)


def _widest(mask: Tensor, process_group: ProcessGroup | None) -> int:
    return int(maximum(torch.tensor(mask.shape[1], device=mask.device), process_group))


@torch.no_grad()
def gradient_variance_proxy(
    advantages: Tensor,
    logp: Tensor,
    sum_p2: Tensor,
    mask: Tensor,
    *,
    grad_norm: Tensor | float | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Power of the policy gradient at the logits, to be watched against its signal.

    Args:
        advantages: [B, T].
        logp: [B, T], nats.
        sum_p2: [B, T].
        mask: [B, T] bool.
        grad_norm: norm of the batch's gradient, if the caller has it.
        process_group: the ranks whose rows form the batch; every one must call. None: this process.

    Returns:
        0-d tensors: `variance/total_power`, the mean over responses with tokens of
        mean_t(A)^2 * sum_t w; `variance/mean_energy`, the mean of w over tokens; with grad_norm
        also `variance/signal` = grad_norm^2. Empty when there is no token.

    Raises:
        ValueError: shapes do not match, or an unmasked input is not finite.

    Source:
        arXiv 2602.07078 (the authors' variance monitor).
    """
    with agreed(process_group, mask):
        check_mask(mask)
        for name, x in (("advantages", advantages), ("logp", logp), ("sum_p2", sum_p2)):
            check_tokens(name, x, mask)
    if not total(mask.sum(), process_group):
        return {}
    energy = logit_gradient_proxy(logp, sum_p2)
    power = row_mean(wide(advantages), mask).square() * masked(energy, mask).sum(1)
    metrics = {
        "variance/total_power": mean_over(power, mask.any(1), process_group),
        "variance/mean_energy": mean_over(energy, mask, process_group),
    }
    if grad_norm is not None:
        metrics["variance/signal"] = torch.as_tensor(grad_norm, device=power.device).detach() ** 2
    return metrics
