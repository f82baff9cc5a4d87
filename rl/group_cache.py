"""Keys and values of groups of rollouts in decoding, and the attention that reads them.

A prompt's keys and values exist once; each row adds its own. Rows stand in a rectangle of segments
times `width`, and all rows of a segment continue the same prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface


def rectangle(counts: Sequence[int]) -> tuple[list[int], int]:
    """How rows are laid out, when prompts have different numbers of them.

    Args:
        counts: rows of each prompt.

    Returns:
        The prompt of each segment, in order, and the rows of every segment. A prompt with more rows
        has several segments, one with none has none; the last one of a prompt may not be full.
    """

    # a segment costs as much as about two rows: its prompt's keys are copied and read
    def cost(width: int) -> int:
        return sum(math.ceil(count / width) * (width + 2) for count in counts)

    width = min(sorted({count for count in counts if count}, reverse=True), key=cost)
    segments = [p for p, count in enumerate(counts) for _ in range(math.ceil(count / width))]
    return segments, width


class GroupCache:
    """Keys and values: per segment [S, Hkv, L, D] of its prompt, per row [R, Hkv, T, D] of its own.

    Passed to the attention function through the model's keyword arguments.

    Args:
        lengths: [P] int64, tokens of each prompt that are computed before decoding.
        tokens: most tokens that a row decodes.
    """

    def __init__(self, lengths: Tensor, tokens: int) -> None:
        self.lengths, self.tokens = lengths, tokens
        self.decoding = False
        self.width = 0
        self.step = -1
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.suffix: dict[int, tuple[Tensor, Tensor]] = {}
        self.padding: Tensor | None = None
        self.own_padding: Tensor | None = None
        self.first_layer: int | None = None

    def begin_decoding(self, segments: Tensor, width: int) -> None:
        """From prompts to rows.

        Args:
            segments: [S] int64, the prompt of each.
            width: rows of a segment.
        """
        self.decoding, self.width = True, width
        lengths = self.lengths[segments]
        if segments.tolist() != list(range(len(self.lengths))):  # else it is each prompt once
            self.prefix = {i: (k[segments], v[segments]) for i, (k, v) in self.prefix.items()}
        inside = torch.arange(int(self.lengths.max()), device=lengths.device) < lengths[:, None]
        self.padding = torch.where(inside, 0.0, -torch.inf)[:, None, None, :]  # [S, 1, 1, L]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds this step's [R, Hkv, 1, D] and returns what the rows have so far, [R, Hkv, t, D]."""
        if self.first_layer is None:
            self.first_layer = layer
        if layer == self.first_layer:
            self.step += 1
        if layer not in self.suffix:
            rows, heads, _, size = key.shape
            shape = (rows, heads, self.tokens, size)
            self.suffix[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.suffix[layer]
        keys[:, :, self.step] = key[:, :, 0]
        values[:, :, self.step] = value[:, :, 0]
        return keys[:, :, : self.step + 1], values[:, :, : self.step + 1]

    def compact(
        self, row: Tensor, alive: Tensor, last: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drops finished segments and, in the others, finished rows, once a quarter can go."""
        groups = alive.view(-1, self.width)
        left = groups.sum(-1)
        width = int(left.max())
        kept_groups = left > 0
        if int(kept_groups.sum()) * width > 0.75 * row.numel():
            return row, alive, last, position
        # living rows first, in their order; then as many finished ones as fill the rectangle
        order = groups.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :width]
        start = torch.arange(groups.shape[0], device=row.device)[:, None] * self.width
        chosen = (order + start)[kept_groups].flatten()
        self.width = width
        self.prefix = {
            layer: (k[kept_groups], v[kept_groups]) for layer, (k, v) in self.prefix.items()
        }
        self.suffix = {layer: (k[chosen], v[chosen]) for layer, (k, v) in self.suffix.items()}
        if self.padding is not None:
            self.padding = self.padding[kept_groups]
        return row[chosen], alive[chosen], last[chosen], position[chosen]


def group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    group_cache: GroupCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the engine's model: causal over prompts, then two segments per decoded token."""
    for name in ("softcap", "s_aux", "sliding_window"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"model: attention with {name} is refused, this engine would ignore it"
            )
    assert group_cache is not None, "this model belongs to a TransformersEngine"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    if not group_cache.decoding:  # right padding is invisible to a causal row before it
        group_cache.prefix[layer] = (key.transpose(-1, -2).contiguous(), value.contiguous())
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out.transpose(1, 2), None

    own_keys, own_values = group_cache.append(layer, key, value)
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    query = query.view(rows, kv_heads, heads // kv_heads, size) * scale  # [R, Hkv, H/Hkv, D]
    scores = query @ own_keys.transpose(-1, -2)  # [R, Hkv, H/Hkv, t]
    if group_cache.own_padding is not None:
        scores = scores + group_cache.own_padding.to(scores.dtype)
    if layer not in group_cache.prefix:  # prompts of one token have no prefix
        out = scores.softmax(-1) @ own_values
        return out.view(rows, 1, heads, size), None
    keys, values = group_cache.prefix[layer]
    groups, width, length = keys.shape[0], group_cache.width, keys.shape[-1]

    def by_group(x: Tensor) -> Tensor:  # [R, Hkv, H/Hkv, *] -> [P, Hkv, rows of a group * H/Hkv, *]
        x = x.view(groups, width, kv_heads, heads // kv_heads, x.shape[-1]).transpose(1, 2)
        return x.reshape(groups, kv_heads, width * (heads // kv_heads), x.shape[-1])

    def by_row(x: Tensor) -> Tensor:
        x = x.view(groups, kv_heads, width, heads // kv_heads, x.shape[-1]).transpose(1, 2)
        return x.reshape(rows, kv_heads, heads // kv_heads, x.shape[-1])

    prefix_scores = by_row(by_group(query) @ keys + group_cache.padding.to(query.dtype))
    weights = torch.cat([prefix_scores, scores], -1).softmax(-1)
    out = by_row(by_group(weights[..., :length]) @ values) + weights[..., length:] @ own_values
    return out.reshape(rows, 1, heads, size), None


ATTENTION = "trimtab_group_decode"
# A name without a mask function: transformers then builds no mask, and this function needs none.
AttentionInterface.register(ATTENTION, group_attention)
