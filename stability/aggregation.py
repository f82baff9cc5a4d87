"""Aggregation: one weight per token, from global counts, so that every rule is `loss = sum(w * l)`.

Shapes: B sequences in groups that share a prompt, T tokens. Of one group: G rollouts, n_side
rollouts and t_side generated tokens of one side, the side of a rollout being the sign of its
outcome advantage. Of response i: T_i generated tokens. `groups`: how many groups there are.

    seq_mean                  1 / (groups * G * T_i)                          GRPO
    token_mean                1 / (all tokens)                                DAPO
    token_mean_group          1 / (groups * tokens of the group)
    seq_mean_token_sum_norm   1 / (groups * G * C)                            Dr. GRPO, C a constant
    balanced                  (n_side / G) / (groups * t_side)

Source: arXiv 2605.04077 (read in part).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._numerics import (
    agreed,
    check_choice,
    check_finite,
    check_groups,
    check_mask,
    check_shape,
    masked,
    valid_rows,
    wide,
)
from .statistics import group_index, segment_sum

_RULES = ("balanced", "seq_mean", "token_mean", "token_mean_group", "seq_mean_token_sum_norm")


@torch.no_grad()
def aggregation_weights(
    mask: Tensor,
    group_ids: Tensor,
    outcome_advantages: Tensor,
    *,
    rule: Literal[
        "balanced", "seq_mean", "token_mean", "token_mean_group", "seq_mean_token_sum_norm"
    ] = "balanced",
    max_length: int | None = None,
    zero_advantage: Literal["count", "exclude"] = "count",
    valid: Tensor | None = None,
    keep: Tensor | None = None,
    denominator: Literal["total", "kept"] = "total",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Weight of every token in the loss, such that loss = sum(w * l).

    Call it once on all rows of an optimizer step, then split into micro-batches: the losses of the
    splits add up. Over ranks they add up too; a wrapper that averages gradients (DDP, FSDP) needs
    the loss times the world size.

    Args:
        mask: [B, T] bool, True at a generated token. An all-masked row is still a rollout of its
            group: it counts in G and in its side's n, and adds no token.
        group_ids: [B] of an integer dtype; with `process_group` an id means the same prompt on
            every rank, and a group may be spread over ranks.
        outcome_advantages: [B], one per response, also where the token advantages change sign.
        rule: which row of the module's table.
        max_length: C of "seq_mean_token_sum_norm", which requires it; the other rules ignore it.
        zero_advantage: "count": rollouts with advantage 0 are a side of their own in "balanced" and
            count in G; "exclude": for every rule they leave n, G and the tokens, with weight 0.
        valid: [B] bool; a rollout with False (a lost reward, a greedy rollout) counts nowhere and
            has weight 0. None: all count.
        keep: [B] bool, from `trust_region_mask`; a rollout with False has weight 0. None: all True.
        denominator: "total": rollouts that are not kept stay in every count, so the gradient is
            that of the kept ones over all N (the paper); "kept": they count nowhere, so the rest
            is scaled up.
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        Weights [B, T] in at least fp32, detached. A group in which no rollout counts is no group.

    Raises:
        ValueError: shapes or dtypes do not match, an advantage that counts is not finite, or a
            rule's constant is missing.

    Source:
        arXiv 2605.04077 (read in part); the denominators: arXiv 2512.23075.
    """
    check_choice("rule", rule, _RULES)
    check_choice("zero_advantage", zero_advantage, ("count", "exclude"))
    check_choice("denominator", denominator, ("total", "kept"))
    if rule == "seq_mean_token_sum_norm" and (max_length is None or max_length < 1):
        raise ValueError(f"expected max_length >= 1 for rule {rule!r}, got {max_length}")
    with agreed(process_group, mask):
        check_mask(mask)
        check_groups(group_ids, mask.shape[0])
        check_shape("outcome_advantages", outcome_advantages, mask.shape[:1], "[B]")
        rows = valid_rows(valid, mask)
        check_finite("outcome_advantages", outcome_advantages, rows)
        kept = valid_rows(keep, mask, "keep")
    if denominator == "kept":
        rows = rows & kept
    side = masked(outcome_advantages, rows).sign().long() + 1
    if zero_advantage == "exclude":
        rows = rows & (side != 1)
    counted = mask & rows[:, None]
    own_tokens = counted.sum(1)
    by_side = torch.nn.functional.one_hot(side, 3)
    index, n = group_index(group_ids, process_group)
    counts = torch.cat([by_side * rows[:, None], by_side * own_tokens[:, None]], 1)
    # per group: rollouts, then tokens, of the three sides
    table = segment_sum(counts, index, n, process_group)

    rollouts, tokens = table[:, :3].double(), table[:, 3:].double()
    groups = (rollouts.sum(1) > 0).sum()
    size = rollouts.sum(1)[index]
    if rule == "seq_mean":
        row = 1 / (groups * size * own_tokens).clamp_min(1)
    elif rule == "token_mean":
        row = (1 / tokens.sum().clamp_min(1)).expand(len(index))
    elif rule == "token_mean_group":
        row = 1 / (groups * tokens.sum(1)[index]).clamp_min(1)
    elif rule == "seq_mean_token_sum_norm":
        row = 1 / (groups * size * max_length).clamp_min(1)
    else:
        n_side, side_tokens = rollouts[index, side], tokens[index, side]
        row = n_side / (groups * size * side_tokens).clamp_min(1)
    return masked(row.to(wide(outcome_advantages).dtype)[:, None], counted & kept[:, None])


@torch.no_grad()
def sign_length_coupling(weights: Tensor, outcome_advantages: Tensor) -> Tensor:
    """sum(w * A): what the aggregation adds to the loss through lengths alone.

    With centred advantages it is 0 for "seq_mean", for "balanced" if each side of a group has one
    advantage (binary rewards) or one length, and not for "token_mean".

    Args:
        weights: [B, T], from `aggregation_weights`.
        outcome_advantages: [B], finite where a row has a weight.

    Returns:
        0-d tensor; with weights over ranks, this rank's part of the sum.

    Raises:
        ValueError: shapes do not match, or an input that counts is not finite.

    Source:
        arXiv 2605.04077 (read in part).
    """
    check_shape("outcome_advantages", outcome_advantages, weights.shape[:1], "[B]")
    check_finite("weights", weights)
    rows = (weights != 0).any(1)
    check_finite("outcome_advantages", outcome_advantages, rows)
    return (weights.sum(1) * masked(wide(outcome_advantages), rows)).sum()
