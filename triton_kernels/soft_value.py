"""V(s) of a state, the logits read as action values: logsumexp of a row of logits.

Shapes: N states, V vocabulary entries. x = softcap(logits) / temperature, p = softmax(x).

    initial_value = ln sum_v e^x               nats            d/dx = p

The value of the state after the prompt in ReVal (arXiv 2603.23355). Its gradient must be kept:
detached, the loss converges to a wrong policy on off-policy data.

Cost: 1 read of [N, V] forward; 1 read and 1 write backward. Of size [N, V] nothing is kept but the
logits; 2 numbers a state are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ._exp_sums import Rows, exp_sums, softmax_gradient
from ._launch import runs_kernel
from ._rows import (
    check_group,
    check_logits,
    check_mask,
    check_softcap,
    check_temperature,
    live_rows,
)
from ._transform import transform


def initial_value_reference(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What `initial_value` computes, in plain differentiable PyTorch in the dtype of `logits`."""
    dead = ~live_rows(logits, mask)
    x = transform(logits.masked_fill(dead[:, None], 0), temperature, softcap)
    return x.logsumexp(-1).masked_fill(dead, 0)


class _InitialValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, live: Tensor, temperature, softcap, group, kernel: bool):
        top, total, *_ = exp_sums(
            Rows(logits, live, None, temperature, softcap), group, kernel=kernel
        )
        log_total = total.log()
        value = top + log_total
        broken = ~value.isfinite()  # +inf, or no finite logit
        ctx.save_for_backward(logits, live, top, log_total)
        ctx.options = temperature, softcap, kernel
        return value.masked_fill(broken, math.nan).masked_fill(~live, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, live, top, log_total = ctx.saved_tensors
        temperature, softcap, kernel = ctx.options
        rows = Rows(logits, live, None, temperature, softcap)
        scale = upstream.contiguous()
        grad = softmax_gradient(rows, top, log_total, scale, None, kernel=kernel)
        return (grad, *(None,) * 5)


def initial_value(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """V(s) = ln sum_v e^x_v of every state, x = softcap(logits) / temperature.

    It is the field logsumexp of token statistics, so `linear_token_stats` gives it without logits.
    Differentiable once; the gradient is softmax(x). A -inf logit (a masked entry) adds nothing and
    gets gradient 0. A row with NaN, +inf or no finite logit gives NaN.

    Args:
        logits: [N, V] fp32, bf16, fp16 or fp64, contiguous along V; rows may be strided. For ReVal
            those of the last prompt tokens.
        temperature: > 0. The value is ln sum e^x, not multiplied by the temperature.
        softcap: c > 0, for c tanh(logits / c) before the temperature; None: none.
        mask: [N] bool; a row with False gives 0, gets gradient 0 and is not read. None: all True.
        group: the vocabulary is split over these ranks, in their order; each passes its own columns
            and the same mask, and gets all of the result and the gradient of its columns. Two
            all-reduces forward, none backward.

    Returns:
        [N] fp32 (fp64 for fp64 logits), nats.

    Raises:
        ValueError: a shape, dtype, device or layout is wrong, or a number is out of range.

    Source: arXiv 2603.23355, V(s1).
    """
    check_logits(logits)
    temperature, softcap = check_temperature(temperature), check_softcap(softcap)
    check_mask(mask, logits)
    check_group(group)
    kernel = runs_kernel(logits) and logits.dtype != torch.float64
    return _InitialValue.apply(logits, live_rows(logits, mask), temperature, softcap, group, kernel)
