"""`prefix_attention` by Triton: what is allocated, and how the kernels are launched.

Shapes: N tokens, Hq query heads, Hk key heads, P prefix tokens, D head width. Forward and the
gradient of queries launch once a segment, and the last launch takes the own sequence too; between
launches an fp32 carry [N, Hq, D] holds what was found so far, so that one segment needs none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._launch import runs_kernel, triton
from ._prefix_attention_kernels import (
    forward_kernel,
    own_gradients_kernel,
    prefix_gradients_kernel,
    query_gradient_kernel,
)

if TYPE_CHECKING:
    from .prefix_attention import Packing, PrefixSegment

LOG2_E = math.log2(math.e)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256
# The gradients of a short prefix are split over the tokens, until there are so many programs a
# multiprocessor, or so few blocks of tokens a program.
PROGRAMS = 2
SPLIT_BLOCKS = 4
PROCESSORS = 1  # where the device is no GPU


class Tiles(NamedTuple):
    """Tokens and keys of a program's blocks: powers of two, at least 16, one a multiple of the
    other (tokens of keys, but keys of tokens for the gradients of keys)."""

    n: int
    s: int
    warps: int
    stages: int


# By kernel, bytes of an entry and padded width. On sm_90 the loops of the 16-bit ones spill nothing
# at widths 64 and 128. An AMD program of 8 warps has half the registers a thread that 4 have.
TILES = {
    "forward": {
        (2, 64): Tiles(128, 64, 8, 3),
        (2, 128): Tiles(128, 64, 8, 3),
        (2, 256): Tiles(128, 32, 8, 2),
        (4, 64): Tiles(64, 32, 8, 2),
        (4, 128): Tiles(32, 16, 8, 2),
        (4, 256): Tiles(16, 16, 8, 1),
    },
    "query": {
        (2, 64): Tiles(128, 64, 8, 2),
        (2, 128): Tiles(128, 64, 8, 2),
        (2, 256): Tiles(64, 32, 8, 2),
        (4, 64): Tiles(64, 32, 8, 2),
        (4, 128): Tiles(32, 16, 8, 2),
        (4, 256): Tiles(16, 16, 8, 1),
    },
    "keys": {
        (2, 64): Tiles(64, 128, 8, 2),
        (2, 128): Tiles(64, 128, 8, 2),
        (2, 256): Tiles(32, 64, 8, 2),
        (4, 64): Tiles(16, 64, 8, 2),
        (4, 128): Tiles(16, 32, 8, 2),
        (4, 256): Tiles(16, 16, 8, 1),
    },
}
AMD_TILES = {
    "forward": {
        (2, 64): Tiles(128, 64, 4, 2),
        (2, 128): Tiles(128, 64, 4, 2),
        (2, 256): Tiles(64, 32, 4, 2),
    },
    "query": {
        (2, 64): Tiles(64, 32, 4, 2),
        (2, 128): Tiles(64, 32, 4, 2),
        (2, 256): Tiles(32, 32, 4, 2),
    },
    "keys": {
        (2, 64): Tiles(32, 64, 4, 2),
        (2, 128): Tiles(32, 64, 4, 2),
        (2, 256): Tiles(16, 32, 4, 2),
    },
}


def refusal(query: Tensor) -> str | None:
    """Why this backend cannot run on `query`; None if it can."""
    if query.dtype not in DTYPES or query.shape[2] > MAX_WIDTH:
        return (
            f"the kernels are for bf16, fp16 and fp32 up to head width {MAX_WIDTH}; "
            f"got {query.dtype} of width {query.shape[2]}"
        )
    if triton is None:
        return "Triton is not installed"
    if not runs_kernel(query):
        return f"kernels run on CUDA, or anywhere under TRITON_INTERPRET=1; got {query.device.type}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[PrefixSegment],
    packing: Packing,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [N, Hq, D] and log-sum-exp [N, Hq] in fp32."""
    tiles = tiles_of("forward", query.dtype, query.shape[2])
    table = packing.tiles(tiles.n)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    with torch.cuda.device_of(query):
        for k, v, carry, into, last in _launches(prefixes, out):
            forward_kernel[(len(table), query.shape[1])](
                query,
                key,
                value,
                k,
                v,
                carry,
                into,
                lse,
                table,
                0 if k is None else len(k),
                query.shape[1],
                *_strides(query, key, value, k, v),
                scale * LOG2_E,
                CARRY=carry is not None,
                PREFIX=k is not None,
                OWN=last,
                BLOCK_N=tiles.n,
                BLOCK_S=tiles.s,
                **_options(query, key, tiles),
            )
    return out, lse


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
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    delta = torch.empty_like(lse)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    with torch.cuda.device_of(query):
        tiles = tiles_of("query", query.dtype, query.shape[2])
        table = packing.tiles(tiles.n)
        for k, v, carry, into, last in _launches(prefixes, grad_query):
            query_gradient_kernel[(len(table), query.shape[1])](
                grad_out,
                query,
                key,
                value,
                k,
                v,
                out,
                lse,
                delta,
                carry,
                into,
                table,
                0 if k is None else len(k),
                query.shape[1],
                *_strides(grad_out, query, key, value, k, v),
                scale * LOG2_E,
                scale if last else 1.0,
                CARRY=carry is not None,
                PREFIX=k is not None,
                OWN=last,
                BLOCK_N=tiles.n,
                BLOCK_S=tiles.s,
                **_options(query, key, tiles),
            )
        tiles = tiles_of("keys", query.dtype, query.shape[2])
        table = packing.tiles(tiles.s)
        own_gradients_kernel[(len(table), key.shape[1])](
            grad_out,
            query,
            key,
            value,
            lse,
            delta,
            grad_key,
            grad_value,
            table,
            query.shape[1],
            *_strides(grad_out, query, key, value),
            scale * LOG2_E,
            scale,
            BLOCK_N=tiles.n,
            BLOCK_S=tiles.s,
            **_options(query, key, tiles),
        )
        for segment in prefixes:
            if segment.grad_key is not None:
                _add_gradients(segment, grad_out, query, lse, delta, scale)
    return grad_query, grad_key, grad_value


def _add_gradients(
    segment: PrefixSegment,
    grad_out: Tensor,
    query: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> None:
    """Adds the gradients of a segment to its buffers, in an order that only sizes determine."""
    key, value, *grads = segment
    tiles = tiles_of("keys", query.dtype, query.shape[2])
    blocks, heads = triton.cdiv(len(key), tiles.s), key.shape[1]
    splits = splits_of(blocks * heads, triton.cdiv(len(query), tiles.n), query.device)
    parts = None
    if splits > 1:
        parts = grads[0].new_empty(splits, 2, *key.shape)
        grads = list(parts[0])
    prefix_gradients_kernel[(blocks, heads, splits)](
        grad_out,
        query,
        key,
        value,
        lse,
        delta,
        *grads,
        len(query),
        len(key),
        query.shape[1],
        *_strides(grad_out, query, key, value, *grads),
        0 if parts is None else parts.stride(0),
        scale * LOG2_E,
        scale,
        ADD=parts is None,
        BLOCK_N=tiles.n,
        BLOCK_S=tiles.s,
        **_options(query, key, tiles),
    )
    if parts is not None:
        for grad, part in zip((segment.grad_key, segment.grad_value), parts.sum(0)):
            grad.add_(part)


def splits_of(programs: int, blocks: int, device: torch.device) -> int:
    """Parts of the tokens' blocks, a program each, where this many programs own a prefix tile."""
    processors = PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(PROGRAMS * processors, programs)
    return max(1, min(wanted, blocks // SPLIT_BLOCKS))


def tiles_of(kernel: str, dtype: torch.dtype, width: int, amd: bool | None = None) -> Tiles:
    """Of "forward", "query" (its gradient) or "keys" (theirs); `amd`: this PyTorch by default."""
    size = dtype.itemsize, max(64, triton.next_power_of_2(width))
    if torch.version.hip is not None if amd is None else amd:
        return AMD_TILES[kernel].get(size) or TILES[kernel][size]
    return TILES[kernel][size]


def _launches(
    prefixes: Sequence[PrefixSegment], out: Tensor
) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, bool]]:
    """Keys and values of a launch, what it goes on from, where its result goes, and if it is the
    last, which takes the own sequences."""
    pairs = [segment[:2] for segment in prefixes] or [(None, None)]
    carry = None
    for pair in pairs[:-1]:
        into = out.new_empty(out.shape, dtype=torch.float32) if carry is None else carry
        yield *pair, carry, into, False
        carry = into
    yield *pairs[-1], carry, out, True


def _strides(*tensors: Tensor | None) -> list[int]:
    """Along tokens and heads."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def _options(query: Tensor, key: Tensor, tiles: Tiles) -> dict:
    """What every kernel is told of the heads and of its launch."""
    width = query.shape[2]
    return {
        "REPEATS": query.shape[1] // key.shape[1],
        "UPCAST": os.environ.get("TRITON_INTERPRET") == "1",
        "PRECISION": "ieee",
        "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
