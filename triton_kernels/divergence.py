"""KL(p || q) of every token between two sets of logits, in one read of each.

Shapes: N tokens, V vocabulary entries. x = softcap(logits) / temperature, u the same of the other
logits, p = softmax(x), q = softmax(u).

    token_kl = sum_v p (ln p - ln q)           nats, >= 0      d/dx = p (ln p - ln q - token_kl)
                                                               d/du = q - p

This is the exact statistic of Trust Region Masking (arXiv 2512.23075) between two engines, and the
dense loss of distillation from a teacher's whole distribution (arXiv 2512.23097).

Sums are relative to the maxima, d = x - max x and c = u - max u, with w = c - d:

    s_p = sum e^d,  s_q = sum e^c,  gap = -sum e^d w,  excess = sum e^d (e^w - 1 - w)
    KL = gap / s_p + ln(s_q / s_p)  =  excess / s_p - (y - ln(1 + y)),   y = s_q / s_p - 1

The first form loses small divergences: its terms are of the size of w, their sum of its square. The
second has only terms of that size, with y = (excess - gap) / s_p. It is taken where excess / s_p
and |gap| / s_p are below 1/2; above, y would lose what it is for.

Cost: 1 read of both [N, V] forward; 1 read of both and 1 write of each wanted gradient backward. Of
size [N, V] nothing is kept but the logits; 5 numbers a token are.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ._launch import jit, runs_kernel, tl, triton
from ._rows import (
    NUM_WARPS,
    block_of,
    check_group,
    check_logits,
    check_mask,
    check_softcap,
    check_temperature,
    live_chunks,
    live_rows,
    load_rows,
    shared_max,
    shared_sum,
    sum_dtype,
)
from ._transform import transform, transform_gradient_, transformed, transformed_gradient

_SMALL = 0.5  # what is below this, of |w|, moves of w and mean gaps, goes through the second form


def token_kl_reference(
    logits: Tensor,
    other_logits: Tensor,
    *,
    temperature: float = 1.0,
    other_temperature: float | None = None,
    softcap: float | None = None,
    other_softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What `token_kl` computes, in plain differentiable PyTorch and in the dtype of `logits`."""
    dead = ~live_rows(logits, mask)[:, None]
    other_temperature = temperature if other_temperature is None else other_temperature
    log_p = transform(logits.masked_fill(dead, 0), temperature, softcap).log_softmax(-1)
    u = transform(other_logits.masked_fill(dead, 0), other_temperature, other_softcap)
    log_q = u.to(log_p.dtype).log_softmax(-1)
    p = log_p.exp()
    ratio = log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0)
    return (p * ratio).sum(-1).masked_fill(dead.squeeze(-1), 0)


@jit
def _excess(w):
    # e^w - 1 - w for |w| < 1/2, without cancellation
    tail = 1 + w * (1 / 6) * (1 + w * (1 / 7) * (1 + w * (1 / 8) * (1 + w * (1 / 9))))
    return w * w * 0.5 * (1 + w * (1 / 3) * (1 + w * (1 / 4) * (1 + w * (1 / 5) * tail)))


@jit
def _sums_kernel(
    z_ptr,
    o_ptr,
    live_ptr,
    sums_ptr,
    stride_n,
    other_stride_n,
    N,
    V,
    inv_temperature,
    other_inv_temperature,
    softcap,
    other_softcap,
    SOFTCAP: tl.constexpr,
    OTHER_SOFTCAP: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # int64: n * stride_n passes 2^31 at N*V > 2e9
    live_V = tl.where(tl.load(live_ptr + n), V, 0)
    # the maxima start at the lowest finite number: at -inf, a row that begins with masked entries
    # is NaN
    top_p = -3.4028234663852886e38
    top_q = -3.4028234663852886e38
    s_p = 0.0
    s_q = 0.0
    gap = 0.0
    excess = 0.0
    for start in range(0, live_V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)
        o = tl.load(o_ptr + n * other_stride_n + v, mask=v < V, other=-float("inf"))
        x = transformed(z, inv_temperature, softcap, SOFTCAP)
        u = transformed(o.to(tl.float32), other_inv_temperature, other_softcap, OTHER_SOFTCAP)
        new_p = tl.maximum(top_p, tl.max(x, axis=0))
        new_q = tl.maximum(top_q, tl.max(u, axis=0))

        # A new maximum of x moves every d, one of u every c: w moves by the difference. Where no
        # mass is kept there is nothing to move, and the difference may be infinite.
        keep_p = tl.exp(top_p - new_p)
        keep_q = tl.exp(top_q - new_q)
        kept = keep_p * s_p
        move = tl.where(kept > 0, (top_q - new_q) - (top_p - new_p), 0.0)  # of w, as far as seen
        small = tl.abs(move) < SMALL
        # e^(w + move) - 1 - (w + move) in terms of e^w - 1 - w
        turn = move + _excess(move)
        near = keep_p * (excess + turn * (excess - gap)) + kept * _excess(move)
        gap = tl.where(kept > 0, keep_p * gap - kept * move, 0.0)
        s_q = keep_q * s_q
        s_p = kept
        excess = tl.where(small & (kept > 0), near, s_q - s_p + gap)

        d = x - new_p
        c = u - new_q
        e = tl.exp(d)
        f = tl.exp(c)
        w = tl.where(e > 0, c - d, 0.0)  # else -inf - -inf
        ew = e * w
        more = tl.where((tl.abs(w) < SMALL) & (e > 0), e * _excess(w), f - e - ew)
        s_p += tl.sum(e, axis=0)
        s_q += tl.sum(f, axis=0)
        gap -= tl.sum(ew, axis=0)
        excess += tl.sum(more, axis=0)
        top_p = new_p
        top_q = new_q
    tl.store(sums_ptr + n, top_p)
    tl.store(sums_ptr + N + n, top_q)
    tl.store(sums_ptr + 2 * N + n, s_p)
    tl.store(sums_ptr + 3 * N + n, s_q)
    tl.store(sums_ptr + 4 * N + n, gap)
    tl.store(sums_ptr + 5 * N + n, excess)


@jit
def _gradient_kernel(
    z_ptr,
    o_ptr,
    live_ptr,
    stats_ptr,
    upstream_ptr,
    grad_z_ptr,
    grad_o_ptr,
    stride_n,
    other_stride_n,
    N,
    V,
    inv_temperature,
    other_inv_temperature,
    softcap,
    other_softcap,
    SOFTCAP: tl.constexpr,
    OTHER_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = v < tl.where(tl.load(live_ptr + n), V, 0)
    z = tl.load(z_ptr + n * stride_n + v, mask=live, other=-float("inf")).to(tl.float32)
    o = tl.load(o_ptr + n * other_stride_n + v, mask=live, other=-float("inf")).to(tl.float32)
    x = transformed(z, inv_temperature, softcap, SOFTCAP)
    u = transformed(o, other_inv_temperature, other_softcap, OTHER_SOFTCAP)
    log_s_p = tl.load(stats_ptr + 2 * N + n)
    log_ratio = tl.load(stats_ptr + 3 * N + n)  # ln(s_q / s_p)
    g = tl.load(upstream_ptr + n)

    d = x - tl.load(stats_ptr + n)
    c = u - tl.load(stats_ptr + N + n)
    p = tl.exp(d - log_s_p)
    if grad_z_ptr is not None:
        kl = tl.load(stats_ptr + 4 * N + n)
        mass = tl.where(kl == float("inf"), 0.0, p)
        ratio = tl.where(mass > 0, (d - c) + (log_ratio - kl), 0.0)
        grad = transformed_gradient(g * mass * ratio, x, inv_temperature, softcap, SOFTCAP)
        tl.store(grad_z_ptr + n * V + v, grad, mask=v < V)
    if grad_o_ptr is not None:
        q = tl.exp(c - log_s_p - log_ratio)
        grad = transformed_gradient(
            g * (q - p), u, other_inv_temperature, other_softcap, OTHER_SOFTCAP
        )
        tl.store(grad_o_ptr + n * V + v, grad, mask=v < V)


def _small_excess(w: Tensor, out: Tensor) -> Tensor:
    """`_excess`, over `out`."""
    out.fill_(1)
    for k in range(9, 2, -1):
        out.mul_(w).div_(k).add_(1)
    return out.mul_(w).mul_(w).mul_(0.5)


class _Scale(NamedTuple):
    temperature: float
    softcap: float | None


class _Sums(NamedTuple):
    """[N] each: the maxima (of a shard or of all) and the four sums relative to them."""

    top_p: Tensor
    top_q: Tensor
    s_p: Tensor
    s_q: Tensor
    gap: Tensor
    excess: Tensor


def _launch_constants(logits: Tensor, other: Tensor, scales: tuple[_Scale, _Scale]) -> dict:
    first, second = scales
    return {
        "stride_n": logits.stride(0),
        "other_stride_n": other.stride(0),
        "N": logits.shape[0],
        "V": logits.shape[1],
        "inv_temperature": 1 / first.temperature,
        "other_inv_temperature": 1 / second.temperature,
        "softcap": first.softcap or 1.0,
        "other_softcap": second.softcap or 1.0,
        "SOFTCAP": first.softcap is not None,
        "OTHER_SOFTCAP": second.softcap is not None,
        "BLOCK_V": block_of(logits.shape[1]),
        "num_warps": NUM_WARPS,
    }


def _kernel_sums(logits: Tensor, other: Tensor, live: Tensor, scales) -> _Sums:
    n = logits.shape[0]
    sums = torch.empty(6, n, device=logits.device)
    if n:
        constants = _launch_constants(logits, other, scales)
        with torch.cuda.device_of(logits):
            _sums_kernel[(n,)](logits, other, live, sums, SMALL=_SMALL, **constants)
    return _Sums(*sums)


def _chunked_sums(logits: Tensor, other: Tensor, live: Tensor, scales) -> _Sums:
    sums = logits.new_zeros(6, logits.shape[0], dtype=sum_dtype(logits))
    for rows in live_chunks(logits, live):
        d, c = (load_rows(z, rows, *scale) for z, scale in zip((logits, other), scales))
        lowest = torch.finfo(d.dtype).min  # -inf - -inf is NaN
        top_p, top_q = (x.amax(-1, keepdim=True).clamp_min(lowest) for x in (d, c))
        e, f = d.sub_(top_p).exp(), c.sub_(top_q).exp()
        s_p, s_q = e.sum(-1), f.sum(-1)
        w = torch.where(e > 0, c.sub_(d), 0)  # else -inf - -inf
        far = f.sub_(e)
        near = _small_excess(w, out=d).mul_(e)
        ew = w * e
        more = torch.where((w.abs() < _SMALL) & (e > 0), near, far.sub_(ew))
        found = (top_p.squeeze(-1), top_q.squeeze(-1), s_p, s_q, -ew.sum(-1), more.sum(-1))
        sums[:, rows] = torch.stack(found)
    return _Sums(*sums)


def _reduce(sums: _Sums, group: ProcessGroup | None) -> _Sums:
    """Sums over all shards: one all-reduce of the maxima, one of the sums. fp64, as moves need."""
    sums = _Sums(*(x.double() for x in sums))
    top_p, top_q = tops = shared_max(torch.stack(sums[:2]), group)
    shift_p, shift_q = sums.top_p - top_p, sums.top_q - top_q
    keep, s_q = shift_p.exp(), shift_q.exp() * sums.s_q
    kept = keep * sums.s_p
    move = torch.where(kept > 0, shift_q - shift_p, 0)  # as in the kernel
    near = keep * (sums.excess + move.expm1() * (sums.excess - sums.gap)) + kept * (
        move.expm1() - move
    )
    gap = torch.where(kept > 0, keep * sums.gap - kept * move, 0)
    excess = torch.where((move.abs() < _SMALL) & (kept > 0), near, s_q - kept + gap)
    return _Sums(*tops, *shared_sum(torch.stack([kept, s_q, gap, excess]), group))


def _finish(sums: _Sums) -> tuple[Tensor, Tensor]:
    """KL and ln(s_q / s_p), fp64; NaN in a row with NaN, +inf or no finite logit."""
    y = (sums.excess - sums.gap) / sums.s_p
    small = (sums.gap.abs() < _SMALL * sums.s_p) & (sums.excess < _SMALL * sums.s_p)
    log_ratio = torch.where(small, y.log1p(), (sums.s_q / sums.s_p).log())
    kl = torch.where(
        small, sums.excess / sums.s_p - (y - y.log1p()), sums.gap / sums.s_p + log_ratio
    )
    mass = sums.s_p * sums.s_q
    return kl.clamp_min(0).masked_fill(~((mass > 0) & mass.isfinite()), math.nan), log_ratio


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, other: Tensor, live: Tensor, scales, group, kernel: bool):
        sums = (_kernel_sums if kernel else _chunked_sums)(logits, other, live, scales)
        sums = _reduce(sums, group)
        kl, log_ratio = _finish(sums)
        kl = kl.masked_fill(~live, 0)
        stats = torch.stack([sums.top_p, sums.top_q, sums.s_p.log(), log_ratio, kl])
        stats = stats.to(sum_dtype(logits))
        ctx.save_for_backward(logits, other, live, stats)
        ctx.scales, ctx.kernel = scales, kernel
        return stats[4].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        saved = ctx.saved_tensors  # once: checkpointing unpacks them for one read only
        logits, other = saved[:2]
        make = torch.empty if ctx.kernel else torch.zeros
        grads = [
            make(z.shape, dtype=z.dtype, device=z.device) if needed else None
            for z, needed in zip((logits, other), ctx.needs_input_grad)
        ]
        if logits.shape[0]:
            fill = _kernel_gradients if ctx.kernel else _chunked_gradients
            fill(*saved, upstream.contiguous(), *grads, ctx.scales)
        return (*grads, None, None, None, None)


def _kernel_gradients(logits, other, live, stats, upstream, grad_z, grad_o, scales) -> None:
    constants = _launch_constants(logits, other, scales)
    grid = (logits.shape[0], triton.cdiv(logits.shape[1], constants["BLOCK_V"]))
    with torch.cuda.device_of(logits):
        _gradient_kernel[grid](logits, other, live, stats, upstream, grad_z, grad_o, **constants)


def _chunked_gradients(logits, other, live, stats, upstream, grad_z, grad_o, scales) -> None:
    for rows in live_chunks(logits, live):
        top_p, top_q, log_s_p, log_ratio, kl = stats[:, rows, None]
        g = upstream[rows, None]
        x, u = (load_rows(z, rows, *scale) for z, scale in zip((logits, other), scales))
        d, c = x - top_p, u - top_q
        p = (d - log_s_p).exp_()
        if grad_o is not None:
            grad = (c - (log_s_p + log_ratio)).exp_().sub_(p).mul_(g)
            grad = torch.where(u == -math.inf, 0, grad)
            grad_o.index_copy_(0, rows, transform_gradient_(grad, u, *scales[1]).to(other.dtype))
        if grad_z is not None:
            ratio = d.sub_(c).add_(log_ratio - kl)
            ratio = torch.where((p > 0) & (kl != math.inf), ratio, 0)
            grad = ratio.mul_(p).mul_(g)
            grad_z.index_copy_(0, rows, transform_gradient_(grad, x, *scales[0]).to(logits.dtype))


def token_kl(
    logits: Tensor,
    other_logits: Tensor,
    *,
    temperature: float = 1.0,
    other_temperature: float | None = None,
    softcap: float | None = None,
    other_softcap: float | None = None,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """KL(p || q) of every token, p = softmax of `logits`, q = softmax of `other_logits`, exactly.

    Differentiable once, in both. Accurate also where p and q nearly agree: what is lost is the
    rounding of differences of logits, not that of differences of log-probabilities. A -inf logit (a
    masked entry) has probability 0 and gets gradient 0. Where p > 0 and q = 0 the divergence is
    +inf; such a row has no finite gradient for `logits` and gets 0 there, while `other_logits` get
    q - p. A probability of p that underflows (below e^-103 of the largest) counts as 0. A row with
    NaN, +inf or no finite logit in either argument gives NaN, and so is its gradient or part of it.

    Args:
        logits: [N, V] fp32, bf16, fp16 or fp64, contiguous along V; rows may be strided.
        other_logits: [N, V] likewise, of a dtype of its own (fp64 only together).
        temperature: > 0; of `logits`.
        other_temperature: > 0; of `other_logits`; None: `temperature`.
        softcap: c > 0, for c tanh(logits / c) before the temperature; None: none.
        other_softcap: the same of `other_logits`; None: none.
        mask: [N] bool; a row with False gives 0, gets gradient 0 and is not read. None: all True.
        group: the vocabulary is split over these ranks, in their order, both logits alike; each
            passes its own columns (any number of them) and the same mask, and gets all of the
            result and the gradient of its columns. Two all-reduces forward, none backward.

    Returns:
        [N] fp32 (fp64 for fp64 logits), nats, >= 0.

    Raises:
        ValueError: a shape, dtype, device or layout is wrong, or a number is out of range.

    Source: arXiv 2512.23075 (the divergence of its masks); gradient as in arXiv 2512.23097 (only
        its abstract was read; derived here).
    """
    check_logits(logits)
    check_logits(other_logits, "other_logits")
    if other_logits.shape != logits.shape:
        found = f"{tuple(logits.shape)} and {tuple(other_logits.shape)}"
        raise ValueError(f"expected logits and other_logits of one shape [N, V], got {found}")
    if other_logits.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, other_logits on {other_logits.device}")
    if sum_dtype(other_logits) != sum_dtype(logits):
        found = f"{logits.dtype} and {other_logits.dtype}"
        raise ValueError(f"expected logits and other_logits both fp64 or neither, got {found}")
    temperature = check_temperature(temperature)
    if other_temperature is None:
        other_temperature = temperature
    scales = (
        _Scale(temperature, check_softcap(softcap)),
        _Scale(
            check_temperature(other_temperature, "other_temperature"),
            check_softcap(other_softcap, "other_softcap"),
        ),
    )
    check_mask(mask, logits)
    check_group(group)
    kernel = runs_kernel(logits) and logits.dtype != torch.float64
    return _TokenKL.apply(logits, other_logits, live_rows(logits, mask), scales, group, kernel)
