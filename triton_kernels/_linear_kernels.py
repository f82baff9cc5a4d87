"""Kernels of linear_token_stats.py: tiles of logits that never leave the registers.

Shapes: N tokens, V vocabulary entries, D width. A program computes tiles of BLOCK_N tokens by
BLOCK_V entries; every kernel by the same code, so that all see the same numbers.
_linear_token_stats_triton.py launches them.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

from ._launch import jit, tl
from ._token_stats_kernels import logit_gradient
from ._transform import transformed, transformed_gradient


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
def label_kernel(
    h_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    floor_ptr,
    D,
    stride_hn,
    stride_wv,
    inv_temperature,
    softcap,
    rounding,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x of the labels, less what the order of its sum and that of a tile can differ by."""
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + n)
    if y < 0:
        return
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    magnitude = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        h = tl.load(h_ptr + n * stride_hn + start + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + y * stride_wv + start + d, mask=inside, other=0.0).to(tl.float32)
        total += h * w
        magnitude += tl.abs(h * w)
    z = tl.sum(total, axis=0)
    if BIAS:
        z += tl.load(b_ptr + y).to(tl.float32)
    x = transformed(z, inv_temperature, softcap, SOFTCAP)
    tl.store(floor_ptr + n, x - rounding * tl.sum(magnitude, axis=0) * inv_temperature)


@jit
def whole_kernel(
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
            # no axis: a second reduction over one fails on sm_100 in Triton 3.6
            tl.store(bound_ptr + block * blocks_v + tile, tl.max(excess))
    out = parts_ptr + split.to(tl.int64) * (5 * N) + n  # parts: [splits, 5, N]
    write = live_row & (n < N)
    tl.store(out, m, mask=write)
    tl.store(out + N, s1, mask=write)
    tl.store(out + 2 * N, s2, mask=write)
    tl.store(out + 3 * N, sd, mask=write)
    tl.store(out + 4 * N, label, mask=write)


@jit
def kept_kernel(
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
            any_kept = tl.max(row_count) > 0  # no axis, as above
            tl.store(live_ptr + block * blocks_v + tile, any_kept, mask=any_kept)
    out = parts_ptr + split.to(tl.int64) * (4 * N) + n  # parts: [splits, 4, N]
    write = live_row & (n < N)
    tl.store(out, s1, mask=write)
    tl.store(out + N, s2, mask=write)
    tl.store(out + 2 * N, sd, mask=write)
    tl.store(out + 3 * N, count.to(tl.float32), mask=write)


@jit
def gradient_kernel(
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
def product_kernel(
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
