"""Statistics of the tokens of padded responses, and the group sums that this folder shares.

Shapes: B sequences, T tokens, V vocabulary entries, D width, N = B * T flattened tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..triton_kernels.linear_token_stats import linear_token_stats
from ..triton_kernels.token_stats import TokenStats, token_stats
from ._numerics import check_finite, check_mask, check_shape, masked, minimum, total

_IGNORED = torch.iinfo(torch.int64).min  # no token of a user, so -100 is not passed over


def response_statistics(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    prune: float | None = None,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
) -> TokenStats:
    """Log-probability, entropy and collision probability of every generated token, shaped [B, T].

    Masked positions are skipped, not computed and thrown away. Pass the model's logits whole, with
    mask False at the prompt: a slice such as logits[:, 5:] is not one block of memory and is
    copied.

    Args:
        logits: [B, T, V], fp32/bf16/fp16; logits[b, t] predicts tokens[b, t].
        tokens: [B, T] int64, each in [0, V) where mask is True; anything elsewhere.
        mask: [B, T] bool, True at a generated token.
        temperature: > 0; statistics are of softmax(logits / temperature).
        prune: rho in (0, 1): statistics are of the safe vocabulary (see `pruning.py`); None: of all
            of V.
        softcap: c > 0 for c tanh(logits / c) first; None: off.
        group: the vocabulary is sharded over it; logits are this rank's columns, tokens are of the
            whole vocabulary.

    Returns:
        TokenStats of [B, T] tensors, zero (False) at masked positions and differentiable as
        `token_stats` is; log_kept_mass, safe_count and in_safe_set are None unless prune is given.

    Raises:
        ValueError: shapes do not match, or a generated token has no finite log-probability.

    Source:
        sum_p2 as arXiv 2602.07078 uses it; the safe vocabulary of arXiv 2512.23087.
    """
    labels = _labels("logits", logits, "[B, T, V]", tokens, mask, _size(logits, -1, group))
    flat = token_stats(
        logits.reshape(-1, logits.shape[-1]),
        labels,
        temperature=temperature,
        prune=prune,
        softcap=softcap,
        group=group,
        ignore_index=_IGNORED,
    )
    return _unflattened(flat, mask, "(logits, tokens)")


def linear_response_statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    prune: float | None = None,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
) -> TokenStats:
    """What `response_statistics` returns of hidden @ weight^T + bias, without those logits.

    Args:
        hidden: [B, T, D], fp32/bf16/fp16; what the head reads at the positions that predict tokens.
        weight: [V, D] of the head, in the dtype of `hidden`.
        tokens: [B, T] int64, each in [0, V) where mask is True; anything elsewhere.
        mask: [B, T] bool, True at a generated token.
        bias: [V] of the head, or None.
        temperature: > 0.
        prune: rho in (0, 1) or None; with it, backward skips what gets no gradient, and
            `skipped_fraction` says how much of the vocabulary that is.
        softcap: c > 0 for c tanh(logits / c) first, as Gemma 2 does; None: off.
        group: the vocabulary is sharded over it; weight and bias are this rank's rows, and the
            gradient for hidden is this rank's part, which the caller adds up over the group
            (`linear_token_stats` says how with Megatron-core).

    Returns:
        TokenStats of [B, T] tensors, zero (False) at masked positions, differentiable in hidden,
        weight and bias.

    Raises:
        ValueError: shapes do not match, or a generated token has no finite log-probability.

    Source:
        As `response_statistics`.
    """
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        found = f"{tuple(weight.shape)} for hidden {tuple(hidden.shape)}"
        raise ValueError(f"expected weight [V, D] (of nn.Linear, not transposed), got {found}")
    size = _size(weight, 0, group)
    labels = _labels("hidden", hidden, "[B, T, D]", tokens, mask, size)
    flat = linear_token_stats(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        prune=prune,
        softcap=softcap,
        group=group,
        ignore_index=_IGNORED,
    )
    return _unflattened(flat, mask, "(hidden, weight, tokens)")


def _size(x: Tensor, dim: int, group: ProcessGroup | None) -> int | None:
    """The vocabulary, unless the group has more of it."""
    return x.shape[dim] if group is None and x.ndim > 1 else None


def _labels(
    name: str, x: Tensor, letters: str, tokens: Tensor, mask: Tensor, size: int | None
) -> Tensor:
    """[N] the tokens, ignored where masked; after checks. `size` of the vocabulary, if known."""
    check_mask(mask)
    if x.ndim != 3:
        raise ValueError(f"expected {name} {letters}, got {tuple(x.shape)}")
    check_shape(name, x, (*mask.shape, x.shape[-1]), letters)
    check_shape("tokens", tokens, mask.shape, "[B, T]")
    if tokens.dtype != torch.int64:
        raise ValueError(f"expected tokens of int64, got {tokens.dtype}")
    if not x.device == tokens.device == mask.device:
        found = f"{x.device}, {tokens.device} and {mask.device}"
        raise ValueError(f"expected {name}, tokens and mask on one device, got {found}")
    if tokens.is_cpu:  # a GPU would have to be waited for
        wrong = mask & ((tokens < 0) if size is None else (tokens < 0) | (tokens >= size))
        if wrong.any():
            position = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"expected tokens in [0, {size or 'V'}) where mask is True, got "
                f"{int(tokens[position])} at {position}"
            )
    return torch.where(mask, tokens, _IGNORED).reshape(-1)


def _unflattened(flat: TokenStats, mask: Tensor, source: str) -> TokenStats:
    stats = TokenStats(*(x if x is None else masked(x.reshape(mask.shape), mask) for x in flat))
    check_finite(f"log-probability of {source}", stats.logp.detach(), mask)
    return stats


def group_index(group_ids: Tensor, process_group: ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Rank of each row's group among the sorted ids: ([B] int64 in 0..n-1, n).

    `group_ids` is [B], or [B, K] where K numbers together are the id. With a process group the ids
    are those of all its ranks, and an id means the same group on every one.
    """
    ids = group_ids.long()
    if process_group is None:
        found, index = _unique(ids)
        return index, len(found)
    rank, sizes = dist.get_rank(process_group), _row_counts(ids, process_group)
    padded = ids.new_zeros(max(sizes), *ids.shape[1:])
    padded[: len(ids)] = ids
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=process_group)
    rows = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    found, index = _unique(rows)
    return index.split(sizes)[rank], len(found)


def _unique(ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.unique(ids, dim=None if ids.ndim == 1 else 0, return_inverse=True)


def _row_counts(x: Tensor, process_group: ProcessGroup) -> list[int]:
    sizes = torch.zeros(dist.get_world_size(process_group), dtype=torch.int64, device=x.device)
    sizes[dist.get_rank(process_group)] = len(x)
    dist.all_reduce(sizes, group=process_group)
    return sizes.tolist()


def segment_sum(
    values: Tensor, index: Tensor, n: int, process_group: ProcessGroup | None = None
) -> Tensor:
    """[n, ...] sums of the rows of `values` [B, ...] that share an index, over all ranks."""
    sums = values.new_zeros((n, *values.shape[1:])).index_add(0, index, values)
    return total(sums, process_group)


def segment_min(
    values: Tensor, index: Tensor, n: int, process_group: ProcessGroup | None = None
) -> Tensor:
    """[n] minima of the entries of `values` [B] that share an index; inf where there is none."""
    minima = values.new_full((n,), torch.inf).scatter_reduce(0, index, values, "amin")
    return minimum(minima, process_group)


def reward_to_go(values: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """[B, T] fp64: sum over the unmasked tokens k >= t of gamma^(tokens from t to k) values_k.

    A masked position (a tool's token) neither adds nor discounts, and holds 0.
    """
    values = masked(values.double(), mask)
    if gamma == 1:
        return masked(values.flip(1).cumsum(1).flip(1), mask)
    own_index = (mask.cumsum(1) - 1).clamp_min(0)
    sums = torch.zeros_like(values).scatter_add(1, own_index, values)  # gaps closed
    step = 1
    while step < sums.shape[1]:  # after it, each entry holds its next 2 * step values
        reach = torch.nn.functional.pad(sums[:, step:], (0, step))
        sums, step = sums + gamma**step * reach, 2 * step
    return masked(sums.gather(1, own_index), mask)


def pad_packed(values: Tensor, lengths: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Responses that stand behind each other in one row, as [B, T] with a mask.

    The layout is that of variable-length attention, whose `cu_seqlens` are the sums of `lengths`.

    Args:
        values: [N, ...], the tokens of all responses; differentiable.
        lengths: [B] of an integer dtype, tokens of each response, with sum N; 0 is allowed.
        width: T; None: the longest response, at least 1.

    Returns:
        Values [B, T, ...], 0 at padding, and the mask [B, T] bool.

    Raises:
        ValueError: the lengths do not add up to N, or one is negative or longer than the width.
    """
    if lengths.ndim != 1 or lengths.is_floating_point() or (lengths < 0).any():
        raise ValueError(f"expected lengths [B] of whole numbers >= 0, got {lengths}")
    if int(lengths.sum()) != len(values):
        raise ValueError(f"expected lengths that sum to {len(values)}, got {int(lengths.sum())}")
    longest = int(lengths.max()) if len(lengths) else 0
    width = max(longest, 1) if width is None else width
    if width < max(longest, 1):
        raise ValueError(f"expected width >= {max(longest, 1)}, got {width}")
    mask = torch.arange(width, device=values.device) < lengths.to(values.device)[:, None]
    padded = values.new_zeros(*mask.shape, *values.shape[1:])
    return padded.index_put(mask.nonzero(as_tuple=True), values), mask


def pack_padded(values: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of `pad_packed`: [B, T, ...] to [N, ...], differentiable.

    Args:
        values: [B, T, ...].
        lengths: [B] of an integer dtype, each in [0, T].

    Returns:
        [N, ...] with N the sum of lengths.

    Raises:
        ValueError: a length is out of range.
    """
    check_shape("lengths", lengths, values.shape[:1], "[B]")
    if ((lengths < 0) | (lengths > values.shape[1])).any():
        raise ValueError(f"expected lengths in [0, {values.shape[1]}], got {lengths.tolist()}")
    columns = torch.arange(values.shape[1], device=values.device)
    return values[columns < lengths.to(values.device)[:, None]]
