"""Dynamic vocabulary pruning: what becomes of a token outside the safe set, and what to log.

The safe set of one token is S = {v : p(v) >= rho * max_u p(u)}, on logits divided by the
temperature. Every engine prunes with its own logits, so a token the rollout engine sampled can be
outside the trainer's S. Four policies for it:

    include           the token joins S, and trains (the default)
    mask_token        the token does not train
    reject_sequence   no token of its response trains
    replay            S is the set the engine sampled from, as it reported it: nothing is outside

`pruned_statistics` is the objective's input under each of them; `out_of_set_mask` is the choice
alone, for statistics that come from elsewhere (a fused head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..triton_kernels.soft_value import initial_value
from ..triton_kernels.token_stats import TokenStats, token_stats
from ._numerics import (
    agreed,
    check_choice,
    check_finite,
    check_mask,
    check_shape,
    check_tensor,
    check_tokens,
    masked,
    maximum,
    mean_over,
    total,
)
from .statistics import response_statistics

DEFAULT_RHO = math.exp(-13)  # the paper's value is recalled, not verified
_IGNORED = torch.iinfo(torch.int64).min  # no token of a user


class PrunedStatistics(NamedTuple):
    """What `pruned_statistics` returns.

    Args:
        stats: TokenStats of [B, T] tensors, of the softmax over the safe set.
        mask: [B, T] bool, the tokens that train.
        metrics: 0-d tensors under `pruning/`.
    """

    stats: TokenStats
    mask: Tensor
    metrics: dict[str, Tensor]


def pruned_statistics(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    out_of_set: Literal["include", "mask_token", "reject_sequence", "replay"] = "include",
    rho: float = DEFAULT_RHO,
    support: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    process_group: ProcessGroup | None = None,
) -> PrunedStatistics:
    """Statistics under the pruned vocabulary, and which tokens train.

    Outside the set the gradient of log-probability, entropy and sum_p2 is exactly 0.

    Args:
        logits: [B, T, V], fp32/bf16/fp16; logits[b, t] predicts tokens[b, t].
        tokens: [B, T] int64, each in [0, V) where mask is True; anything elsewhere.
        mask: [B, T] bool, True at a generated token.
        out_of_set: the policy, see the module's docstring.
        rho: in (0, 1); the rollout engine prunes with the same (its min_p). Not used by "replay".
        support: [B, T, K] from `pad_support`, required by "replay" and refused by the others.
        temperature: > 0, of the rollouts.
        softcap: c > 0 for c tanh(logits / c) first; None: off.
        group: the vocabulary is sharded over it; not with "replay".
        process_group: the ranks whose rows the metrics are of; every one of them must call. None:
            this process alone.

    Returns:
        Statistics, trained mask and metrics, which are empty when there is no token.

    Raises:
        ValueError: shapes do not match, an argument does not fit the policy, or a generated token
            has no finite log-probability.

    Source:
        arXiv 2512.23087 (abstract read; the policies are derived here). "replay" is the sampling
        mask of DeepSeek-V3.2, arXiv 2512.02556.
    """
    check_choice("out_of_set", out_of_set, ("include", "mask_token", "reject_sequence", "replay"))
    if (support is not None) != (out_of_set == "replay"):
        found = "none" if support is None else "one"
        raise ValueError(f"expected a support with out_of_set='replay' and only then, got {found}")
    if out_of_set == "replay":
        if group is not None:
            raise ValueError("expected group=None with out_of_set='replay', got a group")
        with agreed(process_group, mask):
            stats = replayed_statistics(
                logits, tokens, mask, support, temperature=temperature, softcap=softcap
            )
        metrics = pruning_metrics(stats, mask, process_group=process_group)
        return PrunedStatistics(stats, mask, metrics)
    options = {"temperature": temperature, "softcap": softcap, "group": group}
    with agreed(process_group, mask):
        stats = response_statistics(logits, tokens, mask, prune=rho, **options)
    trained, metrics = out_of_set_mask(
        stats.in_safe_set, mask, policy=out_of_set, process_group=process_group
    )
    metrics |= pruning_metrics(stats, mask, process_group=process_group)
    return PrunedStatistics(stats, trained, metrics)


def pad_support(support: Sequence[Sequence[Sequence[int]]], mask: Tensor) -> Tensor:
    """The sets an engine sampled from, as one tensor.

    Args:
        support: for each of the B responses, for each of its generated tokens in order, the ids of
            the kept tokens (vLLM 0.28 or later: `output.sampling_mask.token_ids`, see
            `trimtab.integrations.vllm.sampling_support`).
        mask: [B, T] bool, True at a generated token; gaps (a tool's tokens) have no set.

    Returns:
        [B, T, K] int64 with K the largest set, padded with -1, on the mask's device.

    Raises:
        ValueError: the number of responses or of a response's sets is not the mask's, or a set is
            empty.
    """
    check_mask(mask)
    counts = mask.sum(1).tolist()
    if [len(sets) for sets in support] != counts:
        found = [len(sets) for sets in support]
        raise ValueError(f"expected a set for each generated token, {counts}, got {found}")
    sizes = torch.tensor([len(kept) for sets in support for kept in sets], dtype=torch.int64)
    if (sizes == 0).any():
        raise ValueError("expected at least one kept token id at every generated token, got none")
    ids = torch.tensor([i for sets in support for kept in sets for i in kept])
    if len(ids) and (ids.is_floating_point() or (ids < 0).any()):
        raise ValueError(f"expected support of token ids, whole numbers >= 0, got {ids.min()}")
    inside = torch.arange(int(sizes.max()) if len(sizes) else 1) < sizes[:, None]
    rows = torch.full(inside.shape, -1).masked_scatter(inside, ids.long())
    padded = torch.full((*mask.shape, rows.shape[1]), -1, device=mask.device)
    padded[mask] = rows.to(mask.device)
    return padded


def replayed_statistics(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    support: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """`response_statistics` of the softmax over given sets, one for each token.

    Args:
        logits: [B, T, V], fp32/bf16/fp16.
        tokens: [B, T] int64; where mask is True in its own set.
        mask: [B, T] bool, True at a generated token.
        support: [B, T, K] int64 ids of the kept tokens, distinct, padded with -1; anything where
            mask is False.
        temperature: > 0.
        softcap: c > 0 for c tanh(logits / c) first; None: off.

    Returns:
        TokenStats of [B, T] tensors, zero (False) at masked positions, differentiable in logits;
        `log_kept_mass` is of the whole softmax, `safe_count` the size of the set, `in_safe_set`
        True at every token.

    Raises:
        ValueError: shapes do not match, an id is out of range or stands twice, or a sampled token
            is not in its set or has no finite log-probability.

    Source:
        arXiv 2512.02556. Cost: one read of the logits, and tensors of [B, T, K]: the kept logits
        and, until it returns, four of int64 for the checks.
    """
    check_mask(mask)
    if logits.ndim != 3:
        raise ValueError(f"expected logits [B, T, V], got {tuple(logits.shape)}")
    check_shape("logits", logits, (*mask.shape, logits.shape[-1]), "[B, T, V]")
    check_shape("tokens", tokens, mask.shape, "[B, T]")
    if tokens.dtype != torch.int64:
        raise ValueError(f"expected tokens of int64, got {tokens.dtype}")
    check_tensor("support", support)
    if (
        support.ndim != 3
        or support.shape[:2] != mask.shape
        or support.dtype != torch.int64
        or not support.shape[2]
    ):
        found = f"{tuple(support.shape)} of {support.dtype}"
        raise ValueError(f"expected support [B, T, K] = {(*mask.shape, 'K')} of int64, got {found}")
    size = logits.shape[-1]
    kept = (support >= 0) & mask[..., None]
    if ((support >= size) & kept).any():
        raise ValueError(f"expected support below {size}, got {int(support[kept].max())}")
    ordered = torch.where(kept, support, -1).sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("expected distinct ids in every set of support, got one twice")
    hit = kept & (support == tokens[..., None])
    missing = mask & ~hit.any(-1)
    if missing.any():
        b, t = missing.nonzero()[0].tolist()
        raise ValueError(
            f"expected every sampled token in its set of support, got {int(tokens[b, t])} at "
            f"({b}, {t})"
        )
    gathered = logits.gather(-1, support.clamp(0, size - 1))
    gathered = torch.where(kept, gathered, -math.inf)
    labels = torch.where(mask, hit.long().argmax(-1), _IGNORED)
    options = {"temperature": temperature, "softcap": softcap}
    flat = token_stats(gathered.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, **options)
    whole = initial_value(logits.flatten(0, 1), mask=mask.flatten(), **options)
    flat = flat._replace(
        log_kept_mass=(flat.logsumexp - whole).clamp_max(0),
        safe_count=kept.sum(-1).flatten(),
        in_safe_set=mask.flatten(),
        logsumexp=whole,
    )
    stats = TokenStats(*(x if x is None else masked(x.reshape(mask.shape), mask) for x in flat))
    check_finite("log-probability of (logits, tokens)", stats.logp.detach(), mask)
    return stats


def out_of_set_mask(
    in_safe_set: Tensor,
    mask: Tensor,
    *,
    policy: Literal["include", "mask_token", "reject_sequence"] = "include",
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mask of the tokens that train, given which sampled tokens lie in the trainer's safe set.

    Args:
        in_safe_set: [B, T] bool, from `response_statistics(..., prune=rho)`.
        mask: [B, T] bool, True at a generated token.
        policy: "include" trains on such a token, which the statistics force into S; "mask_token"
            drops it; "reject_sequence" drops every token of its sequence.
        process_group: the ranks whose rows the metrics are of; every one of them must call. None:
            this process alone.

    Returns:
        The mask [B, T] bool and metrics (fractions of the unmasked tokens and of the sequences); no
        metrics when there is no token.

    Raises:
        ValueError: shapes or dtypes do not match, or the policy is unknown.

    Source:
        arXiv 2512.23087 (abstract read; the three policies are derived here).
    """
    with agreed(process_group, mask):
        check_mask(mask)
        check_shape("in_safe_set", in_safe_set, mask.shape, "[B, T]")
        if in_safe_set.dtype != torch.bool:
            raise ValueError(f"expected in_safe_set of torch.bool, got {in_safe_set.dtype}")
    check_choice("policy", policy, ("include", "mask_token", "reject_sequence"))
    outside = mask & ~in_safe_set
    if policy == "include":
        kept = mask
    elif policy == "mask_token":
        kept = mask & in_safe_set
    else:
        kept = mask & ~outside.any(1, keepdim=True)
    if not total(mask.sum(), process_group):
        return kept, {}
    dropped, sequences = (mask & ~kept).float(), outside.any(1).float()
    return kept, {
        "pruning/out_of_set_fraction": mean_over(outside.float(), mask, process_group),
        "pruning/out_of_set_sequences": mean_over(sequences, mask.any(1), process_group),
        "pruning/dropped_tokens": mean_over(dropped, mask, process_group),
    }


def pruning_metrics(
    stats: TokenStats, mask: Tensor, *, process_group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Kept mass, size of the safe set and out-of-set fraction over the unmasked tokens.

    Args:
        stats: of [B, T] tensors, from `response_statistics(..., prune=rho)`.
        mask: [B, T] bool.
        process_group: the ranks whose rows the metrics are of; every one of them must call. None:
            this process alone.

    Returns:
        0-d tensors `pruning/kept_mass_mean`, `pruning/kept_mass_min` (probability under the full
        softmax, label included), `pruning/safe_count_mean` (tokens) and
        `pruning/out_of_set_fraction`; from a fused head also `pruning/skipped_fraction`, the share
        of the vocabulary that its backward leaves out. Empty when there is no token.

    Raises:
        ValueError: the statistics were computed without pruning, or shapes do not match.

    Source:
        arXiv 2512.23087 (abstract read). Differs from the paper: the mass is of S and the sampled
        token.
    """
    with agreed(process_group, mask):
        check_mask(mask)
        if stats.log_kept_mass is None or stats.safe_count is None or stats.in_safe_set is None:
            raise ValueError("expected stats computed with prune=rho, got stats without a safe set")
        check_tokens("stats.log_kept_mass", stats.log_kept_mass.detach(), mask)
    if not total(mask.sum(), process_group):
        return {}
    kept_mass = stats.log_kept_mass.detach().clamp_max(0).exp()
    numbers = {
        "pruning/kept_mass_mean": kept_mass,
        "pruning/safe_count_mean": stats.safe_count.to(kept_mass.dtype),
        "pruning/out_of_set_fraction": (~stats.in_safe_set).to(kept_mass.dtype),
    }
    if stats.skipped_fraction is not None:
        numbers["pruning/skipped_fraction"] = stats.skipped_fraction
    least = torch.where(mask, kept_mass, 1.0).min() if mask.numel() else kept_mass.new_ones(())
    return {name: mean_over(x, mask, process_group) for name, x in numbers.items()} | {
        "pruning/kept_mass_min": -maximum(-least, process_group)
    }
