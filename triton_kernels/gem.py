"""GEM, a loss for fine-tuning that keeps entropy: cross-entropy against a sharpened policy.

Shapes: N tokens, V vocabulary entries. z = softcap(logits), y = label, q = softmax(z / beta) and
the weights w are constants: no gradient goes through them. w_v = 1 (h = "linear") or
w_v = sigmoid((z_v - z_y) / 100) (h = "logsigmoid").

    gem_loss = sum_v q_v w_v (z_v - z_y)     logits     d/dz = q_v w_v - [v = y] sum_u q_u w_u

The gradient sums to 0 over v. For h = "linear" it is q - onehot(y), that of beta times the
cross-entropy at temperature beta, and gem_loss = beta (-logp - entropy) in the statistics at that
temperature (`gem_loss_from_stats`). beta = 1 has the gradient of cross-entropy.

The paper: arXiv 2408.16673.

Cost: 1 read of [N, V] forward; 1 read and 1 write backward. Of size [N, V] nothing is kept but the
logits; 4 numbers a token are.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ._launch import jit, runs_kernel, tl, triton
from ._rows import (
    NUM_WARPS,
    block_of,
    check_integer,
    check_like,
    check_logits,
    check_softcap,
    check_temperature,
    live_chunks,
    load_rows,
    shared_max,
    shared_sum,
    sum_dtype,
)
from ._token_sums import IGNORED, check_labels, local_labels, locate_shard
from ._transform import transform, transform_gradient_, transformed, transformed_gradient

if TYPE_CHECKING:
    from .token_stats import TokenStats


def gem_loss_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.7,
    h: Literal["linear", "logsigmoid"] = "linear",
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """What `gem_loss` computes, in plain differentiable PyTorch and in the dtype of `logits`."""
    ignored = labels == ignore_index
    z = transform(logits.masked_fill(ignored[:, None], 0), 1.0, softcap)
    z = z.masked_fill(z == -torch.inf, -torch.inf)  # no gradient reaches masked entries
    q = (z.detach() / beta).softmax(-1)
    gap = (z - z.gather(-1, labels.masked_fill(ignored, 0)[:, None])).masked_fill(q == 0, 0)
    w = (0.01 * gap.detach()).sigmoid() if h == "logsigmoid" else 1
    loss = (q * w * gap).sum(-1)
    return loss.masked_fill(ignored, 0)


@jit
def _weights(gap, LOGSIGMOID: tl.constexpr):
    if LOGSIGMOID:
        return 1 / (1 + tl.exp(gap * -0.01))
    else:
        return tl.full(gap.shape, 1.0, tl.float32)


@jit
def _sums_kernel(
    z_ptr,
    y_ptr,
    z_y_ptr,
    sums_ptr,
    stride_n,
    N,
    V,
    inv_beta,
    softcap,
    SOFTCAP: tl.constexpr,
    LOGSIGMOID: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # int64: n * stride_n passes 2^31 at N*V > 2e9
    live_V = tl.where(tl.load(y_ptr + n) == -1, 0, V)  # IGNORED
    z_y = tl.load(z_y_ptr + n)
    top = -3.4028234663852886e38  # at -inf, a row that begins with masked entries is NaN
    s1 = 0.0
    weight = 0.0
    loss = 0.0
    for start in range(0, live_V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)
        z = transformed(z, 1.0, softcap, SOFTCAP)
        new = tl.maximum(top, tl.max(z, axis=0))
        keep = tl.exp((top - new) * inv_beta)
        e = tl.exp((z - new) * inv_beta)
        gap = z - z_y
        ew = tl.where(e > 0, e * _weights(gap, LOGSIGMOID), 0.0)  # else 0 * inf
        s1 = keep * s1 + tl.sum(e, axis=0)
        weight = keep * weight + tl.sum(ew, axis=0)
        loss = tl.where(keep > 0, keep * loss, 0.0)
        loss += tl.sum(tl.where(e > 0, ew * gap, 0.0), axis=0)
        top = new
    tl.store(sums_ptr + n, top)
    tl.store(sums_ptr + N + n, s1)
    tl.store(sums_ptr + 2 * N + n, weight)
    tl.store(sums_ptr + 3 * N + n, loss)


@jit
def _gradient_kernel(
    z_ptr,
    y_ptr,
    stats_ptr,
    upstream_ptr,
    grad_z_ptr,
    stride_n,
    N,
    V,
    inv_beta,
    softcap,
    SOFTCAP: tl.constexpr,
    LOGSIGMOID: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    y = tl.load(y_ptr + n)
    live_V = tl.where(y == -1, 0, V)
    z = tl.load(z_ptr + n * stride_n + v, mask=v < live_V, other=-float("inf")).to(tl.float32)
    z = transformed(z, 1.0, softcap, SOFTCAP)
    top = tl.load(stats_ptr + n)
    log_s1 = tl.load(stats_ptr + N + n)
    weight = tl.load(stats_ptr + 2 * N + n)
    z_y = tl.load(stats_ptr + 3 * N + n)
    qw = tl.exp((z - top) * inv_beta - log_s1) * _weights(z - z_y, LOGSIGMOID)
    grad = tl.load(upstream_ptr + n) * (qw - tl.where(v == y, weight, 0.0))
    grad = transformed_gradient(grad, z, 1.0, softcap, SOFTCAP)
    tl.store(grad_z_ptr + n * V + v, grad, mask=v < V)


class _Options(NamedTuple):
    beta: float
    logsigmoid: bool
    softcap: float | None


def _launch_constants(logits: Tensor, options: _Options) -> dict:
    return {
        "stride_n": logits.stride(0),
        "N": logits.shape[0],
        "V": logits.shape[1],
        "inv_beta": 1 / options.beta,
        "softcap": options.softcap or 1.0,
        "SOFTCAP": options.softcap is not None,
        "LOGSIGMOID": options.logsigmoid,
        "BLOCK_V": block_of(logits.shape[1]),
        "num_warps": NUM_WARPS,
    }


def _kernel_sums(logits: Tensor, y: Tensor, z_y: Tensor, options: _Options) -> Tensor:
    """[4, N]: max z, and with e = e^((z - max) / beta) the sums of e, e w and e w (z - z_y)."""
    n = logits.shape[0]
    sums = torch.empty(4, n, device=logits.device)
    if n:
        constants = _launch_constants(logits, options)
        with torch.cuda.device_of(logits):
            _sums_kernel[(n,)](logits, y, z_y, sums, **constants)
    return sums


def _chunked_sums(logits: Tensor, y: Tensor, z_y: Tensor, options: _Options) -> Tensor:
    sums = logits.new_zeros(4, logits.shape[0], dtype=sum_dtype(logits))
    for rows in live_chunks(logits, y != IGNORED):
        z = load_rows(logits, rows, 1.0, options.softcap)
        top = z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # -inf - -inf is NaN
        e = (z - top).div_(options.beta).exp_()
        gap = torch.where(e > 0, z.sub_(z_y[rows, None]), 0)
        s1 = e.sum(-1)
        if options.logsigmoid:
            e.mul_((0.01 * gap).sigmoid_())
        sums[:, rows] = torch.stack([top.squeeze(-1), s1, e.sum(-1), gap.mul_(e).sum(-1)])
    return sums


def _label_logits(logits: Tensor, y: Tensor, softcap: float | None) -> Tensor:
    """z_y [N] of the labels in this shard, 0 for the others."""
    found = logits.gather(1, y.clamp_min(0)[:, None]).squeeze(1).to(sum_dtype(logits))
    return torch.where(y >= 0, transform(found, 1.0, softcap), 0)


class _GEMLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, y: Tensor, wrong, options: _Options, group, kernel: bool):
        z_y = shared_sum(_label_logits(logits, y, options.softcap), group)
        sums = (_kernel_sums if kernel else _chunked_sums)(logits, y, z_y, options)
        top = shared_max(sums[0], group)
        keep = ((sums[0] - top) / options.beta).exp()
        s1, weight, loss = shared_sum(torch.where(keep == 0, 0, keep * sums[1:]), group)
        loss = (loss / s1).masked_fill(wrong | ~(s1 > 0), torch.nan).masked_fill(y == IGNORED, 0)
        stats = torch.stack([top, s1.log(), weight / s1, z_y])
        ctx.save_for_backward(logits, y, stats)
        ctx.options, ctx.kernel = options, kernel
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, y, stats = ctx.saved_tensors
        make, fill = (
            (torch.empty, _kernel_gradient) if ctx.kernel else (torch.zeros, _chunked_gradient)
        )
        grad = make(logits.shape, dtype=logits.dtype, device=logits.device)
        if logits.shape[0]:
            fill(logits, y, stats, upstream.contiguous(), grad, ctx.options)
        return (grad, *(None,) * 5)


def _kernel_gradient(logits, y, stats, upstream, grad_z, options: _Options) -> None:
    constants = _launch_constants(logits, options)
    grid = (logits.shape[0], triton.cdiv(logits.shape[1], constants["BLOCK_V"]))
    with torch.cuda.device_of(logits):
        _gradient_kernel[grid](logits, y, stats, upstream, grad_z, **constants)


def _chunked_gradient(logits, y, stats, upstream, grad_z, options: _Options) -> None:
    for rows in live_chunks(logits, y != IGNORED):
        top, log_s1, weight, z_y = stats[:, rows, None]
        column = y[rows, None]
        z = load_rows(logits, rows, 1.0, options.softcap)
        grad = (z - top).div_(options.beta).sub_(log_s1).exp_()
        if options.logsigmoid:
            gap = torch.where(grad > 0, z - z_y, 0)  # else -inf - -inf, at a masked label
            grad.mul_(gap.mul_(0.01).sigmoid_())
        here = (column >= 0) & (z.gather(-1, column.clamp_min(0)) != -torch.inf)
        grad.scatter_add_(-1, column.clamp_min(0), torch.where(here, -weight, 0))
        grad.mul_(upstream[rows, None])
        grad = transform_gradient_(grad, z, 1.0, options.softcap)
        grad_z.index_copy_(0, rows, grad.to(logits.dtype))


def gem_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.7,
    h: Literal["linear", "logsigmoid"] = "linear",
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """GEM loss of every token: sum_v q_v w_v (z_v - z_y), q = softmax(z / beta), z = logits.

    Differentiable once; q and w are constants of the gradient, so the value itself may rise while
    training improves. A -inf logit (a masked entry) adds nothing and gets gradient 0; as the label
    it has loss +inf, and the other entries get q w. A row with NaN, +inf or no finite logit gives
    NaN.

    Args:
        logits: [N, V] fp32, bf16, fp16 or fp64, contiguous along V; rows may be strided.
        labels: [N] int64, in [0, V) or `ignore_index`. Checked on the CPU only; on a GPU that would
            wait for the device, so there a label out of range gives NaN.
        beta: > 0, the temperature of q; 1 has the gradient of cross-entropy (h = "linear").
        h: "linear" (w = 1) or "logsigmoid" (w = sigmoid((z_v - z_y) / 100)).
        softcap: c > 0, for z = c tanh(logits / c); None: none.
        group: the vocabulary is split over these ranks, in their order; each passes its own columns
            (any number of them) and the same labels, of the whole vocabulary, and gets all of the
            result and the gradient of its columns. Four all-reduces forward, none backward.
        ignore_index: rows with this label give 0, get gradient 0 and are not read.

    Returns:
        [N] fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: a shape, dtype, device, layout or label is wrong, or a number is out of range.

    Source: arXiv 2408.16673, beta = 0.7 and both h.
    """
    check_logits(logits)
    check_like(labels, logits, "labels", (logits.shape[0],), (torch.int64,))
    beta, softcap = check_temperature(beta, "beta"), check_softcap(softcap)
    check_integer(ignore_index, "ignore_index")
    if h not in ("linear", "logsigmoid"):
        raise ValueError(f"h must be 'linear' or 'logsigmoid', got {h!r}")
    shard = locate_shard(logits.shape[1], group, logits.device)
    if labels.is_cpu:
        check_labels(labels, int(shard.total), ignore_index)
    wrong = (labels < 0) | (labels >= shard.total)
    y = local_labels(labels, logits.shape[1], shard, ignore_index)
    kernel = runs_kernel(logits) and logits.dtype != torch.float64
    options = _Options(beta, h == "logsigmoid", softcap)
    return _GEMLoss.apply(logits, y, wrong, options, group, kernel)


def gem_loss_from_stats(stats: TokenStats, *, beta: float) -> Tensor:
    """`gem_loss` with h = "linear" from token statistics, so also from those of a fused head.

    Value and gradient are those of `gem_loss`: beta * (-logp - entropy), the entropy a constant.

    Args:
        stats: of the labels at temperature = beta, without pruning. Fields of any shape.
        beta: > 0, the temperature the statistics were computed at: another one cannot be told from
            them, and gives another loss.

    Returns:
        As stats.logp, in shape and dtype; 0 in ignored rows.

    Raises:
        ValueError: beta is out of range, or the statistics are pruned.

    Source: arXiv 2408.16673.
    """
    beta = check_temperature(beta, "beta")
    if stats.log_kept_mass is not None:
        raise ValueError("stats: expected statistics of the whole vocabulary, got pruned ones")
    return beta * (-stats.logp - stats.entropy.detach())
