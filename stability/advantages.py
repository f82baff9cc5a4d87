"""Advantages of whole responses: the menu of critic-free methods.

Shapes: B sequences, T tokens; G rollouts of one group (they share a prompt), any order, G may
differ. r = reward of a response, L = its length. Means, sums and deviations are of the group unless
said otherwise.

    grpo_advantages           (r - mean) / (deviation + 1e-6)        arXiv 2402.03300
    dr_grpo_advantages        r - mean                               arXiv 2503.20783
    rloo_advantages           r - mean of the others                 arXiv 2402.14740
    opo_advantages            r - sum L r / sum L                    arXiv 2505.23585
    reinforce_advantages      r                                      Williams 1992
    remax_advantages          r - r of the greedy response           arXiv 2310.10505
    tree_advantages           mean over shared prefixes of r - mean  arXiv 2508.17445
    reinforce_pp_advantages   reward to go, whitened over the batch  arXiv 2501.03262, per token

`optimal_token_baseline` (token_baseline.py) is the one with a baseline of its own per token;
`broadcast_advantages` repeats these over tokens, from which `kl_penalty` can be taken.

Common to all: rollouts of a group may be spread over the ranks of `process_group`, and the result
is that of one process; a rollout with `valid` False counts nowhere and gets 0; in a group of one
the baseline is the reward itself, so the advantage is 0 (some frameworks give r there).
Sums are fp64, and an advantage that rounding alone could have made (32 eps of the rewards' dtype,
of the group's spread) is 0, so that it has no sign, which `aggregation_weights` would use.
`reinforce` and `remax` compare with nothing of the group but the greedy row: no mean, no such 0.
"""

from __future__ import annotations

import math
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
    check_tensor,
    check_tokens,
    masked,
    mean_over,
    total,
    valid_rows,
    wide,
)
from .statistics import group_index, reward_to_go, segment_min, segment_sum

_STD_EPS = 1e-6
_VARIANCE_EPS = 1e-8


@torch.no_grad()
def grpo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    deviation: Literal["group", "batch"] = "group",
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Reward minus the mean reward of the group, over a standard deviation.

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        deviation: of the rewards of the group, or of those of the whole batch; n - 1 in both.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        [B] in at least fp32, detached; 0 in a group of one.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        GRPO, arXiv 2402.03300.
    """
    check_choice("deviation", deviation, ("group", "batch"))
    centred, sizes, rows, index = _centred(rewards, group_ids, valid, process_group)
    if deviation == "group":
        power = segment_sum(centred.square(), index, len(sizes), process_group)
        scale = (power / (sizes - 1).clamp_min(1)).sqrt()[index]
    else:
        scale = _batch_deviation(rewards.detach().double(), rows, process_group)
    return masked(centred / (scale + _STD_EPS), rows).to(wide(rewards).dtype)


@torch.no_grad()
def dr_grpo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Reward minus the mean reward of the group, undivided.

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        [B] in at least fp32, detached; 0 in a group of one.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        Dr. GRPO, arXiv 2503.20783; its other half is the rule "seq_mean_token_sum_norm".
    """
    return _centred(rewards, group_ids, valid, process_group)[0].to(wide(rewards).dtype)


@torch.no_grad()
def rloo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Reward minus the mean reward of the group's other rollouts (leave one out).

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        [B] in at least fp32, detached: G / (G - 1) (r - mean); 0 in a group of one.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        RLOO, arXiv 2402.14740.
    """
    centred, sizes, _, index = _centred(rewards, group_ids, valid, process_group)
    out = centred * (sizes / (sizes - 1).clamp_min(1))[index]
    return out.to(wide(rewards).dtype)


@torch.no_grad()
def opo_advantages(
    rewards: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    *,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Reward minus the group's mean reward weighted by length: optimal if energy grows with length.

    Args:
        rewards: [B], finite where valid.
        lengths: [B] generated tokens of each response, >= 0: `mask.sum(1)`.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        [B] in at least fp32, detached; 0 in a group of one. A group without a token takes the plain
        mean.

    Raises:
        ValueError: shapes or dtypes do not match, a reward that counts is not finite, or a length
            is negative.

    Source:
        OPO, arXiv 2505.23585.
    """
    with agreed(process_group, rewards):
        rows = _check(rewards, group_ids, valid)
        check_shape("lengths", lengths, rewards.shape, "[B]")
        check_finite("lengths", lengths, rows)
        if (masked(lengths, rows) < 0).any():
            raise ValueError(f"expected lengths >= 0, got {lengths[rows].min().item()}")
    above, spread, index = _above_lowest(rewards, group_ids, rows, process_group)
    n = len(spread)
    weight = masked(lengths, rows).to(above.dtype)
    tokens = segment_sum(weight, index, n, process_group)
    weight = torch.where(tokens[index] > 0, weight, rows.to(weight.dtype))
    shares = segment_sum(torch.stack([weight, weight * above], 1), index, n, process_group)
    baseline = shares[:, 1] / torch.where(shares[:, 0] > 0, shares[:, 0], 1)
    sizes = segment_sum(rows.double(), index, n, process_group)
    out = masked(above - baseline[index], rows)
    out = _without_noise(out, spread[index], sizes[index], rewards)
    return out.to(wide(rewards).dtype)


@torch.no_grad()
def reinforce_advantages(rewards: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The reward itself: no baseline, so its sign and scale are the reward function's.

    Args:
        rewards: [B], finite where valid.
        valid: [B] bool; a rollout with False gets 0. None: all count.

    Returns:
        [B] in at least fp32, detached.

    Raises:
        ValueError: shapes do not match, or a reward that counts is not finite.

    Source:
        REINFORCE, Williams 1992.
    """
    rows = _check_rewards(rewards, valid)
    return masked(wide(rewards.detach()), rows)


@torch.no_grad()
def reinforce_pp_advantages(
    token_rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    group_ids: Tensor | None = None,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Reward to go, whitened over all tokens of the batch (REINFORCE++).

    Args:
        token_rewards: [B, T]; an outcome reward sits on a generated token (masked ones are
            ignored).
        mask: [B, T] bool, True at a generated token; a gap in it neither adds nor discounts.
        gamma: discount a generated token, in [0, 1].
        group_ids: [B] of an integer dtype: first takes the group's mean summed reward from the
            reward of each response's last token (REINFORCE++-baseline). None: no group baseline.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        [B, T] in at least fp32, detached, 0 at masked positions: (R - mean) / sqrt(var + 1e-8) with
        mean and variance (n - 1) over the tokens of the batch.

    Raises:
        ValueError: shapes or dtypes do not match, a reward that counts is not finite, or gamma is
            out of range.

    Source:
        REINFORCE++, arXiv 2501.03262.
    """
    with agreed(process_group, mask):
        check_mask(mask)
        if not 0 <= gamma <= 1:
            raise ValueError(f"expected gamma in [0, 1], got {gamma}")
        counted = mask & valid_rows(valid, mask)[:, None]
        check_tokens("token_rewards", token_rewards, counted)
        if group_ids is not None:
            check_groups(group_ids, len(mask))
    values = masked(token_rewards.double(), counted)
    if group_ids is not None:  # the group's mean is paid back with the last token
        rows = counted.any(1)
        summed = values.sum(1)
        centred = _centred(summed, group_ids, rows, process_group)[0]
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(counted, columns, 0).amax(1, keepdim=True)
        values = values.scatter_add(1, last, masked(centred - summed, rows)[:, None])
    to_go = reward_to_go(values, counted, gamma)
    mean = mean_over(to_go, counted, process_group)
    scale = _batch_deviation(to_go, counted, process_group).square().add(_VARIANCE_EPS).sqrt()
    return masked((to_go - mean) / scale, counted).to(wide(token_rewards).dtype)


@torch.no_grad()
def remax_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    greedy: Tensor,
    *,
    clip: float | None = None,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reward minus the reward of the greedy response to the same prompt.

    The greedy response is one more row of the batch, with the same stop tokens, length limit and
    reward function. It enters no loss and no other group's number: pass `valid & ~greedy` as
    `valid` to `aggregation_weights` and to every metric.

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        greedy: [B] bool, True at the one greedy row of each group.
        clip: > 0; the difference is clamped to [-clip, clip]. None: off.
        valid: [B] bool; a rollout with False gets 0. A group whose greedy row is not valid has no
            baseline: all its rollouts get 0. None: all count.
        process_group: ranks over which groups may be spread; every one of them must call. None:
            this process alone.

    Returns:
        [B] in at least fp32, detached, 0 at greedy rows; and metrics, empty when no rollout counts:
        `remax/zero_fraction` (rollouts without a gradient), `remax/greedy_reward` (mean over
        groups), `remax/without_baseline` (share of the rollouts).

    Raises:
        ValueError: shapes or dtypes do not match, a reward that counts is not finite, clip is not
            positive, or a group that has rollouts has no greedy row, or several.

    Source:
        ReMax, arXiv 2310.10505.
    """
    with agreed(process_group, rewards):
        rows = _check(rewards, group_ids, valid)
        greedy = valid_rows(greedy, rewards, "greedy")
        if clip is not None and not clip > 0:
            raise ValueError(f"expected clip > 0 or None, got {clip}")
    rollouts = rows & ~greedy
    index, n = group_index(group_ids, process_group)
    counts = torch.stack([rollouts, greedy], 1).long()
    counts = segment_sum(counts, index, n, process_group)[index]
    wrong = rows & (counts[:, 0] > 0) & (counts[:, 1] != 1)
    with agreed(process_group, rewards):
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"expected one greedy row in each group, got {int(counts[i, 1])} in the group with "
                f"id {int(group_ids[i])}"
            )
    values = masked(wide(rewards.detach()), rows)
    both = torch.stack([values, torch.ones_like(values)], 1)
    table = segment_sum(masked(both, (rows & greedy)[:, None]), index, n, process_group)
    baseline, known = table[index, 0], table[index, 1] > 0
    counted = rollouts & known
    advantages = masked(values - baseline, counted)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    if not total(rollouts.sum(), process_group):
        return advantages, {}
    return advantages, {
        "remax/zero_fraction": mean_over(
            (advantages == 0).to(values.dtype), rollouts, process_group
        ),
        "remax/greedy_reward": table[:, 0].sum() / table[:, 1].sum().clamp_min(1),
        "remax/without_baseline": mean_over((~known).to(values.dtype), rollouts, process_group),
    }


@torch.no_grad()
def tree_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    paths: Tensor,
    *,
    combine: Literal["average", "group_size"] = "average",
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Mean over depths of reward minus the mean reward of the rollouts that share the path so far.

    Depth 0 is the whole group and always counts. At depth d the rollouts that agree in their first
    d segments form a subgroup; a subgroup of one is left out, as is a depth that a rollout does not
    have.

    Args:
        rewards: [B], finite where valid.
        group_ids: [B] of an integer dtype; rollouts of one prompt share an id, in any order.
        paths: [B, D] of an integer dtype: the id of each segment of the rollout's path, -1 after
            its end. Only equality at the same depth under the same prefix matters.
        combine: "average" weighs the depths alike (better in the paper), "group_size" by the
            number of rollouts in the subgroup.
        valid: [B] bool; a rollout with False counts nowhere and gets 0. None: all count.
        process_group: ranks over which groups may be spread; every one of them must call with the
            same D. None: this process alone.

    Returns:
        [B] in at least fp32, detached; 0 in a group of one.

    Raises:
        ValueError: shapes or dtypes do not match, or a reward that counts is not finite.

    Source:
        TreePO, arXiv 2508.17445.
    """
    check_choice("combine", combine, ("average", "group_size"))
    with agreed(process_group, rewards):
        _check(rewards, group_ids, valid)
        if paths.ndim != 2 or paths.shape[0] != rewards.shape[0] or paths.is_floating_point():
            found = f"{tuple(paths.shape)} of {paths.dtype}"
            raise ValueError(f"expected paths [B, D] of an integer dtype, got {found}")
    centred, sizes, rows, index = _centred(rewards, group_ids, valid, process_group)
    largest = sizes[index]
    weight = sizes[index] if combine == "group_size" else torch.ones_like(centred)
    weight = masked(weight, rows)
    summed, size, weights = weight * centred, (weight * centred).abs(), weight
    inside = rows
    for depth in range(paths.shape[1]):
        inside = inside & (paths[:, depth] >= 0)
        # a path that has ended shares no segment with any other
        index, _ = group_index(torch.stack([index, paths[:, depth].long()], 1), process_group)
        centred, sizes, _, index = _centred(rewards, index, inside, process_group)
        shared = inside & (sizes[index] > 1)
        weight = masked(
            sizes[index] if combine == "group_size" else torch.ones_like(centred), shared
        )
        summed, size = summed + weight * centred, size + (weight * centred).abs()
        weights = weights + weight
    summed = _without_noise(summed, size, largest, rewards)  # depths can cancel
    return masked(summed / weights.clamp_min(1), rows).to(wide(rewards).dtype)


@torch.no_grad()
def kl_penalty(
    advantages: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, *, coefficient: float
) -> Tensor:
    """Advantages of tokens less coefficient (lp - lp_ref): the one-step KL penalty, detached.

    Args:
        advantages: [B, T].
        logp: [B, T] of the sampled tokens, nats.
        ref_logp: [B, T] of the reference policy, nats, at the same temperature.
        mask: [B, T] bool.
        coefficient: >= 0.

    Returns:
        [B, T] in at least fp32, 0 at masked positions. Each token pays for itself alone, so the
        gradient is that of coefficient KL(pi || ref) at each state, with the states held fixed.

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, or the coefficient is
            negative.

    Source:
        ReMax, arXiv 2310.10505 (its optional penalty).
    """
    check_mask(mask)
    for name, x in (("advantages", advantages), ("logp", logp), ("ref_logp", ref_logp)):
        check_tokens(name, x.detach(), mask)
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"expected coefficient >= 0, got {coefficient}")
    return masked(wide(advantages) - coefficient * (wide(logp) - wide(ref_logp)), mask)


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


def _check(rewards: Tensor, group_ids: Tensor, valid: Tensor | None) -> Tensor:
    """[B] bool, the rows that count."""
    rows = _check_rewards(rewards, valid)
    check_groups(group_ids, rewards.shape[0])
    return rows


def _check_rewards(rewards: Tensor, valid: Tensor | None) -> Tensor:
    check_tensor("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"expected rewards [B], got {tuple(rewards.shape)}")
    rows = valid_rows(valid, rewards)
    check_finite("rewards", rewards, rows)
    return rows


def _above_lowest(
    rewards: Tensor, group_ids: Tensor, rows: Tensor, process_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 rewards minus the group's smallest [B], their largest [n], group index [B]."""
    values = rewards.detach().double()
    index, n = group_index(group_ids, process_group)
    lowest = segment_min(torch.where(rows, values, math.inf), index, n, process_group)
    above = masked(values - lowest[index], rows)
    return above, -segment_min(-above, index, n, process_group), index


def _without_noise(advantages: Tensor, spread: Tensor, size: Tensor, rewards: Tensor) -> Tensor:
    """0 where the rewards' rounding, or that of an fp64 sum of `size` terms, could be all of it."""
    eps = 32 * torch.finfo(wide(rewards).dtype).eps + 8 * size * torch.finfo(torch.float64).eps
    return masked(advantages, advantages.abs() > eps * spread)


def _centred(
    rewards: Tensor, group_ids: Tensor, valid: Tensor | None, process_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp64 rewards minus the group mean [B], group sizes [n], rows that count, group index [B]."""
    with agreed(process_group, rewards):
        rows = _check(rewards, group_ids, valid)
    above, spread, index = _above_lowest(rewards, group_ids, rows, process_group)
    sizes = segment_sum(rows.double(), index, len(spread), process_group)
    mean = segment_sum(above, index, len(spread), process_group) / sizes.clamp_min(1)
    centred = masked(above - mean[index], rows)
    return _without_noise(centred, spread[index], sizes[index], rewards), sizes, rows, index


def _batch_deviation(values: Tensor, counted: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Deviation (n - 1) of `values` where `counted`, over all ranks; a 0-d tensor."""
    mean = mean_over(values, counted, process_group)
    power = total(masked((values - mean).square(), counted).sum(), process_group)
    n = total(counted.sum(), process_group)
    return (power / (n - 1).clamp_min(1)).sqrt()
