"""Log-probability, entropy and collision probability of sampled tokens in one read of the logits.

Shapes: N tokens, V vocabulary entries. z = logits, x = softcap(z) / temperature, y = label,
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
    broken        = the row holds NaN, +inf or no finite logit (on a GPU also: y is no token)
    skipped_fraction (of linear_token_stats.py) = share of V that backward leaves out in the row

S is a constant in these derivatives: the threshold moves with max x but carries no gradient.
`TokenStats.logit_grad_energy` (of q) is the proxy of the Optimal Token Baseline, arXiv 2602.07078.

Cost: 1 read of [N, V] forward (with pruning a second one, of a row that was just read, so from L2);
1 read and 1 write backward. Of size [N, V] nothing is kept but the logits; 6 numbers a token are.
A vocabulary sharded over a group costs one all-reduce of its sizes, one of [N] maxima and one of 5
sums a token (pruned one more, of 4), and none backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ._launch import runs_kernel, triton
from ._rows import NUM_WARPS, block_of, check_integer, check_like, check_logits
from ._token_stats_cpu import token_stats_chunked
from ._token_stats_kernels import (
    backward_kernel,
    forward_kernel,
    kept_sums_kernel,
    whole_sums_kernel,
)
from ._token_sums import (
    IGNORED,
    KeptSums,
    Options,
    WholeSums,
    check_labels,
    finish,
    local_labels,
    locate_shard,
    make_options,
    reduce_kept,
    reduce_whole,
    settle,
)
from ._transform import transform


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
    broken: Tensor | None = None
    skipped_fraction: Tensor | None = None

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
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """What `token_stats` computes, in plain differentiable PyTorch and in the dtype of `logits`."""
    ignored = labels == ignore_index
    y = labels.masked_fill(ignored, 0)[:, None]
    x = transform(logits.masked_fill(ignored[:, None], 0), temperature, softcap)
    # what a broken row holds is replaced, so that the rows beside it get no NaN
    broken = (x.isnan() | (x == math.inf)).any(-1) | (x == -math.inf).all(-1)
    x = x.masked_fill(broken[:, None], 0)
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
    numbers = [
        log_q.gather(-1, y).squeeze(-1),
        -(q * log_q.masked_fill(q == 0, 0)).sum(-1),
        q.square().sum(-1),
        lse,
        max_logit,
    ]
    if prune is not None:
        numbers.append((kept.logsumexp(-1) - lse).clamp_max(0))
    numbers = [o.masked_fill(broken, math.nan).masked_fill(ignored, 0) for o in numbers]
    if prune is None:
        return TokenStats(*numbers, broken=broken)
    safe_count = (~outside).sum(-1).masked_fill(broken | ignored, 0)
    return TokenStats(*numbers, safe_count, (in_safe_set & ~broken) | ignored, broken)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, y: Tensor, options: Options, inplace_backward: bool):
        numbers = {
            "stride_n": logits.stride(0),
            "V": logits.shape[1],
            "inv_temperature": 1 / options.temperature,
            "softcap": options.softcap or 0.0,
            "SOFTCAP": options.softcap is not None,
            "BLOCK_V": block_of(logits.shape[1]),
            "num_warps": NUM_WARPS,
        }
        run = _fused_forward if options.group is None else _sharded_forward
        with torch.cuda.device_of(logits):
            outputs, log_sum = run(logits, y, options, numbers)
        outputs, y = settle(outputs, y, options.nonfinite)
        _, entropy, sum_p2, _, top, kept_mass, count, inside, broken = outputs
        ctx.save_for_backward(logits, y, top, log_sum, kept_mass, entropy, sum_p2)
        ctx.numbers = numbers | {"log_rho": options.log_rho, "PRUNED": options.prune is not None}
        ctx.inplace = inplace_backward
        constant = (top, count, inside, broken)
        ctx.mark_non_differentiable(*(t for t in constant if t is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy, g_sum_p2, g_lse, _max, g_kept_mass, *_constant):
        saved = ctx.saved_tensors  # once: checkpointing unpacks them for one read only
        logits = saved[0]
        n, v = logits.shape
        upstream = (g_logp, g_entropy, g_sum_p2, g_lse, g_kept_mass)
        upstream = (None if g is None else g.contiguous() for g in upstream)
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        if n:
            grid = (n, triton.cdiv(v, ctx.numbers["BLOCK_V"]))
            with torch.cuda.device_of(logits):
                backward_kernel[grid](
                    *saved,
                    *upstream,
                    grad,
                    stride_grad_n=grad.stride(0),
                    **ctx.numbers,
                )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None


def _fused_forward(logits: Tensor, y: Tensor, options: Options, numbers: dict):
    n = logits.shape[0]
    stats = [torch.zeros(n, device=logits.device) for _ in range(6)]
    pruned_stats = [None, None, None]
    if options.prune is not None:
        pruned_stats = [
            torch.zeros(n, device=logits.device),
            torch.zeros(n, dtype=torch.int64, device=logits.device),
            torch.ones(n, dtype=torch.bool, device=logits.device),
        ]
    broken = torch.zeros(n, dtype=torch.bool, device=logits.device)
    if n:
        forward_kernel[(n,)](
            logits,
            y,
            *stats,
            *pruned_stats,
            broken,
            log_rho=options.log_rho,
            PRUNED=options.prune is not None,
            **numbers,
        )
    log_sum = stats.pop()
    return (*stats, *pruned_stats, broken), log_sum


def _sharded_forward(logits: Tensor, y: Tensor, options: Options, numbers: dict):
    n = logits.shape[0]
    sums = torch.zeros(6, n, device=logits.device)
    pruned = options.prune is not None
    if n:
        whole_sums_kernel[(n,)](logits, y, sums, N=n, PRUNED=pruned, **numbers)
    whole = reduce_whole(WholeSums(*sums), options.group)
    kept = None
    if pruned:
        sums = torch.zeros(4, n, device=logits.device)
        if n:
            kept_sums_kernel[(n,)](
                logits, y, whole.top, sums, N=n, log_rho=options.log_rho, **numbers
            )
        kept = reduce_kept(KeptSums(*sums), options.group)
    log_sum = whole.s1.log().masked_fill(y == IGNORED, 0)
    return finish(whole, kept, y, options), log_sum


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    prune: float | None = None,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
    nonfinite: str = "nan",
    inplace_backward: bool = False,
) -> TokenStats:
    """Statistics of the labels under softmax(softcap(logits) / temperature), or its pruning.

    Differentiable once: logp, entropy, sum_p2, logsumexp, log_kept_mass. With pruning the gradients
    of the first three are exactly 0 outside K = S u {label}; the others are of the whole softmax.
    A -inf logit (a masked entry) adds nothing and gets gradient 0; as the label it has logp = -inf.
    A row that holds NaN, +inf or no finite logit is `broken`; `nonfinite` says what it returns.

    Args:
        logits: [N, V] fp32, bf16, fp16 or fp64, contiguous along V; rows may be strided. With
            `group` this rank's columns, [N, V of the shard].
        labels: [N] int64, in [0, V) or `ignore_index`; with `group` columns of the whole
            vocabulary, the same on every rank. Checked on the CPU only, or with
            nonfinite="raise": on a GPU that would wait for the device, so there the row of a label
            out of range is `broken`.
        temperature: > 0.
        prune: rho in (0, 1), the smallest kept probability relative to the largest; None keeps all.
        softcap: c > 0 replaces logits by c tanh(logits / c) first, as Gemma 2 does; None: off.
            Infinite logits stay infinite.
        group: process group over which the vocabulary is sharded, in the order of its ranks;
            shards may differ in size. Every rank returns the statistics of the whole vocabulary
            and takes the gradient of its own columns; upstream gradients must be the same on all.
        ignore_index: rows with this label return 0 (in_safe_set True) and get gradient 0.
        nonfinite: "nan": a broken row is NaN in every number, so that every loss made of one shows
            it; "skip": it is treated as an ignored one (and still counted in `broken`); "raise": a
            ValueError names the first, which waits for the device.
        inplace_backward: backward writes the gradient over the logits, which saves [N, V]. They
            must not be a leaf, a view of one, or overlap; autograd raises if anything else still
            needs them.

    Returns:
        TokenStats of [N] fp32 tensors (fp64 for fp64 logits), safe_count int64, in_safe_set and
        broken bool; log_kept_mass, safe_count and in_safe_set are None without `prune`.

    Raises:
        ValueError: a shape, dtype, device, layout or label is wrong, or a number is out of range.

    Source: safe set, arXiv 2512.23087 (only its abstract was read; pruned entropy and sum_p2 are
        derived here); logit-gradient proxy, arXiv 2602.07078.
    """
    options = make_options(temperature, softcap, prune, group, nonfinite)
    check_integer(ignore_index, "ignore_index")
    _check(logits, labels, inplace_backward)
    shard = locate_shard(logits.shape[1], group, logits.device)
    if labels.is_cpu or nonfinite == "raise":
        check_labels(labels, int(shard.total), ignore_index)
    y = local_labels(labels, logits.shape[1], shard, ignore_index)
    if runs_kernel(logits) and logits.dtype != torch.float64:
        return TokenStats(*_TokenStats.apply(logits, y, options, inplace_backward))
    return TokenStats(*token_stats_chunked(logits, y, options, inplace_backward))


def _check(logits: Tensor, labels: Tensor, inplace_backward: bool) -> None:
    check_logits(logits)
    check_like(labels, logits, "labels", (logits.shape[0],), (torch.int64,))
    if not inplace_backward or not logits.requires_grad:
        return
    base = logits._base if logits._is_view() else logits
    if base.is_leaf:
        raise ValueError("inplace_backward: expected computed logits to write over, got a leaf")
    if len(logits) > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            "inplace_backward: expected logits whose rows do not overlap, got strides "
            f"{logits.stride()}"
        )
