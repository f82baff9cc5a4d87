"""KL from the policy to a teacher of whom only the top k log-probabilities of a token are known.

Shapes: N tokens, V vocabulary entries, K entries the teacher reports. x = softcap(logits) /
temperature, p = softmax(x), q the teacher. All entries he does not report are one outcome, the
tail: p_tail = sum of their p, q_tail = 1 - sum_K q.

    teacher_kl = sum_K p_v (ln p_v - ln q_v) + p_tail (ln p_tail - ln q_tail)      nats, >= 0
    d/dx_v     = p_v (ln p_v - ln q_v - teacher_kl)            v reported
                 p_v (ln p_tail - ln q_tail - teacher_kl)      v in the tail

This is the dense part of hybrid online RL and imitation (arXiv 2512.23097; its abstract was read,
the formulas are derived here). It is a lower bound of the KL to the whole teacher, and equals it
for K = V.

q_tail is what fp32 (or fp64) log-probabilities leave of 1, so below the rounding of that sum it is
noise: it is not taken below eps(dtype of teacher_logp) = 1.2e-7 in fp32. Nothing is infinite then
but what a reported q_v = 0 demands.

Cost: 1 read of [N, V] forward; 1 read and 1 write backward. Kept are the logits and numbers of size
[N, K].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ._exp_sums import ExpSums, Rows, exp_sums, softmax_gradient
from ._launch import runs_kernel
from ._rows import (
    check_like,
    check_logits,
    check_mask,
    check_softcap,
    check_temperature,
    live_rows,
)
from ._token_sums import Shard, locate_shard
from ._transform import transform


def teacher_kl_reference(
    logits: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What `teacher_kl` computes, in plain differentiable PyTorch in the dtype of `logits`."""
    live = live_rows(logits, mask)
    dead = ~live[:, None]
    ids = teacher_ids.masked_fill(dead, 0)
    x = transform(logits.masked_fill(dead, 0), temperature, softcap)
    log_p = x.log_softmax(-1)
    inside = log_p.gather(-1, ids)
    tail = log_p.scatter(-1, ids, -math.inf)
    tail = tail.masked_fill(tail == -math.inf, -math.inf)  # cuts the gradient of entries without p
    empty = (tail == -math.inf).all(-1, keepdim=True)
    log_p_tail = (
        tail.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    )

    log_p = torch.cat([inside, log_p_tail], -1)
    log_q = torch.cat([teacher_logp.masked_fill(dead, 0), _log_tail(teacher_logp)], -1)
    p = log_p.exp()
    ratio = log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0)
    return (p * ratio).sum(-1).masked_fill(~live, 0)


def _log_tail(teacher_logp: Tensor) -> Tensor:
    """ln q_tail [N, 1] = ln(1 - sum q), summed in fp64, q_tail at least eps of the dtype."""
    floor = torch.finfo(teacher_logp.dtype).eps
    mass = teacher_logp.double().logsumexp(-1, keepdim=True)
    return (-mass.expm1()).clamp_min(floor).log().to(teacher_logp.dtype)


def _ratios(sums: ExpSums, log_total: Tensor, log_q: Tensor) -> tuple[Tensor, ...]:
    """p [N, K], p_tail [N], and ln p - ln q of both; 0 where p = 0."""
    log_p = (sums.listed - sums.top[:, None]) - log_total[:, None]
    p, p_tail = log_p.exp(), sums.rest / sums.total
    ratio = torch.where(p == 0, 0, log_p - log_q.to(p.dtype))
    tail_ratio = sums.rest.log() - log_total - _log_tail(log_q).squeeze(-1).to(p.dtype)
    return p, p_tail, ratio, torch.where(p_tail == 0, 0, tail_ratio)


class _TeacherKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, live, columns, log_q, broken, options, group, kernel):
        rows = Rows(logits, live, columns, *options)
        sums = exp_sums(rows, group, kernel=kernel)
        log_total = sums.total.log()
        p, p_tail, ratio, tail_ratio = _ratios(sums, log_total, log_q)
        kl = (p * ratio).sum(-1) + p_tail * tail_ratio
        kl = kl.clamp_min(0).masked_fill(broken | ~(sums.total > 0), math.nan)
        kl = kl.masked_fill(~live, 0)

        no_gradient = kl == math.inf
        scale = (tail_ratio - kl).masked_fill(no_gradient | (p_tail == 0), 0)
        values = p * (ratio - kl[:, None])
        values = values.masked_fill(no_gradient[:, None] | (p == 0), 0)
        ctx.save_for_backward(*rows[:3], sums.top, log_total, scale, values)
        ctx.options, ctx.kernel = options, kernel
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        *rows, top, log_total, scale, values = ctx.saved_tensors
        scale, values = upstream * scale, (upstream[:, None] * values).contiguous()
        rows = Rows(*rows, *ctx.options)
        grad = softmax_gradient(rows, top, log_total, scale, values, kernel=ctx.kernel)
        return (grad, *(None,) * 7)


def teacher_kl(
    logits: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """KL(policy || teacher) of every token, over the teacher's top k and the tail as one.

    Differentiable once, in `logits` only. A -inf logit (a masked entry) has probability 0 and gets
    gradient 0. Where the teacher reports probability 0 (-inf) and the policy has some, the
    divergence is +inf; such a row has no finite gradient and gets 0. A row with NaN, +inf or no
    finite logit gives NaN.

    Args:
        logits: [N, V] fp32, bf16, fp16 or fp64, contiguous along V; rows may be strided.
        teacher_ids: [N, K] int64, K > 0, in [0, V), distinct in each row, in any order.
        teacher_logp: [N, K] fp32 or fp64, nats, <= 0: log-probabilities of those entries under the
            teacher's whole softmax. What they leave of 1 is his tail, taken to be eps of their
            dtype at least (module docstring): log-probabilities that were renormalised over the top
            k say that he gives the tail nothing. A sum above 1.001 is an error. No gradient.
        temperature: > 0; of `logits`. The teacher's is his own affair.
        softcap: c > 0, for c tanh(logits / c) before the temperature; None: none.
        mask: [N] bool; a row with False gives 0, gets gradient 0 and is not read, nor are its
            `teacher_ids` and `teacher_logp`. None: all True.
        group: the vocabulary is split over these ranks, in their order; each passes its own columns
            (any number of them), the same mask and teacher, with ids of the whole vocabulary, and
            gets all of the result and the gradient of its columns. Three all-reduces forward, none
            backward.

    The values of `teacher_ids` and `teacher_logp` are checked on the CPU only. On a GPU that would
    wait for the device, so there a row with wrong ones gives NaN.

    Returns:
        [N] fp32 (fp64 for fp64 logits), nats, >= 0 (rounding below zero is clamped).

    Raises:
        ValueError: a shape, dtype, device, layout, id or log-probability is wrong, or a number is
            out of range.

    Source: arXiv 2512.23097 (only its abstract was read; the tail and the gradient are derived
        here).
    """
    check_logits(logits)
    check_like(teacher_ids, logits, "teacher_ids", (logits.shape[0], None), (torch.int64,))
    dtypes = (torch.float32, torch.float64)
    check_like(teacher_logp, logits, "teacher_logp", tuple(teacher_ids.shape), dtypes)
    if teacher_ids.shape[1] == 0:
        raise ValueError(f"expected teacher_ids [N, K] with K > 0, got {tuple(teacher_ids.shape)}")
    temperature, softcap = check_temperature(temperature), check_softcap(softcap)
    check_mask(mask, logits)
    live = live_rows(logits, mask)
    shard = locate_shard(logits.shape[1], group, logits.device)
    ids, order = teacher_ids.contiguous().sort(-1)  # sort keeps strides
    log_q = teacher_logp.detach().gather(-1, order)
    wrong = _find_wrong(ids, log_q, live, shard)
    broken = wrong.any(0).any(-1)
    if logits.is_cpu and broken.any():
        _refuse(wrong, ids, log_q, order, shard)
    kernel = runs_kernel(logits) and logits.dtype != torch.float64
    return _TeacherKL.apply(
        logits, live, ids - shard.start, log_q, broken, (temperature, softcap), group, kernel
    )


def _find_wrong(ids: Tensor, log_q: Tensor, live: Tensor, shard: Shard) -> Tensor:
    """[4, N, K] bool: ids out of range, ids met before, positive or NaN log_q, too much mass."""
    twice = torch.zeros_like(live)[:, None].repeat(1, ids.shape[1])
    twice[:, 1:] = ids[:, 1:] == ids[:, :-1]
    too_much = log_q.double().exp().sum(-1, keepdim=True) > 1 + 1e-3
    out_of_range = (ids < 0) | (ids >= shard.total)
    return (
        torch.stack([out_of_range, twice, ~(log_q <= 0), too_much.expand_as(ids)]) & live[:, None]
    )


def _refuse(wrong: Tensor, ids: Tensor, log_q: Tensor, order: Tensor, shard: Shard) -> None:
    """Raises for the first of what `_find_wrong` found; `order` is where the entries were."""
    kind, n, k = wrong.nonzero()[0].tolist()
    expected = (
        f"teacher_ids must be in [0, {int(shard.total)})",
        "teacher_ids must be distinct in each row",
        "teacher_logp must be <= 0",
        "probabilities of teacher_logp must sum to <= 1.001",
    )[kind]
    if kind == 3:
        raise ValueError(f"{expected}, got {log_q[n].double().exp().sum().item():.6g} in row {n}")
    name, values = ("teacher_ids", ids) if kind < 2 else ("teacher_logp", log_q)
    raise ValueError(f"{expected}, got {name}[{n}, {int(order[n, k])}] = {values[n, k].item()}")
