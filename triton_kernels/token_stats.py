"""Log-probability, entropy and collision probability of sampled tokens in one read of the logits.

Shapes: N tokens, V vocabulary entries. x = logits / temperature, y = label,
S = {v : x_v >= max x + ln rho} the safe set (arXiv 2512.23087), K = S u {y} (without pruning all
of V), p = softmax(x) over V, q = p / sum_K p over K, 0 outside.

    logp          = ln q_y                     nats, <= 0      d/dx = onehot(y) - q
    entropy       = -sum_K q ln q              nats, 0..ln |K| d/dx = -q (ln q + entropy)
    sum_p2        = sum_K q^2                  (0, 1]          d/dx = 2 q (q - sum_p2)
    logsumexp     = ln sum_V e^x               nats            d/dx = p
    max_logit     = max_V x                    nats            no gradient
    log_kept_mass = ln sum_K p                 nats, <= 0      d/dx = q - p
    safe_count    = |K|                        tokens
    in_safe_set   = y in S

S is a constant in these derivatives: the threshold moves with max x but carries no gradient.
`TokenStats.logit_grad_energy` (of q) is the proxy of the Optimal Token Baseline, arXiv 2602.07078.

Cost: 1 read of [N, V] forward (with pruning a second one, of a row that was just read, so from L2);
1 read and 1 write backward. Of size [N, V] nothing is kept but the logits; 6 numbers a token are.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import jit, runs_kernel, tl, triton
from ._token_stats_cpu import token_stats_chunked

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_BLOCK_V = 4096
_NUM_WARPS = 8  # 16 entries of a block per thread


class TokenStats(NamedTuple):
    """One number per token, each of shape [N]; the module's docstring has the formulas."""

    logp: Tensor
    entropy: Tensor
    sum_p2: Tensor
    logsumexp: Tensor
    max_logit: Tensor
    log_kept_mass: Tensor | None = None
    safe_count: Tensor | None = None
    in_safe_set: Tensor | None = None

    @property
    def logit_grad_energy(self) -> Tensor:
        """||d logp / d x||^2, in [0, 2), detached. Rounding can push it below zero: clamped."""
        return (1 - 2 * self.logp.detach().exp() + self.sum_p2.detach()).clamp_min(0)


def token_stats_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    prune: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """What `token_stats` computes, in plain differentiable PyTorch and in the dtype of `logits`."""
    ignored = labels == ignore_index
    y = labels.masked_fill(ignored, 0)[:, None]
    x = logits.masked_fill(ignored[:, None], 0) / temperature
    max_logit = x.detach().amax(-1)
    lse = x.logsumexp(-1)

    outside = torch.zeros_like(x, dtype=torch.bool)
    if prune is not None:
        outside = x < (max_logit + math.log(prune))[:, None]
    in_safe_set = ~outside.gather(-1, y).squeeze(-1)
    outside = outside.scatter(-1, y, False)

    # -inf entries are filled with what they hold, so that no gradient reaches them
    kept = x.masked_fill(outside | (x == -math.inf), -math.inf)
    log_q = kept.log_softmax(-1)
    q = log_q.exp()
    outputs = [
        log_q.gather(-1, y).squeeze(-1),
        -(q * log_q.masked_fill(q == 0, 0)).sum(-1),
        q.square().sum(-1),
        lse,
        max_logit,
    ]
    if prune is not None:
        outputs += [(kept.logsumexp(-1) - lse).clamp_max(0), (~outside).sum(-1)]
    outputs = [o.masked_fill(ignored, 0) for o in outputs]
    return TokenStats(*outputs, *([in_safe_set | ignored] if prune is not None else []))


@jit
def _forward_kernel(
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
    stride_n,
    V,
    ignore_index,
    inv_temperature,
    log_rho,
    PRUNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # int64: n * stride_n passes 2^31 at N*V > 2e9
    row = z_ptr + n * stride_n
    y = tl.load(y_ptr + n)
    if y == ignore_index:
        return  # the outputs already hold what an ignored row returns

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
        x = z * inv_temperature
        m_new = tl.maximum(m, tl.max(x, axis=0))
        keep = tl.exp(m - m_new)
        d = x - m_new
        e = tl.exp(d)
        if not PRUNED:
            moved = tl.where(keep > 0, m - m_new, 0.0)  # else 0 * -inf
            sd = keep * (sd + moved * s1)
            sd += tl.sum(tl.where(e > 0, d, 0.0) * e, axis=0)  # d e^d -> 0 at d = -inf
            s2 = s2 * keep * keep + tl.sum(e * e, axis=0)
        s1 = s1 * keep + tl.sum(e, axis=0)
        m = m_new
    log_sum = tl.log(s1)
    tl.store(lse_ptr + n, m + log_sum)
    tl.store(max_ptr + n, m)
    tl.store(log_sum_ptr + n, log_sum)

    # An index out of range must not be read; the host cannot check it without a synchronisation.
    z_y = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
    x_y = z_y * inv_temperature
    log_q_sum = log_sum
    if PRUNED:
        s1 = 0.0
        count = 0
        threshold = m + log_rho
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
            x = z * inv_temperature
            # "outside" by <, not "inside" by >=, so that a NaN stays in the sums
            outside = (x < threshold) & (v != y)
            d = tl.where(outside, -float("inf"), x - m)
            e = tl.exp(d)
            s1 += tl.sum(e, axis=0)
            s2 += tl.sum(e * e, axis=0)
            sd += tl.sum(tl.where(e > 0, d, 0.0) * e, axis=0)
            count += tl.sum(tl.where(outside, 0, 1), axis=0)
        log_q_sum = tl.log(s1)
        tl.store(kept_mass_ptr + n, tl.minimum(log_q_sum - log_sum, 0.0))
        tl.store(count_ptr + n, count)
        tl.store(inside_ptr + n, x_y >= threshold)
    tl.store(logp_ptr + n, (x_y - m) - log_q_sum)
    tl.store(entropy_ptr + n, log_q_sum - sd / s1)
    tl.store(sum_p2_ptr + n, s2 / (s1 * s1))


@jit
def _backward_kernel(
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
    V,
    ignore_index,
    inv_temperature,
    log_rho,
    PRUNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    y = tl.load(y_ptr + n)
    live_V = tl.where(y == ignore_index, 0, V)  # nothing of an ignored row is read
    z = tl.load(z_ptr + n * stride_n + v, mask=v < live_V, other=-float("inf")).to(tl.float32)
    x = z * inv_temperature
    m = tl.load(max_ptr + n)
    log_sum = tl.load(log_sum_ptr + n)
    entropy = tl.load(entropy_ptr + n)
    sum_p2 = tl.load(sum_p2_ptr + n)
    g_logp = tl.load(grad_logp_ptr + n)
    g_entropy = tl.load(grad_entropy_ptr + n)
    g_sum_p2 = tl.load(grad_sum_p2_ptr + n)
    g_lse = tl.load(grad_lse_ptr + n)

    d = x - m
    log_q = d - log_sum
    if PRUNED:
        log_q -= tl.load(kept_mass_ptr + n)
    q = tl.exp(log_q)
    log_q = tl.where(q > 0, log_q, 0.0)  # q ln q -> 0 at q = 0
    grad = tl.where(v == y, g_logp, 0.0) - g_logp * q
    grad += 2 * g_sum_p2 * q * (q - sum_p2) - g_entropy * q * (log_q + entropy)
    if PRUNED:
        g_kept_mass = tl.load(grad_kept_mass_ptr + n)
        outside = (x < m + log_rho) & (v != y)
        grad = tl.where(outside, 0.0, grad + g_kept_mass * q)
        grad += (g_lse - g_kept_mass) * tl.exp(d - log_sum)
    else:
        grad += g_lse * q
    # x is -inf at masked entries and, by the load above, all over an ignored row
    grad = tl.where(x == -float("inf"), 0.0, grad * inv_temperature)
    tl.store(grad_z_ptr + n * V + v, grad, mask=v < V)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, temperature, prune, ignore_index):
        n, v = logits.shape
        labels = labels.contiguous()
        stats = [torch.zeros(n, device=logits.device) for _ in range(6)]
        pruned_stats = [None, None, None]
        if prune is not None:
            pruned_stats = [
                torch.zeros(n, device=logits.device),
                torch.zeros(n, dtype=torch.int64, device=logits.device),
                torch.ones(n, dtype=torch.bool, device=logits.device),
            ]
        ctx.constants = {
            "stride_n": logits.stride(0),
            "V": v,
            "ignore_index": ignore_index,
            "inv_temperature": 1 / temperature,
            "log_rho": 0.0 if prune is None else math.log(prune),
            "PRUNED": prune is not None,
            "BLOCK_V": min(_MAX_BLOCK_V, triton.next_power_of_2(v)),
            "num_warps": _NUM_WARPS,
        }
        if n:
            with torch.cuda.device_of(logits):
                _forward_kernel[(n,)](logits, labels, *stats, *pruned_stats, **ctx.constants)
        logp, entropy, sum_p2, lse, max_logit, log_sum = stats
        log_kept_mass, safe_count, in_safe_set = pruned_stats
        ctx.save_for_backward(logits, labels, max_logit, log_sum, log_kept_mass, entropy, sum_p2)
        constant = [max_logit, safe_count, in_safe_set]
        ctx.mark_non_differentiable(*(t for t in constant if t is not None))
        return logp, entropy, sum_p2, lse, max_logit, log_kept_mass, safe_count, in_safe_set

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy, g_sum_p2, g_lse, _max, g_kept_mass, _count, _inside):
        logits = ctx.saved_tensors[0]
        n, v = logits.shape
        upstream = (g_logp, g_entropy, g_sum_p2, g_lse, g_kept_mass)
        upstream = (None if g is None else g.contiguous() for g in upstream)
        grad = torch.empty((n, v), dtype=logits.dtype, device=logits.device)
        if n:
            grid = (n, triton.cdiv(v, ctx.constants["BLOCK_V"]))
            with torch.cuda.device_of(logits):
                _backward_kernel[grid](*ctx.saved_tensors, *upstream, grad, **ctx.constants)
        return grad, None, None, None, None


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    prune: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """Statistics of the labels under softmax(logits / temperature), or its pruning to the safe set.

    Differentiable once: logp, entropy, sum_p2, logsumexp, log_kept_mass. With pruning the gradients
    of the first three are exactly 0 outside K = S u {label}; the others are of the whole softmax.
    A -inf logit (a masked entry) adds nothing and gets gradient 0; as the label it has logp = -inf.
    A row with NaN, +inf or no finite logit has NaN in logp, entropy and sum_p2; what its other
    outputs hold is unspecified.

    Args:
        logits: [N, V] fp32, bf16, fp16 or fp64, contiguous along V; rows may be strided.
        labels: [N] int64, in [0, V) or `ignore_index`. Checked on the CPU only; on a GPU that would
            wait for the device, so there a label out of range gets logp = NaN.
        temperature: > 0.
        prune: rho in (0, 1), the smallest kept probability relative to the largest; None keeps all.
        ignore_index: rows with this label return 0 (in_safe_set True) and get gradient 0.

    Returns:
        TokenStats of [N] fp32 tensors (fp64 for fp64 logits), safe_count int64, in_safe_set bool;
        log_kept_mass, safe_count and in_safe_set are None without `prune`.

    Raises:
        ValueError: a shape, dtype, device, layout or label is wrong, or a number is out of range.

    Source: safe set, arXiv 2512.23087 (only its abstract was read; pruned entropy and sum_p2 are
        derived here); logit-gradient proxy, arXiv 2602.07078.
    """
    _check(logits, labels, temperature, prune, ignore_index)
    if logits.dtype == torch.float64:
        return token_stats_reference(
            logits, labels, temperature=temperature, prune=prune, ignore_index=ignore_index
        )
    compute = _TokenStats.apply if runs_kernel(logits) else token_stats_chunked
    return TokenStats(*compute(logits, labels, temperature, prune, ignore_index))


def _check(logits: Tensor, labels: Tensor, temperature, prune, ignore_index) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] == 0:
        found = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected logits [N, V] with V > 0 and labels [N], got {found}")
    if logits.dtype not in _DTYPES:
        raise ValueError(f"expected logits of fp32, bf16, fp16 or fp64, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise ValueError(f"expected labels of int64, got {labels.dtype}")
    if logits.device != labels.device:
        raise ValueError(f"logits are on {logits.device}, labels on {labels.device}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits must be contiguous along V, got strides {logits.stride()}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if prune is not None and not 0 < prune < 1:
        raise ValueError(f"prune must be in (0, 1) or None, got {prune}")
    if labels.is_cpu:
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= logits.shape[1]))
        if wrong.any():
            n = int(wrong.int().argmax())
            raise ValueError(
                f"labels must be in [0, {logits.shape[1]}) or {ignore_index}, "
                f"got labels[{n}] = {int(labels[n])}"
            )
