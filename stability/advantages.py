"""Advantages of whole responses, from one reward each.

Shapes: B sequences in groups that share a prompt; G rollouts of one group, any order, G may differ.

    group-relative    A_i = r_i - mean_group(r)           (optionally divided by a deviation)
    leave-one-out     A_i = r_i - mean_{j != i}(r)  =  G / (G - 1) * (r_i - mean_group(r))

Rewards are taken relative to the group's smallest one first: a group of equal rewards then has
advantages of exactly zero, and its sign, which `aggregation_weights` uses, is not rounding noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._numerics import check_finite, check_groups, check_mask, check_shape, masked, valid_rows, wide
from .statistics import group_index, segment_min, segment_sum

_STD_EPS = 1e-6


def group_relative_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize_std: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Reward minus the mean reward of the group (GRPO with `normalize_std`, Dr. GRPO without).

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        normalize_std: divide by the group's sample deviation (n - 1) plus 1e-6.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.

    Returns:
        [B] in at least fp32, detached; 0 in a group of one.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        GRPO, arXiv 2402.03300; without the deviation Dr. GRPO, arXiv 2503.20783.
    """
    centred, sizes, rows, index = _centred(rewards, group_ids, valid)
    if not normalize_std:
        return centred
    variance = segment_sum(centred.square(), index, len(sizes)) / (sizes - 1).clamp_min(1)
    return masked(centred / (variance.sqrt()[index] + _STD_EPS), rows)


def leave_one_out_advantages(
    rewards: Tensor, group_ids: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """Reward minus the mean reward of the group's other rollouts (RLOO).

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.

    Returns:
        [B] in at least fp32, detached; 0 in a group of one.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        RLOO, arXiv 2402.14740.
    """
    centred, sizes, _, index = _centred(rewards, group_ids, valid)
    return centred * (sizes / (sizes - 1).clamp_min(1))[index]


def broadcast_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """One advantage per response, repeated over its generated tokens.

    Args:
        advantages: [B], finite where the row has a generated token.
        mask: [B, T] bool.

    Returns:
        [B, T], 0 at masked positions.

    Raises:
        ValueError: shapes do not match, or an advantage that counts is not finite.
    """
    check_mask(mask)
    check_shape("advantages", advantages, mask.shape[:1], "[B]")
    check_finite("advantages", advantages, mask.any(1))
    return masked(wide(advantages)[:, None], mask)


def _centred(
    rewards: Tensor, group_ids: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards minus the group mean [B], group sizes [n], rows that count [B], group index [B]."""
    if rewards.ndim != 1:
        raise ValueError(f"expected rewards [B], got {tuple(rewards.shape)}")
    check_groups(group_ids, rewards.shape[0])
    rows = valid_rows(valid, rewards)
    check_finite("rewards", rewards, rows)
    values = wide(rewards.detach())
    index, n = group_index(group_ids)
    sizes = segment_sum(rows.to(values.dtype), index, n)
    lowest = segment_min(torch.where(rows, values, torch.inf), index, n)
    above = masked(values - lowest[index], rows)
    mean = segment_sum(above, index, n) / sizes.clamp_min(1)
    return masked(above - mean[index], rows), sizes, rows, index
