"""Kernels of token_stats.py, one program a row (backward: a block of a row), and what others share.

Shapes: N tokens, V vocabulary entries. Labels are local: -1 is an ignored row, -2 a label that lies
in another shard, or nowhere.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

from ._launch import jit, tl
from ._transform import transformed, transformed_gradient


@jit
def _whole_sums(row, V, inv_temperature, softcap, S1_ONLY, SOFTCAP, BLOCK_V: tl.constexpr):
    # Online over blocks, with m the running maximum and d = x - m:
    # s1 = sum e^d, s2 = sum e^(2d), sd = sum d e^d; a new m moves every d by the same amount.
    # m starts at the lowest finite number: at -inf, a row that begins with masked entries is NaN.
    m = -3.4028234663852886e38
    s1 = 0.0
    s2 = 0.0
    sd = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        x = transformed(z, inv_temperature, softcap, SOFTCAP)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        keep = tl.exp(m - m_new)
        d = x - m_new
        e = tl.exp(d)
        if not S1_ONLY:
            moved = tl.where(keep > 0, m - m_new, 0.0)  # else 0 * -inf
            sd = keep * (sd + moved * s1)
            sd += tl.sum(tl.where(e > 0, d, 0.0) * e, axis=0)  # d e^d -> 0 at d = -inf
            s2 = s2 * keep * keep + tl.sum(e * e, axis=0)
        s1 = s1 * keep + tl.sum(e, axis=0)
        m = m_new
    return m, s1, s2, sd


@jit
def _kept_sums(row, V, y, m, inv_temperature, softcap, log_rho, SOFTCAP, BLOCK_V: tl.constexpr):
    s1 = 0.0
    s2 = 0.0
    sd = 0.0
    count = 0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        x = transformed(z, inv_temperature, softcap, SOFTCAP)
        # "outside" by <, not "inside" by >=, so that a NaN stays in the sums
        outside = (x < m + log_rho) & (v != y)
        d = tl.where(outside, -float("inf"), x - m)
        e = tl.exp(d)
        s1 += tl.sum(e, axis=0)
        s2 += tl.sum(e * e, axis=0)
        sd += tl.sum(tl.where(e > 0, d, 0.0) * e, axis=0)
        count += tl.sum(tl.where(outside, 0, 1), axis=0)
    return s1, s2, sd, count


@jit
def forward_kernel(
    z_ptr,
    y_ptr,
    logp_ptr,
    entropy_ptr,
    sum_p2_ptr,
    lse_ptr,
    max_ptr,
    log_sum_ptr,
    kept_mass_ptr,
    count_ptr,
    inside_ptr,
    broken_ptr,
    stride_n,
    V,
    inv_temperature,
    softcap,
    log_rho,
    PRUNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # int64: n * stride_n passes 2^31 at N*V > 2e9
    row = z_ptr + n * stride_n
    y = tl.load(y_ptr + n)
    if y == -1:  # ignored
        return  # the outputs already hold what an ignored row returns

    m, s1, s2, sd = _whole_sums(row, V, inv_temperature, softcap, PRUNED, SOFTCAP, BLOCK_V)
    # NaN in the sums of a row with NaN or +inf, 0 without a finite entry; a label elsewhere is -2
    nan = float("nan")
    sound = (s1 > 0) & (y >= 0)
    log_sum = tl.where(sound, tl.log(s1), nan)
    m = tl.where(sound, m, nan)
    tl.store(broken_ptr + n, (sound == 0))
    tl.store(lse_ptr + n, m + log_sum)
    tl.store(max_ptr + n, m)
    tl.store(log_sum_ptr + n, log_sum)

    z_y = tl.load(row + y, mask=y >= 0, other=nan).to(tl.float32)
    x_y = transformed(z_y, inv_temperature, softcap, SOFTCAP)
    log_q_sum = log_sum
    if PRUNED:
        s1, s2, sd, count = _kept_sums(
            row, V, y, m, inv_temperature, softcap, log_rho, SOFTCAP, BLOCK_V
        )
        log_q_sum = tl.log(s1)
        kept_mass = log_q_sum - log_sum
        kept_mass = tl.where(sound & (kept_mass > 0), 0.0, kept_mass)
        tl.store(kept_mass_ptr + n, kept_mass)
        tl.store(count_ptr + n, tl.where(sound, count, 0))
        tl.store(inside_ptr + n, x_y >= m + log_rho)
    tl.store(logp_ptr + n, (x_y - m) - log_q_sum)
    tl.store(entropy_ptr + n, log_q_sum - sd / s1 + (m - m))  # NaN of a broken row's m
    tl.store(sum_p2_ptr + n, s2 / (s1 * s1) + (m - m))


@jit
def whole_sums_kernel(
    z_ptr,
    y_ptr,
    sums_ptr,
    stride_n,
    N,
    V,
    inv_temperature,
    softcap,
    PRUNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = z_ptr + n * stride_n
    y = tl.load(y_ptr + n)
    if y == -1:
        return
    m, s1, s2, sd = _whole_sums(row, V, inv_temperature, softcap, PRUNED, SOFTCAP, BLOCK_V)
    z_y = tl.load(row + y, mask=y >= 0, other=0.0).to(tl.float32)
    out = sums_ptr + n  # sums: [6, N]
    tl.store(out, m)
    tl.store(out + N, s1)
    tl.store(out + 2 * N, s2)
    tl.store(out + 3 * N, sd)
    tl.store(out + 4 * N, transformed(z_y, inv_temperature, softcap, SOFTCAP))
    tl.store(out + 5 * N, tl.where(y >= 0, 1.0, 0.0))


@jit
def kept_sums_kernel(
    z_ptr,
    y_ptr,
    max_ptr,
    sums_ptr,
    stride_n,
    N,
    V,
    inv_temperature,
    softcap,
    log_rho,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = z_ptr + n * stride_n
    y = tl.load(y_ptr + n)
    if y == -1:
        return
    m = tl.load(max_ptr + n)
    s1, s2, sd, count = _kept_sums(
        row, V, y, m, inv_temperature, softcap, log_rho, SOFTCAP, BLOCK_V
    )
    out = sums_ptr + n  # sums: [4, N]
    tl.store(out, s1)
    tl.store(out + N, s2)
    tl.store(out + 2 * N, sd)
    tl.store(out + 3 * N, count.to(tl.float32))


@jit
def logit_gradient(
    x,
    is_label,
    m,
    log_sum,
    kept_mass,
    entropy,
    sum_p2,
    g_logp,
    g_entropy,
    g_sum_p2,
    g_lse,
    g_kept_mass,
    log_rho,
    PRUNED: tl.constexpr,
):
    """Gradient for x of every output; entries and rows broadcast against each other."""
    d = x - m
    log_q = d - log_sum
    if PRUNED:
        log_q -= kept_mass
    q = tl.exp(log_q)
    log_q = tl.where(q > 0, log_q, 0.0)  # q ln q -> 0 at q = 0
    grad = tl.where(is_label, g_logp, 0.0) - g_logp * q
    grad += 2 * g_sum_p2 * q * (q - sum_p2) - g_entropy * q * (log_q + entropy)
    if PRUNED:
        outside = (x < m + log_rho) & (is_label == 0)
        grad = tl.where(outside, 0.0, grad + g_kept_mass * q)
        grad += (g_lse - g_kept_mass) * tl.exp(d - log_sum)
    else:
        grad += g_lse * q
    return grad


@jit
def backward_kernel(
    z_ptr,
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
    grad_z_ptr,
    stride_n,
    stride_grad_n,
    V,
    inv_temperature,
    softcap,
    log_rho,
    PRUNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    y = tl.load(y_ptr + n)
    live_V = tl.where(y == -1, 0, V)  # nothing of an ignored row is read
    z = tl.load(z_ptr + n * stride_n + v, mask=v < live_V, other=-float("inf")).to(tl.float32)
    x = transformed(z, inv_temperature, softcap, SOFTCAP)
    kept_mass = 0.0
    g_kept_mass = 0.0
    if PRUNED:
        kept_mass = tl.load(kept_mass_ptr + n)
        g_kept_mass = tl.load(grad_kept_mass_ptr + n)
    grad = logit_gradient(
        x,
        v == y,
        tl.load(max_ptr + n),
        tl.load(log_sum_ptr + n),
        kept_mass,
        tl.load(entropy_ptr + n),
        tl.load(sum_p2_ptr + n),
        tl.load(grad_logp_ptr + n),
        tl.load(grad_entropy_ptr + n),
        tl.load(grad_sum_p2_ptr + n),
        tl.load(grad_lse_ptr + n),
        g_kept_mass,
        log_rho,
        PRUNED,
    )
    grad = transformed_gradient(grad, x, inv_temperature, softcap, SOFTCAP)
    tl.store(grad_z_ptr + n * stride_grad_n + v, grad, mask=v < V)
