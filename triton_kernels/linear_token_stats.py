"""The statistics of token_stats.py from hidden states and the head's weight, without the logits.

Shapes: N tokens, D width, V vocabulary entries. z = hidden @ weight^T + bias; everything else, and
every output, is as in token_stats.py.

Forward: tiles of z are computed, added to online sums and dropped. Pruning needs the maximum first:
a second sweep computes again only those tiles that can reach the threshold, by bounds from the
first. Backward computes tiles again, forms dz and multiplies it into the gradients of hidden and
weight (fp32 accumulation, in a fixed order, no atomics).

Under pruning a tile (token block x vocabulary block) without an entry of K has gradient exactly 0
from logp, entropy and sum_p2: backward skips it, exactly. Likewise, if asked, a tile in which no
probability reaches a threshold: that one is an approximation.

Cost: 1 product [N, D] x [D, V] forward (pruned: and the share of tiles that the second sweep
needs), 3 backward for the tiles that are not skipped. Memory beside inputs and gradients: about 100
numbers a token (more where tokens are few), 5 bytes a tile of 16,384 logits (fp32: 4,096) for
bounds, dz and the gradient of the weight of a chunk (on a GPU of a tenth of the vocabulary, and 128
MB each at most; on a CPU 2 MB), gradients of 16-bit hidden states once more in fp32.

Products are those of tensor cores: 16-bit operands exactly, sums in fp32; fp32 operands as
torch.set_float32_matmul_precision says. dz is rounded to the dtype of `hidden` on a GPU, so fp16
wants a scaled loss as ever.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import _linear_token_stats_cpu, _linear_token_stats_triton
from ._launch import runs_kernel
from ._rows import DTYPES, check_integer, check_like, check_number, check_tensor
from ._token_sums import (
    IGNORED,
    Options,
    check_labels,
    finish,
    local_labels,
    locate_shard,
    make_options,
    reduce_kept,
    reduce_whole,
    settle,
)
from .token_stats import TokenStats, token_stats_reference


def linear_token_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    prune: float | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """What `linear_token_stats` computes, with [N, V] logits, in the dtype of its input."""
    hidden = hidden.masked_fill((labels == ignore_index)[:, None], 0)
    return token_stats_reference(
        torch.nn.functional.linear(hidden, weight, bias),
        labels,
        temperature=temperature,
        prune=prune,
        softcap=softcap,
        ignore_index=ignore_index,
    )


class _LinearTokenStats(torch.autograd.Function):
    """`backend` is one of the two modules that know how tiles are computed."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, y: Tensor, options: Options, skip_below, backend):
        track = options.prune is not None or skip_below is not None
        kept = live = None
        with torch.cuda.device_of(hidden):
            head = backend.Head(hidden, weight, bias, y, options)
            whole, bound = backend.whole_sums(head, track)
            whole = reduce_whole(whole, options.group)
            if options.prune is not None:
                top = torch.where(whole.s1 > 0, whole.top, math.nan)  # NaN in a broken row
                kept, live = backend.kept_sums(head, top, bound)
                kept = reduce_kept(kept, options.group)
            elif track:
                live = head.with_labels(bound >= math.log(skip_below))
        outputs, y = settle(finish(whole, kept, y, options), y, options.nonfinite)
        live = live if live is None else head.live_without_broken(live, y)
        _, entropy, sum_p2, _, top, kept_mass, count, inside, broken = outputs
        skipped = None if live is None else head.skipped_fraction(live)
        log_sum = whole.s1.log().masked_fill(y == IGNORED, 0)
        ctx.save_for_backward(
            hidden, weight, bias, y, live, top, log_sum, kept_mass, entropy, sum_p2
        )
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        constant = (top, count, inside, broken, skipped)
        ctx.mark_non_differentiable(*(t for t in constant if t is not None))
        return (*outputs, skipped)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy, g_sum_p2, g_lse, _max, g_kept_mass, *_constant):
        hidden, weight, bias, y, live, *saved = ctx.saved_tensors
        if ctx.options.prune is not None and (g_lse is not None or g_kept_mass is not None):
            live = None  # these two have a gradient outside K
        # Lightning calls backward within autocast: products of PyTorch would be cast
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            gradients = ctx.backend.gradients(
                ctx.backend.Head(hidden, weight, bias, y, ctx.options),
                saved,
                [g_logp, g_entropy, g_sum_p2, g_lse, g_kept_mass],
                live,
                ctx.needs_input_grad[:3],
            )
        return (*gradients, None, None, None, None)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    prune: float | None = None,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
    nonfinite: str = "nan",
    skip_below: float | None = None,
) -> TokenStats:
    """Statistics of the labels under softmax(softcap(hidden @ weight^T + bias) / temperature).

    What `token_stats` returns of those logits, which are never stored; differentiable once in
    hidden, weight and bias. Under autocast the three are cast to its dtype first.

    Args:
        hidden: [N, D] fp32, bf16, fp16 or fp64, contiguous along D; rows may be strided.
        weight: [V, D] of the same dtype, contiguous along D; with `group` this rank's rows,
            [V of the shard, D]. The gradient for `hidden` is then this shard's part of it, which
            the caller adds up over the group; those for weight and bias are complete. Megatron-core
            does it with copy_to_tensor_model_parallel_region, applied last, to the contiguous
            [N, D]: before a transpose its all-reduce misses the gradient (0.16.1).
        labels: [N] int64, as in `token_stats`.
        bias: [V] of the same dtype, or None.
        temperature: > 0.
        prune: rho in (0, 1) or None, as in `token_stats`. Backward leaves out, exactly, the tiles
            without a kept entry, unless logsumexp or log_kept_mass have a gradient, which is not
            zero there.
        softcap: as in `token_stats`.
        group: as in `token_stats`.
        ignore_index: rows with this label return 0 and get gradient 0; where a whole block of
            tokens is ignored nothing is computed.
        nonfinite: as in `token_stats`.
        skip_below: in (0, 1), without `prune` only: backward leaves out the tiles in which, by the
            bounds of the forward sweep, no probability reaches it and no label lies. An
            approximation, off (None) by default.

    Returns:
        TokenStats of [N] tensors as from `token_stats`; skipped_fraction is the share of the
        vocabulary that backward leaves out in each row (0 at ignored rows), None if neither
        `prune` nor `skip_below` is given or, for the latter, no gradient is needed.

    Raises:
        ValueError: a shape, dtype, device, layout or label is wrong, or a number is out of range.

    Source: the blocks follow arXiv 2411.09009 (cut cross-entropy), which skips tiles below a
        threshold; here, under pruning (arXiv 2512.23087), skipping is exact.
    """
    options = make_options(temperature, softcap, prune, group, nonfinite)
    check_integer(ignore_index, "ignore_index")
    if skip_below is not None:
        skip_below = check_number(skip_below, "skip_below", 0, 1)
    if skip_below is not None and prune is not None:
        raise ValueError(
            "skip_below is for statistics without prune, which skips exactly; got both"
        )
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            check_tensor(x, name)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    _check(hidden, weight, labels, bias)
    shard = locate_shard(len(weight), group, hidden.device)
    if labels.is_cpu or nonfinite == "raise":
        check_labels(labels, int(shard.total), ignore_index)
    y = local_labels(labels, len(weight), shard, ignore_index)
    kernel = runs_kernel(hidden) and hidden.dtype != torch.float64 and len(labels) > 0
    backend = _linear_token_stats_triton if kernel else _linear_token_stats_cpu
    needed = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if not (needed and torch.is_grad_enabled()):
        skip_below = None
    with torch.autocast(kind, enabled=False):  # tiles are fp32, also where PyTorch multiplies them
        outputs = _LinearTokenStats.apply(hidden, weight, bias, y, options, skip_below, backend)
    return TokenStats(*outputs)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.ndim == 2 and x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"{name} must be contiguous along D, got strides {x.stride()}")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        found = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"expected hidden [N, D] and weight [V, D], got {found}")
    if 0 in weight.shape:
        raise ValueError(f"expected weight [V, D], V and D > 0, got {tuple(weight.shape)}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"expected hidden of fp32, bf16, fp16 or fp64, got {hidden.dtype}")
    check_like(labels, hidden, "labels", (len(hidden),), (torch.int64,), of="hidden")
    check_like(weight, hidden, "weight", weight.shape, (hidden.dtype,), of="hidden")
    if bias is not None:
        check_like(bias, hidden, "bias", (len(weight),), (hidden.dtype,), of="hidden")
        if not bias.is_contiguous():
            raise ValueError(f"bias must be contiguous, got strides {bias.stride()}")
