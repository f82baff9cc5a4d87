"""`linear_token_stats` by Triton: what is allocated, and how the kernels are launched.

Shapes: N tokens, V vocabulary entries, D width. A tile is `Tiles.n` tokens by `Tiles.v` entries.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import triton
from ._linear_kernels import (
    gradient_kernel,
    kept_kernel,
    label_kernel,
    product_kernel,
    whole_kernel,
)
from ._token_sums import IGNORED, KeptSums, Options, WholeSums, merge_whole

# A tile is left out of a sweep if its bound is this much below the threshold (nats): the bound's
# maximum and label are computed in another order than the tile.
SLACK = 0.01
ROUNDING = 3e-5  # of a sum of products in fp32, relative to the sum of their magnitudes
# A sweep over the vocabulary is split in so many programs a token block at least, and in more where
# that leaves fewer programs than this in all.
SPLITS = 12
PROGRAMS = 256
# Backward goes chunk by chunk: so many tokens at once, and as many entries as the scratch holds,
# but no more than this share of the vocabulary.
CHUNK_TOKENS = 8192
CHUNK_SHARE = 1 / 10
SCRATCH_BYTES = 128 * 2**20


class Tiles(NamedTuple):
    """Sizes of a program's blocks; powers of two, at least 16."""

    n: int
    v: int
    d: int
    warps: int
    stages: int


# By bytes of an entry; the largest that spill no registers on sm_80, sm_90, sm_100 and gfx942.
TILES = {2: Tiles(128, 128, 64, 8, 3), 4: Tiles(64, 64, 32, 8, 3)}


class Head:
    """A linear head and the rows that are read through it.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
        y: [N] local labels.
        options: those of `token_stats`.
    """

    def __init__(self, hidden, weight, bias, y: Tensor, options: Options) -> None:
        self.hidden, self.weight, self.bias, self.y = hidden, weight, bias, y
        self.options = options
        self.tiles = tiles = TILES[hidden.element_size()]
        # token blocks and vocabulary tiles
        self.blocks = triton.cdiv(len(y), tiles.n), triton.cdiv(len(weight), tiles.v)

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """The first arguments of every kernel that computes a tile."""
        return self.hidden, self.weight, self.bias, self.y

    @property
    def numbers(self) -> dict:
        """The sizes, constants and launch options of every kernel that computes a tile."""
        tiles, options = self.tiles, self.options
        return {
            "N": len(self.y),
            "V": len(self.weight),
            "D": self.hidden.shape[1],
            "stride_hn": self.hidden.stride(0),
            "stride_wv": self.weight.stride(0),
            "inv_temperature": 1 / options.temperature,
            "softcap": options.softcap or 0.0,
            "SOFTCAP": options.softcap is not None,
            "BIAS": self.bias is not None,
            "BLOCK_N": tiles.n,
            "BLOCK_V": tiles.v,
            "BLOCK_D": tiles.d,
        } | matmul_options(self.hidden.dtype, tiles)

    def with_labels(self, live: Tensor) -> Tensor:
        """`live` with the tiles that hold a label."""
        row = torch.arange(len(self.y), device=live.device) // self.tiles.n
        column = self.y.clamp_min(0) // self.tiles.v
        labels = torch.zeros(live.shape, dtype=torch.int32, device=live.device)
        labels.index_put_((row, column), (self.y >= 0).to(torch.int32), accumulate=True)
        return live | (labels > 0)

    def live_without_broken(self, live: Tensor, y: Tensor) -> Tensor:
        """`live` for a head whose broken rows `y` has come to ignore: blocks of rows stay."""
        return live

    def skipped_fraction(self, live: Tensor) -> Tensor:
        """[N] share of the tiles of a row that are not live; 0 at ignored rows."""
        share = 1 - live.to(torch.float32).mean(1)
        row = torch.arange(len(self.y), device=live.device) // self.tiles.n
        return torch.where(self.y == IGNORED, 0, share[row])


def matmul_options(dtype: torch.dtype, tiles: Tiles) -> dict:
    """Precision of tl.dot (fp32 as torch.set_float32_matmul_precision says) and launch options."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "UPCAST": os.environ.get("TRITON_INTERPRET") == "1",
        "PRECISION": "ieee" if exact or dtype != torch.float32 else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _splits(head: Head) -> int:
    """Parts of the vocabulary, one program each: enough programs, and few rows at a time in L2."""
    blocks, tiles = head.blocks
    return min(tiles, max(SPLITS, triton.cdiv(PROGRAMS, blocks)))


def _label_floor(head: Head) -> Tensor:
    """[N] a number that the label's x surely reaches, -inf where the label is elsewhere."""
    floor = torch.full((len(head.y),), -torch.inf, device=head.hidden.device)
    numbers = head.numbers
    names = ("D", "stride_hn", "stride_wv", "inv_temperature", "softcap", "SOFTCAP", "BIAS")
    if numbers["PRECISION"] != "ieee":
        return floor  # tiles are of other numbers
    block = min(1024, triton.next_power_of_2(head.hidden.shape[1]))
    label_kernel[(len(head.y),)](
        *head.pointers,
        floor,
        **{name: numbers[name] for name in names},
        rounding=ROUNDING,
        BLOCK_D=block,
    )
    return floor


def whole_sums(head: Head, track: bool) -> tuple[WholeSums, Tensor | None]:
    """Sums of this shard, and for each tile [token blocks, vocabulary tiles] the bound of its
    excess (nats) over the rows' maxima (pruned) or logsumexps, if asked to `track` it."""
    n, device = len(head.y), head.hidden.device
    blocks, tiles = head.blocks
    splits = _splits(head)
    parts = torch.zeros(splits, 5, n, device=device)
    parts[:, 0] = torch.finfo(torch.float32).min
    bound = torch.full((blocks, tiles), -torch.inf, device=device) if track else None
    floor = _label_floor(head) if track else None
    whole_kernel[(blocks * splits,)](
        *head.pointers,
        floor,
        parts,
        bound,
        **head.numbers,
        splits=splits,
        S1_ONLY=head.options.prune is not None,
        TRACK=track,
    )
    found = (head.y >= 0).float()
    sums = merge_whole(WholeSums(*parts.unbind(1), torch.zeros_like(parts[:, 0])))
    return sums._replace(found=found), bound


def _in_parts(head: Head) -> dict:
    """Arguments of the kernels that take half a tile at a time."""
    return head.numbers | {"TILE_V": head.tiles.v, "BLOCK_V": head.tiles.v // 2}


def kept_sums(head: Head, top: Tensor, bound: Tensor) -> tuple[KeptSums, Tensor]:
    """Sums of this shard over K, and which tiles hold an entry of it (bool, as `bound`)."""
    blocks, _ = head.blocks
    splits = _splits(head)
    parts = torch.zeros(splits, 4, len(head.y), device=top.device)
    live = torch.zeros(bound.shape, dtype=torch.bool, device=top.device)
    kept_kernel[(blocks * splits,)](
        *head.pointers,
        top,
        bound,
        parts,
        live,
        **_in_parts(head),
        log_rho=head.options.log_rho,
        slack=SLACK,
        splits=splits,
    )
    return KeptSums(*parts.sum(0)), live


def gradients(
    head: Head,
    saved: list[Tensor | None],
    upstream: list[Tensor | None],
    live: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for hidden, weight and bias, those that are needed, in their dtypes.

    Chunk by chunk: dz goes to a scratch of SCRATCH_BYTES in the dtype of `hidden`, from there into
    two products that accumulate in fp32, always in the same order.

    Args:
        head: the head.
        saved: [N] each: top, log_sum, log_kept_mass (None: not pruned), entropy, sum_p2.
        upstream: [N] each, None where there is none: of logp, entropy, sum_p2, logsumexp,
            log_kept_mass.
        live: [token blocks, vocabulary tiles] bool, tiles that have a gradient; None: all.
        needed: which of the three.
    """
    hidden, weight, bias, y = head.pointers
    options, tiles, (blocks, columns) = head.options, head.tiles, head.blocks
    n, v, width = len(y), len(weight), hidden.shape[1]
    device, numbers = hidden.device, _in_parts(head)
    upstream = [torch.zeros_like(saved[0]) if g is None else g.contiguous() for g in upstream]
    chunk_n = min(blocks, max(1, CHUNK_TOKENS // tiles.n))
    tile_bytes = chunk_n * tiles.n * tiles.v * hidden.element_size()
    tile_bytes = max(tile_bytes, tiles.v * width * 4)  # of dz, and of the weight's gradient
    chunk_v = max(1, min(SCRATCH_BYTES // tile_bytes, math.ceil(columns * CHUNK_SHARE)))
    dz = torch.empty(chunk_n * tiles.n, chunk_v * tiles.v, dtype=hidden.dtype, device=device)
    grad_hidden = torch.zeros(n, width, device=device) if needed[0] else None
    grad_weight = None
    if needed[1]:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = torch.empty_like(bias) if needed[2] else None
    weight_sums = torch.empty(chunk_v * tiles.v, width, device=device) if needed[1] else None
    for v0 in range(0, columns, chunk_v):
        v1 = min(columns, v0 + chunk_v)
        rows_v = slice(v0 * tiles.v, min(v, v1 * tiles.v))
        size_v = rows_v.stop - rows_v.start
        weight_sum = None if weight_sums is None else weight_sums[:size_v]
        bias_sum = torch.zeros(chunk_v * tiles.v, device=device) if needed[2] else None
        for n0 in range(0, blocks, chunk_n):
            n1 = min(blocks, n0 + chunk_n)
            rows_n = slice(n0 * tiles.n, min(n, n1 * tiles.n))
            size_n = rows_n.stop - rows_n.start
            parts = torch.zeros(n1 - n0, chunk_v * tiles.v, device=device) if needed[2] else None
            gradient_kernel[(n1 - n0, 2 * (v1 - v0))](
                *head.pointers,
                *saved,
                *upstream,
                live,
                dz,
                parts,
                first_block=n0,
                first_tile=v0,
                stride_live=columns,
                stride_dz=dz.stride(0),
                log_rho=options.log_rho,
                PRUNED=options.prune is not None,
                SPARSE=live is not None,
                BIAS_GRAD=needed[2],
                **numbers,
            )
            here = None if live is None else live[n0:n1, v0:v1]
            if needed[0]:
                _multiply(
                    dz, weight[rows_v], grad_hidden[rows_n], size_v, here, tiles, (tiles.n, tiles.v)
                )
            if needed[1]:
                there = None if here is None else here.t()
                _multiply(
                    dz.t(),
                    hidden[rows_n],
                    weight_sum,
                    size_n,
                    there,
                    tiles,
                    (tiles.v, tiles.n),
                    rows=y[rows_n],
                    accumulate=n0 > 0,
                )
            if needed[2]:
                bias_sum += parts.sum(0)
        if needed[1]:
            grad_weight[rows_v] = weight_sum
        if needed[2]:
            grad_bias[rows_v] = bias_sum[:size_v]
    if grad_hidden is not None:  # 0 times a weight of NaN is NaN
        grad_hidden = grad_hidden.masked_fill_((y == IGNORED)[:, None], 0).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def _multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    k: int,
    live: Tensor | None,
    tiles: Tiles,
    block: tuple[int, int],
    *,
    rows: Tensor | None = None,
    accumulate: bool = True,
) -> None:
    """out [M, D] (+)= A [M, K] @ B [K, D]; live [blocks of M, blocks of K]; `block` their sizes."""
    m, width = out.shape
    listed = counts = None
    if live is not None:
        counts = live.sum(1, dtype=torch.int32)
        order = live.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        listed = order.to(torch.int32).contiguous()
    widest = 128 if a.element_size() == 2 else 64
    block_d = min(widest, max(16, triton.next_power_of_2(width)))
    product_kernel[(triton.cdiv(m, block[0]), triton.cdiv(width, block_d))](
        a,
        b,
        out,
        rows,
        listed,
        counts,
        M=m,
        K=k,
        D=width,
        stride_am=a.stride(0),
        stride_ak=a.stride(1),
        stride_bk=b.stride(0),
        stride_tiles=0 if listed is None else listed.stride(0),
        ACCUMULATE=accumulate,
        SPARSE=live is not None,
        MASK_ROWS=rows is not None,
        BLOCK_M=block[0],
        TILE_K=block[1],
        BLOCK_K=min(tiles.d, block[1]),
        BLOCK_D=block_d,
        **matmul_options(a.dtype, tiles),
    )
