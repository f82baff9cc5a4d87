"""Causal attention of several sequences that go on from one prefix, whose keys are not copied.

Shapes: N tokens of B packed sequences, Hq query heads, Hk key heads (Hq = R Hk), P prefix tokens,
D head width. A token sees every token of each prefix segment, and its own sequence up to itself:

    out = softmax([q K1^T, q K2^T] scale) [V1; V2]        K1, V1: prefix;  K2, V2: own sequence
    grad V1 += P21^T dout;   grad K1 += dS21^T q scale    P21, dS21: the part against the prefix

The gradients of prefix keys and values are not returned to autograd: they are added, in fp32, to
buffers that the caller owns, so that waves of sequences add up and the prefix goes backward once.

The paper: arXiv 2606.01143, schedule of section 3; a query head reads its key head, nothing is
repeated.

Cost: reads K1 and V1 once for a block of query rows, no [N, P] tensor; keeps q, K2, V2, out [N, H,
D] and one number a token and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _prefix_attention_fused as fused
from . import _prefix_attention_triton as kernels
from ._rows import DTYPES, check_number, check_tensor

Backend = Literal["fused", "triton"]


class PrefixSegment(NamedTuple):
    """Keys and values that all sequences see, and where their gradients are added.

    Args:
        key: [P, Hk, D]; any strides but 1 along D.
        value: [P, Hk, D].
        grad_key: [P, Hk, D] fp32 (fp64 for fp64 keys, and allowed for any), added to in backward;
            None: not wanted.
        grad_value: as `grad_key`; both or neither.
    """

    key: Tensor
    value: Tensor
    grad_key: Tensor | None = None
    grad_value: Tensor | None = None


class Packing:
    """B sequences of these lengths, one after the other in a row of N tokens, without padding.

    Made once for all layers of a wave: what kernels read of it is put on the device once.

    Args:
        lengths: of each sequence, at least 1; on the host.
        device: of the tokens.

    Raises:
        ValueError: there is no sequence, or an empty one.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self.lengths = tuple(int(length) for length in lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: expected at least one, each >= 1, got {list(lengths)}")
        self.device = torch.device(device)
        self._tiles: dict[int, Tensor] = {}

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """[B + 1] first token of each sequence, then N."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @property
    def tokens(self) -> int:
        """N."""
        return self.starts[-1]

    def tiles(self, block: int) -> Tensor:
        """[tiles, 3] int32: first token of each block; where its sequence starts and ends.

        A block has at most `block` tokens and lies in one sequence.
        """
        if block not in self._tiles:
            rows = [
                (first, start, end)
                for start, end in zip(self.starts, self.starts[1:])
                for first in range(start, end, block)
            ]
            table = torch.tensor(rows, dtype=torch.int32)
            self._tiles[block] = table.to(self.device, non_blocking=True)
        return self._tiles[block]


def prefix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    lengths: Sequence[int],
    *,
    scale: float | None = None,
) -> Tensor:
    """What the fused attention over a prefix computes, in plain differentiable PyTorch.

    Args:
        query: [N, Hq, D].
        key: [N, Hk, D].
        value: [N, Hk, D].
        prefixes: pairs of keys and values [P, Hk, D].
        lengths: tokens of each sequence.
        scale: of the scores; D^-0.5 by default.

    Returns:
        [N, Hq, D] in the dtype of `query`.
    """
    repeats = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in (query, key, value))):
        k = torch.cat([*(p[0] for p in prefixes), k]).repeat_interleave(repeats, 1)
        v = torch.cat([*(p[1] for p in prefixes), v]).repeat_interleave(repeats, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(len(k) - len(q) + 1), -torch.inf)
        outs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v))
    return torch.cat(outs)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefixes, packing, scale, backend):
        out, lse = backend.forward(query, key, value, prefixes, packing, scale)
        # the prefix's tensors are alive as long as the group is, and their buffers change in place
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.prefixes, ctx.packing, ctx.scale, ctx.backend = prefixes, packing, scale, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse = ctx.saved_tensors
        grads = ctx.backend.backward(
            grad_out, query, key, value, out, lse, ctx.prefixes, ctx.packing, ctx.scale
        )
        return *grads, None, None, None, None


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[PrefixSegment],
    packing: Packing,
    *,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Causal attention of packed sequences that share prefix segments.

    Args:
        query: [N, Hq, D] in fp32, bf16, fp16 or fp64 (fp64: not by Triton).
        key: [N, Hk, D], dtype and device of `query`; Hk divides Hq.
        value: [N, Hk, D].
        prefixes: segments in the order of their tokens, each at least one token; may be none.
        packing: lengths of the sequences; their sum is N.
        scale: of the scores; D^-0.5 by default.
        backend: "fused" calls PyTorch's flash attention once a segment and merges by log-sum-exp;
            "triton" runs one kernel of this package. Default: Triton on CUDA where there is a
            prefix, else fused.

    Returns:
        [N, Hq, D], contiguous, in the dtype of `query`. Differentiable in query, key and value; its
        backward adds to the segments' `grad_key` and `grad_value`, once each time it runs.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend cannot run on them.

    Source:
        arXiv 2606.01143, equations of section 3; differs from the paper: no concatenated keys.
    """
    _check(query, key, value, prefixes, packing)
    scale = query.shape[-1] ** -0.5 if scale is None else check_number(scale, "scale", 0, 1e30)
    if backend is None:
        # without a prefix it is plain causal attention, which PyTorch has tuned
        use_kernel = query.is_cuda and (prefixes or fused.refusal(query))
        backend = "triton" if use_kernel and not kernels.refusal(query) else "fused"
    if backend not in ("fused", "triton"):
        raise ValueError(f"backend: expected fused, triton or None, got {backend!r}")
    module = kernels if backend == "triton" else fused
    reason = module.refusal(query)
    if reason:
        raise ValueError(f"backend {backend!r}: {reason}")
    return _PrefixAttention.apply(query, key, value, tuple(prefixes), packing, scale, module)


def _check(
    query: Tensor, key: Tensor, value: Tensor, prefixes: Sequence[PrefixSegment], packing: Packing
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(x, name)
        _check_like(x, query, name)
    tokens, heads, width = query.shape
    if query.dtype not in DTYPES:
        raise ValueError(f"query: expected fp32, bf16, fp16 or fp64, got {query.dtype}")
    if value.shape != key.shape or key.shape[0] != tokens or key.shape[2] != width:
        raise ValueError(
            f"expected key and value [{tokens}, Hk, {width}], got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key: its {key.shape[1]} heads do not divide the query's {heads}")
    if packing.tokens != tokens:
        raise ValueError(f"packing: {packing.tokens} tokens, but query has {tokens}")
    if packing.device != query.device:
        raise ValueError(f"packing on {packing.device}, but query on {query.device}")
    least = torch.promote_types(query.dtype, torch.float32)
    for i, segment in enumerate(prefixes):
        shape = (segment.key.shape[0], *key.shape[1:])
        if shape[0] == 0:
            raise ValueError(f"prefixes[{i}]: expected at least one token, got none")
        if (segment.grad_key is None) != (segment.grad_value is None):
            raise ValueError(f"prefixes[{i}]: expected both grad_key and grad_value, or neither")
        for name, x in segment._asdict().items():
            if x is None:
                continue
            wanted = query.dtype
            if name.startswith("grad"):
                wanted = torch.float64 if x.dtype == torch.float64 else least
            name = f"prefixes[{i}].{name}"
            _check_like(x, query, name, wanted)
            if x.shape != shape:
                raise ValueError(f"{name}: expected {shape}, got {tuple(x.shape)}")


def _check_like(x: Tensor, query: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    dtype = query.dtype if dtype is None else dtype
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"{name}: expected [tokens, heads, width], got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != query.device:
        raise ValueError(f"query on {query.device}, but {name} on {x.device}")
    if x.stride(2) != 1 and x.shape[2] > 1:
        raise ValueError(f"{name}: expected stride 1 along its width, got {x.stride()}")
