"""Kernels and launches of linear_token_stats.py: tiles of logits that never leave the registers.

Shapes: N tokens, V vocabulary entries, D width. A tile is `Tiles.n` tokens by `Tiles.v` entries.
Logits are always recomputed by the same code, so every sweep sees the same numbers.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import jit, tl, triton
from ._token_sums import IGNORED, KeptSums, Options, WholeSums, merge_whole
from ._transform import transformed, transformed_gradient
from .token_stats import logit_gradient

# A tile is left out of a sweep if its bound is this much below the threshold (nats): the bound's
# maximum and label are computed in another order than the tile.
SLACK = 0.01
# Backward goes chunk by chunk: so many tokens at once, and as many entries as the scratch holds, but
# no more than this share of the vocabulary.
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


@jit
def _tile(
    h_ptr,
    w_ptr,
    b_ptr,
    n,
    v,
    N,
    V,
    D,
    stride_hn,
    stride_wv,
    inv_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x [BLOCK_N, BLOCK_V] fp32, -inf beyond V; rows beyond N repeat row 0."""
    d = tl.arange(0, BLOCK_D)
    h_ptrs = h_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * stride_hn + d[None, :]
    w_ptrs = w_ptr + tl.where(v < V, v, 0).to(tl.int64)[None, :] * stride_wv + d[:, None]
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        h = tl.load(h_ptrs, mask=d[None, :] < D - start, other=0.0)
        w = tl.load(w_ptrs, mask=d[:, None] < D - start, other=0.0)
        if UPCAST:  # the interpreter has no bf16 arithmetic
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision=PRECISION)
        h_ptrs += BLOCK_D
        w_ptrs += BLOCK_D
    if BIAS:
        z += tl.load(b_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    x = transformed(z, inv_temperature, softcap, SOFTCAP)
    return tl.where(v[None, :] < V, x, -float("inf"))


@jit
def _label_kernel(
    h_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    label_ptr,
    D,
    stride_hn,
    stride_wv,
    inv_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + n)
    if y < 0:
        return
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        h = tl.load(h_ptr + n * stride_hn + start + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + y * stride_wv + start + d, mask=inside, other=0.0).to(tl.float32)
        total += h * w
    z = tl.sum(total, axis=0)
    if BIAS:
        z += tl.load(b_ptr + y).to(tl.float32)
    tl.store(label_ptr + n, transformed(z, inv_temperature, softcap, SOFTCAP))


@jit
def _whole_kernel(
    h_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    floor_ptr,
    parts_ptr,
    bound_ptr,
    N,
    V,
    D,
    stride_hn,
    stride_wv,
    inv_temperature,
    softcap,
    splits,
    S1_ONLY: tl.constexpr,
    TRACK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The split is the fast index: programs that run at once share few rows of `hidden`, which stay
    # in L2, and read different columns of `weight`.
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(y_ptr + n, mask=n < N, other=-1)
    live_row = y != -1
    if tl.max(live_row.to(tl.int32), axis=0) == 0:
        return  # the parts already hold what no entry gives, the bounds what skips a tile

    blocks_v = tl.cdiv(V, BLOCK_V)
    if TRACK:
        floor = tl.load(floor_ptr + n, mask=n < N, other=-float("inf"))
    m = tl.full((BLOCK_N,), -3.4028234663852886e38, tl.float32)
    s1 = tl.zeros((BLOCK_N,), tl.float32)
    s2 = tl.zeros((BLOCK_N,), tl.float32)
    sd = tl.zeros((BLOCK_N,), tl.float32)
    label = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(split * blocks_v // splits, (split + 1) * blocks_v // splits):
        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        x = _tile(
            h_ptr,
            w_ptr,
            b_ptr,
            n,
            v,
            N,
            V,
            D,
            stride_hn,
            stride_wv,
            inv_temperature,
            softcap,
            SOFTCAP,
            BIAS,
            UPCAST,
            PRECISION,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
        here = (y >= tile * BLOCK_V) & (y < (tile + 1) * BLOCK_V)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            label += tl.sum(tl.where(v[None, :] == y[:, None], x, 0.0), axis=1)
        row_max = tl.max(x, axis=1)
        m_new = tl.maximum(m, row_max)
        keep = tl.exp(m - m_new)
        d = x - m_new[:, None]
        e = tl.exp(d)
        if not S1_ONLY:
            moved = tl.where(keep > 0, m - m_new, 0.0)  # else 0 * -inf
            sd = keep * (sd + moved * s1)
            sd += tl.sum(tl.where(e > 0, d, 0.0) * e, axis=1)
            s2 = s2 * keep * keep + tl.sum(e * e, axis=1)
        s1 = s1 * keep + tl.sum(e, axis=1)
        m = m_new
        if TRACK:
            # Nats by which the tile's largest entry can exceed what is known of the row so far:
            # its maximum (pruning) or its logsumexp (threshold), or the label's logit if larger.
            level = m if S1_ONLY else m + tl.log(s1)
            # A broken row bounds nothing: its NaN must reach the gradient.
            excess = row_max - tl.maximum(level, floor)
            excess = tl.where(excess == excess, excess, float("inf"))
            excess = tl.where(live_row, excess, -float("inf"))
            tl.store(bound_ptr + block * blocks_v + tile, tl.max(excess, axis=0))
    out = parts_ptr + split.to(tl.int64) * (5 * N) + n  # parts: [splits, 5, N]
    write = live_row & (n < N)
    tl.store(out, m, mask=write)
    tl.store(out + N, s1, mask=write)
    tl.store(out + 2 * N, s2, mask=write)
    tl.store(out + 3 * N, sd, mask=write)
    tl.store(out + 4 * N, label, mask=write)


@jit
def _kept_kernel(
    h_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    max_ptr,
    bound_ptr,
    parts_ptr,
    live_ptr,
    N,
    V,
    D,
    stride_hn,
    stride_wv,
    inv_temperature,
    softcap,
    log_rho,
    slack,
    splits,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(y_ptr + n, mask=n < N, other=-1)
    live_row = y != -1
    blocks_v = tl.cdiv(V, TILE_V)
    m = tl.load(max_ptr + n, mask=n < N, other=0.0)
    s1 = tl.zeros((BLOCK_N,), tl.float32)
    s2 = tl.zeros((BLOCK_N,), tl.float32)
    sd = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.int32)
    # A tile in parts of BLOCK_V: with the mask of K a whole one does not fit the registers.
    per_tile: tl.constexpr = TILE_V // BLOCK_V
    first = split * blocks_v // splits
    last = (split + 1) * blocks_v // splits
    for part in range(first * per_tile, last * per_tile):
        tile = part // per_tile
        v = part * BLOCK_V + tl.arange(0, BLOCK_V)
        here = (y >= part * BLOCK_V) & (y < (part + 1) * BLOCK_V)
        bound = tl.load(bound_ptr + block * blocks_v + tile)
        if (bound >= log_rho - slack) | (tl.max(here.to(tl.int32), axis=0) > 0):
            x = _tile(
                h_ptr,
                w_ptr,
                b_ptr,
                n,
                v,
                N,
                V,
                D,
                stride_hn,
                stride_wv,
                inv_temperature,
                softcap,
                SOFTCAP,
                BIAS,
                UPCAST,
                PRECISION,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
            )
            # "outside" by <, not "inside" by >=, so that a NaN stays in the sums
            outside = (x < (m + log_rho)[:, None]) & (v[None, :] != y[:, None])
            kept = (outside == 0) & live_row[:, None]
            d = tl.where(kept, x - m[:, None], -float("inf"))
            e = tl.exp(d)
            s1 += tl.sum(e, axis=1)
            s2 += tl.sum(e * e, axis=1)
            sd += tl.sum(tl.where(e > 0, d, 0.0) * e, axis=1)
            row_count = tl.sum(kept.to(tl.int32), axis=1)
            count += row_count
            any_kept = tl.max(row_count, axis=0) > 0
            tl.store(live_ptr + block * blocks_v + tile, any_kept, mask=any_kept)
    out = parts_ptr + split.to(tl.int64) * (4 * N) + n  # parts: [splits, 4, N]
    write = live_row & (n < N)
    tl.store(out, s1, mask=write)
    tl.store(out + N, s2, mask=write)
    tl.store(out + 2 * N, sd, mask=write)
    tl.store(out + 3 * N, count.to(tl.float32), mask=write)


@jit
def _gradient_kernel(
    h_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    max_ptr,
    log_sum_ptr,
    kept_mass_ptr,
    entropy_ptr,
    sum_p2_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    grad_sum_p2_ptr,
    grad_lse_ptr,
    grad_kept_mass_ptr,
    live_ptr,
    dz_ptr,
    bias_parts_ptr,
    first_block,
    first_tile,
    N,
    V,
    D,
    stride_hn,
    stride_wv,
    stride_live,
    stride_dz,
    inv_temperature,
    softcap,
    log_rho,
    PRUNED: tl.constexpr,
    SPARSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dz of the live tiles of a chunk, which begins at `first_block` and `first_tile`."""
    block = first_block + tl.program_id(0)
    part = first_tile * (TILE_V // BLOCK_V) + tl.program_id(1)
    if SPARSE:  # noqa: SIM102 (by itself: it is a constexpr, and without it live_ptr is None)
        if tl.load(live_ptr + block * stride_live + part // (TILE_V // BLOCK_V)) == 0:
            return
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    in_n = n < N
    y = tl.load(y_ptr + n, mask=in_n, other=-1)
    x = _tile(
        h_ptr,
        w_ptr,
        b_ptr,
        n,
        v,
        N,
        V,
        D,
        stride_hn,
        stride_wv,
        inv_temperature,
        softcap,
        SOFTCAP,
        BIAS,
        UPCAST,
        PRECISION,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
    )
    x = tl.where((y != -1)[:, None], x, -float("inf"))  # an ignored row gets gradient 0
    kept_mass = 0.0
    g_kept_mass = 0.0
    if PRUNED:
        kept_mass = tl.load(kept_mass_ptr + n, mask=in_n, other=0.0)[:, None]
        g_kept_mass = tl.load(grad_kept_mass_ptr + n, mask=in_n, other=0.0)[:, None]
    dx = logit_gradient(
        x,
        v[None, :] == y[:, None],
        tl.load(max_ptr + n, mask=in_n, other=0.0)[:, None],
        tl.load(log_sum_ptr + n, mask=in_n, other=0.0)[:, None],
        kept_mass,
        tl.load(entropy_ptr + n, mask=in_n, other=0.0)[:, None],
        tl.load(sum_p2_ptr + n, mask=in_n, other=0.0)[:, None],
        tl.load(grad_logp_ptr + n, mask=in_n, other=0.0)[:, None],
        tl.load(grad_entropy_ptr + n, mask=in_n, other=0.0)[:, None],
        tl.load(grad_sum_p2_ptr + n, mask=in_n, other=0.0)[:, None],
        tl.load(grad_lse_ptr + n, mask=in_n, other=0.0)[:, None],
        g_kept_mass,
        log_rho,
        PRUNED,
    )
    dz = transformed_gradient(dx, x, inv_temperature, softcap, SOFTCAP)
    local_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    # the whole tile: the scratch is a whole number of tiles
    tl.store(dz_ptr + local_n.to(tl.int64)[:, None] * stride_dz + local_v[None, :], dz)
    if BIAS_GRAD:
        tl.store(bias_parts_ptr + tl.program_id(0) * stride_dz + local_v, tl.sum(dz, axis=0))


@jit
def _product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    row_ptr,
    tiles_ptr,
    counts_ptr,
    M,
    K,
    D,
    stride_am,
    stride_ak,
    stride_bk,
    stride_tiles,
    ACCUMULATE: tl.constexpr,
    SPARSE: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [M, D] fp32 (+)= A [M, K] @ B [K, D], over the live tiles of A's row block only.

    tiles_ptr lists them in ascending order, counts_ptr says how many. MASK_ROWS: rows of B whose
    label is "ignored" are read as 0, whatever they hold.
    """
    block = tl.program_id(0)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if SPARSE:  # noqa: SIM108
        steps = tl.load(counts_ptr + block) * (TILE_K // BLOCK_K)
    else:
        steps = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for step in range(0, steps):
        start = step * BLOCK_K
        if SPARSE:
            tile = tl.load(tiles_ptr + block * stride_tiles + step // (TILE_K // BLOCK_K))
            start = tile * TILE_K + (step % (TILE_K // BLOCK_K)) * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        read = k < K
        a = tl.load(
            a_ptr + m.to(tl.int64)[:, None] * stride_am + k.to(tl.int64)[None, :] * stride_ak,
            mask=(m[:, None] < M) & read[None, :],
            other=0.0,
        )
        if MASK_ROWS:
            read &= tl.load(row_ptr + k, mask=read, other=-1) != -1
        b = tl.load(
            b_ptr + k.to(tl.int64)[:, None] * stride_bk + d[None, :],
            mask=read[:, None] & (d[None, :] < D),
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    out = out_ptr + m.to(tl.int64)[:, None] * D + d[None, :]
    inside = (m[:, None] < M) & (d[None, :] < D)
    if ACCUMULATE:
        acc += tl.load(out, mask=inside, other=0.0)
    tl.store(out, acc, mask=inside)


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
    return min(tiles, max(12, triton.cdiv(256, blocks)))


def _label_floor(head: Head) -> Tensor:
    """[N] a number that the label's x surely reaches, -inf where the label is elsewhere."""
    floor = torch.full((len(head.y),), -torch.inf, device=head.hidden.device)
    numbers = head.numbers
    names = ("D", "stride_hn", "stride_wv", "inv_temperature", "softcap", "SOFTCAP", "BIAS")
    block = min(1024, triton.next_power_of_2(head.hidden.shape[1]))
    _label_kernel[(len(head.y),)](
        *head.pointers, floor, **{name: numbers[name] for name in names}, BLOCK_D=block
    )
    return floor - 1e-4 * floor.abs().nan_to_num(posinf=0)


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
    _whole_kernel[(blocks * splits,)](
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
    _kept_kernel[(blocks * splits,)](
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
    chunk_v = max(1, min(SCRATCH_BYTES // tile_bytes, math.ceil(columns * CHUNK_SHARE)))
    dz = torch.empty(chunk_n * tiles.n, chunk_v * tiles.v, dtype=hidden.dtype, device=device)
    grad_hidden = torch.zeros(n, width, device=device) if needed[0] else None
    grad_weight = None
    if needed[1]:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = torch.empty_like(bias) if needed[2] else None
    for v0 in range(0, columns, chunk_v):
        v1 = min(columns, v0 + chunk_v)
        rows_v = slice(v0 * tiles.v, min(v, v1 * tiles.v))
        size_v = rows_v.stop - rows_v.start
        weight_sum = torch.empty(size_v, width, device=device) if needed[1] else None
        bias_sum = torch.zeros(chunk_v * tiles.v, device=device) if needed[2] else None
        for n0 in range(0, blocks, chunk_n):
            n1 = min(blocks, n0 + chunk_n)
            rows_n = slice(n0 * tiles.n, min(n, n1 * tiles.n))
            size_n = rows_n.stop - rows_n.start
            parts = torch.zeros(n1 - n0, chunk_v * tiles.v, device=device) if needed[2] else None
            _gradient_kernel[(n1 - n0, 2 * (v1 - v0))](
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
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


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
    _product_kernel[(triton.cdiv(m, block[0]), triton.cdiv(width, block_d))](
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
