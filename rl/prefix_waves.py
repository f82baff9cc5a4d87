"""Waves: the responses of a group that are computed together, and what comes out of them.

Shapes: b responses of a wave, T tokens of the longest, N = all their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..triton_kernels.token_stats import TokenStats

Tokens = Sequence[int] | Tensor


class Wave(NamedTuple):
    """Responses that are computed together.

    Args:
        rows: [b] int64 on CPU, which responses of the group.
        tokens: [b, T] int64, right-padded with 0.
        mask: [b, T] bool, True at response tokens.
        responses: the same tokens as lists, on the host.
    """

    rows: Tensor
    tokens: Tensor
    mask: Tensor
    responses: list[list[int]]


class WaveOutput(NamedTuple):
    """What a wave gives, aligned to its tokens; 0 at padding.

    Args:
        logp: [b, T] log-probability of each response token, nats.
        stats: `TokenStats` of [b, T] tensors; `logp` is its first.
        router_loss: [b] load-balancing loss of each trajectory with its prefix, or None.
    """

    logp: Tensor
    stats: TokenStats
    router_loss: Tensor | None


LossFunction = Callable[[WaveOutput, Wave], Tensor]


def split_rows(costs: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive rows whose costs are at most `most`, or one row."""
    waves: list[list[int]] = []
    used = 0
    for row, cost in enumerate(costs):
        if not waves or used + cost > most:
            waves.append([])
            used = 0
        waves[-1].append(row)
        used += cost
    return waves


def wave_of(rows: Sequence[int], tokens: list[list[int]], device: torch.device) -> Wave:
    responses = [tokens[row] for row in rows]
    chosen = [torch.tensor(response) for response in responses]
    lengths = torch.tensor([len(x) for x in chosen])
    padded = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return Wave(torch.tensor(list(rows)), padded.to(device), mask.to(device), responses)


def padded_rows(flat: TokenStats, mask: Tensor) -> tuple[Tensor, TokenStats]:
    """Log-probabilities and statistics [b, T] of [N] ones, 0 at padding."""
    mask = mask.to(flat.logp.device)
    stats = TokenStats(
        *(x if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in flat)
    )
    return stats.logp, stats


def joined(outs: Sequence[WaveOutput], waves: Sequence[Wave], whole: Wave) -> WaveOutput:
    """Outputs of waves as that of all responses."""

    def padded(parts: Sequence[Tensor | None]) -> Tensor | None:
        if parts[0] is None:
            return None
        found = parts[0].new_zeros(whole.mask.shape)
        for part, wave in zip(parts, waves, strict=True):
            found[wave.rows, : part.shape[1]] = part
        return found

    stats = TokenStats(*(padded(parts) for parts in zip(*(out.stats for out in outs), strict=True)))
    router = None if outs[0].router_loss is None else torch.cat([o.router_loss for o in outs])
    return WaveOutput(stats.logp, stats, router)
