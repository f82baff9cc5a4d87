"""`prefix_attention` by PyTorch's own flash attention: one call a segment, merged by log-sum-exp.

Backward calls PyTorch's backward for each segment with the output and the log-sum-exp of the whole
row: then exp(score - lse) is the probability among all keys, and the parts add up (as in ring
attention). The operators are private to PyTorch (torch 2.9 - 2.13: same signatures).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .prefix_attention import Packing, PrefixSegment

aten = torch.ops.aten


def refusal(query: Tensor) -> str | None:
    """Why this backend cannot run on `query`; None if it can."""
    if query.device.type == "cpu":
        return None
    width = query.shape[2]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and width <= 256 and width % 8 == 0:
        return None
    return (
        "PyTorch has flash attention on CPU, and on CUDA for bf16 and fp16 with a head width that "
        "is a multiple of 8, at most 256; "
        f"got {query.dtype} of width {width} on {query.device.type}"
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[PrefixSegment],
    packing: Packing,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [N, Hq, D] and log-sum-exp [N, Hq] in fp32 (fp64 for fp64)."""
    out, lse = _own_forward(query, key, value, packing, scale)
    dtype = query.dtype
    for segment in prefixes:
        folded = _folded(query, segment.key.shape[1])
        part, part_lse = _attend(folded, *map(_heads_first, segment[:2]), False, scale)
        part, part_lse = _unfolded(part, query.shape), _unfolded_numbers(part_lse, lse.shape)
        total = torch.logaddexp(lse, part_lse)
        out = out * (lse - total).exp()[..., None]
        out = out.addcmul_(part.to(out.dtype), (part_lse - total).exp()[..., None])
        lse = total
    return out.to(dtype), lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    prefixes: Sequence[PrefixSegment],
    packing: Packing,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; those of the prefixes are added to their buffers."""
    grad_q, grad_k, grad_v = _own_backward(grad_out, query, key, value, out, lse, packing, scale)
    heads = key.shape[1]
    rows = [_folded(x, heads) for x in (grad_out, query, out)] if prefixes else []
    folded_lse = lse.unflatten(1, (heads, -1)).permute(1, 0, 2).reshape(1, heads, -1).contiguous()
    for segment in prefixes:
        k, v = map(_heads_first, segment[:2])
        part_q, part_k, part_v = _attend_backward(
            rows[0], rows[1], k, v, rows[2], folded_lse, False, scale
        )
        grad_q = grad_q + _unfolded(part_q, query.shape)
        if segment.grad_key is not None:
            segment.grad_key.add_(part_k[0].transpose(0, 1))
            segment.grad_value.add_(part_v[0].transpose(0, 1))
    return grad_q, grad_k, grad_v


def _own_forward(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence to itself; the output in the dtype of the log-sum-exp."""
    outs, lses = [], []
    for length, q, k, v in _blocks(packing, query, key, value):
        out, lse = _attend(_split(q, length), *_repeated(q, k, v, length), True, scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    out, lse = torch.cat(outs), torch.cat(lses)
    return out.to(lse.dtype), lse


def _own_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = []
    for length, q, k, v, grad, o, sums in _blocks(packing, query, key, value, grad_out, out, lse):
        found = _attend_backward(
            _split(grad, length),
            _split(q, length),
            *_repeated(q, k, v, length),
            _split(o, length),
            _split(sums[..., None], length)[..., 0].contiguous(),
            True,
            scale,
        )
        grad_q, grad_k, grad_v = (x.transpose(1, 2).flatten(0, 1) for x in found)
        shared = [x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (grad_k, grad_v)]
        grads.append((grad_q, *shared))
    return tuple(torch.cat(parts) for parts in zip(*grads))


def _blocks(packing: Packing, *tensors: Tensor):
    """Length and rows of runs of sequences of one length: each is a batch without padding."""
    first = 0
    for i, length in enumerate(packing.lengths):
        end = packing.starts[i + 1]
        if i + 1 == len(packing.lengths) or packing.lengths[i + 1] != length:
            yield length, *(x[first:end] for x in tensors)
            first = end


def _split(x: Tensor, length: int) -> Tensor:
    """[B n, H, D] to [B, H, n, D]."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _repeated(query: Tensor, key: Tensor, value: Tensor, length: int) -> list[Tensor]:
    """Own keys and values with a head for each query head."""
    repeats = query.shape[1] // key.shape[1]
    return [_split(x.repeat_interleave(repeats, 1), length) for x in (key, value)]


def _heads_first(x: Tensor) -> Tensor:
    """[P, H, D] to [1, H, P, D]."""
    return x.transpose(0, 1)[None]


def _folded(x: Tensor, heads: int) -> Tensor:
    """[N, Hq, D] to [1, Hk, N R, D]: the query heads of a key head are more rows of one product."""
    return x.unflatten(1, (heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)[None]


def _unfolded(x: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of `_folded`."""
    return x[0].unflatten(1, (shape[0], -1)).permute(1, 0, 2, 3).reshape(shape)


def _unfolded_numbers(x: Tensor, shape: torch.Size) -> Tensor:
    """[1, Hk, N R] to [N, Hq]."""
    return x[0].unflatten(1, (shape[0], -1)).permute(1, 0, 2).reshape(shape)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, H, n, D] each; output and log-sum-exp [B, H, n]."""
    if query.is_cuda:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, scale=scale
        )[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )


def _attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = (grad_out, query, key, value, out, lse)
    if query.is_cuda:
        # no dropout: its generator state is not read; dense sequences: no cumulative lengths
        none = query.new_empty(2, dtype=torch.uint64)
        return aten._scaled_dot_product_flash_attention_backward(
            *saved, None, None, query.shape[2], key.shape[2], 0.0, causal, none, none, scale=scale
        )
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *saved, 0.0, causal, scale=scale
    )
