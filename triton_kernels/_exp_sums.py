"""Sums of e^x over rows of logits, of all entries and of all but some listed ones; and p again.

x = softcap(logits) / temperature. Forward, 1 read of [N, V]: top = max x, total = sum e^(x - top),
rest = the same without the listed entries (summed directly: total minus the listed ones loses a
small rest), and x of the listed ones. Backward, one read and one write: scale * p, p = softmax(x),
with values of its own at the listed entries.

Listed entries are columns of this shard, sorted in each row; those outside [0, V) lie in another
shard. A row of K of them costs K comparisons with one block each, however many blocks it has.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._launch import jit, tl, triton
from ._rows import (
    NUM_WARPS,
    block_of,
    live_chunks,
    load_rows,
    shared_max,
    shared_sum,
    sum_dtype,
)
from ._transform import transform_gradient_, transformed, transformed_gradient


class ExpSums(NamedTuple):
    """top, total, rest [N]; listed [N, K], 0 where another shard has the entry."""

    top: Tensor
    total: Tensor
    rest: Tensor
    listed: Tensor | None


class Rows(NamedTuple):
    """What the kernels read: logits [N, V], live [N] bool, columns [N, K] sorted or None."""

    logits: Tensor
    live: Tensor
    columns: Tensor | None
    temperature: float
    softcap: float | None


@jit
def _sums_kernel(
    z_ptr,
    live_ptr,
    columns_ptr,
    first_ptr,
    top_ptr,
    total_ptr,
    rest_ptr,
    listed_ptr,
    stride_n,
    V,
    K,
    inv_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # int64: n * stride_n passes 2^31 at N*V > 2e9
    live_V = tl.where(tl.load(live_ptr + n), V, 0)
    row = z_ptr + n * stride_n
    top = -3.4028234663852886e38  # at -inf, a row that begins with masked entries is NaN
    total = 0.0
    rest = 0.0
    for start in range(0, live_V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        x = transformed(z, inv_temperature, softcap, SOFTCAP)
        new = tl.maximum(top, tl.max(x, axis=0))
        keep = tl.exp(top - new)
        e = tl.exp(x - new)
        total = keep * total + tl.sum(e, axis=0)
        if columns_ptr is not None:
            first = first_ptr + n * (tl.cdiv(V, BLOCK_V) + 1) + start // BLOCK_V
            for k in range(tl.load(first), tl.load(first + 1)):
                column = tl.load(columns_ptr + n * K + k)
                z_k = tl.load(row + column).to(tl.float32)
                x_k = transformed(z_k, inv_temperature, softcap, SOFTCAP)
                tl.store(listed_ptr + n * K + k, x_k)
                e = tl.where(v == column, 0.0, e)
            rest = keep * rest + tl.sum(e, axis=0)
        top = new
    tl.store(top_ptr + n, top)
    tl.store(total_ptr + n, total)
    tl.store(rest_ptr + n, rest)


@jit
def _gradient_kernel(
    z_ptr,
    live_ptr,
    columns_ptr,
    first_ptr,
    top_ptr,
    log_total_ptr,
    scale_ptr,
    values_ptr,
    grad_z_ptr,
    stride_n,
    V,
    K,
    inv_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    live_V = tl.where(tl.load(live_ptr + n), V, 0)
    z = tl.load(z_ptr + n * stride_n + v, mask=v < live_V, other=-float("inf")).to(tl.float32)
    x = transformed(z, inv_temperature, softcap, SOFTCAP)
    p = tl.exp(x - tl.load(top_ptr + n) - tl.load(log_total_ptr + n))
    grad = tl.load(scale_ptr + n) * p
    if columns_ptr is not None:
        first = first_ptr + n * (tl.cdiv(V, BLOCK_V) + 1) + block
        for k in range(tl.load(first), tl.load(first + 1)):
            column = tl.load(columns_ptr + n * K + k)
            grad = tl.where(v == column, tl.load(values_ptr + n * K + k), grad)
    grad = transformed_gradient(grad, x, inv_temperature, softcap, SOFTCAP)
    tl.store(grad_z_ptr + n * V + v, grad, mask=v < V)


def _launch_constants(rows: Rows) -> dict:
    v = rows.logits.shape[1]
    return {
        "stride_n": rows.logits.stride(0),
        "V": v,
        "K": 0 if rows.columns is None else rows.columns.shape[1],
        "inv_temperature": 1 / rows.temperature,
        "softcap": rows.softcap or 1.0,
        "SOFTCAP": rows.softcap is not None,
        "BLOCK_V": block_of(v),
        "num_warps": NUM_WARPS,
    }


def _first_of_blocks(columns: Tensor | None, v: int, block: int) -> Tensor | None:
    """[N, blocks + 1]: where the listed entries of every block begin, and where the last end."""
    if columns is None:
        return None
    edges = torch.arange(triton.cdiv(v, block) + 1, device=columns.device) * block
    edges = edges.clamp_max(v).expand(len(columns), -1).contiguous()
    return torch.searchsorted(columns, edges)


def _kernel_sums(rows: Rows) -> ExpSums:
    n, v = rows.logits.shape
    top, total, rest = torch.empty(3, n, device=rows.logits.device)
    listed = None
    if rows.columns is not None:
        listed = torch.zeros(rows.columns.shape, device=rows.logits.device)
    if n:
        constants = _launch_constants(rows)
        first = _first_of_blocks(rows.columns, v, constants["BLOCK_V"])
        outputs = (top, total, rest, listed)
        with torch.cuda.device_of(rows.logits):
            _sums_kernel[(n,)](rows.logits, rows.live, rows.columns, first, *outputs, **constants)
    return ExpSums(top, total, rest, listed)


def _chunked_sums(rows: Rows) -> ExpSums:
    logits, live, columns, *scale = rows
    n, v = logits.shape
    top, total, rest = logits.new_zeros(3, n, dtype=sum_dtype(logits))
    listed = None if columns is None else top.new_zeros(columns.shape)
    for chunk in live_chunks(logits, live):
        x = load_rows(logits, chunk, *scale)
        top[chunk] = x.amax(-1).clamp_min(torch.finfo(x.dtype).min)  # -inf - -inf is NaN
        e = x.sub(top[chunk, None]).exp_()
        total[chunk] = e.sum(-1)
        if columns is not None:
            row, k = _inside(columns[chunk], v)
            column = columns[chunk[row], k]
            listed[chunk[row], k] = x[row, column]
            e[row, column] = 0
            rest[chunk] = e.sum(-1)
    return ExpSums(top, total, rest, listed)


def _inside(columns: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """Positions (row, k) of the listed entries that lie in this shard."""
    return ((columns >= 0) & (columns < v)).nonzero(as_tuple=True)


def exp_sums(rows: Rows, group: ProcessGroup | None, *, kernel: bool) -> ExpSums:
    """Over all shards of `group`, with one all-reduce of the maxima and one of the sums."""
    sums = (_kernel_sums if kernel else _chunked_sums)(rows)
    top = shared_max(sums.top, group)
    keep = (sums.top - top).exp()
    packed = [keep * sums.total, keep * sums.rest]
    if sums.listed is not None:
        packed += sums.listed.unbind(1)
    total, rest, *listed = shared_sum(torch.stack(packed), group)
    return ExpSums(top, total, rest, torch.stack(listed, 1) if listed else None)


def softmax_gradient(
    rows: Rows,
    top: Tensor,
    log_total: Tensor,
    scale: Tensor,
    values: Tensor | None,
    *,
    kernel: bool,
) -> Tensor:
    """Gradient for the logits of scale [N] * p, and of `values` [N, K] at the listed entries."""
    logits, live, columns, *options = rows
    n, v = logits.shape
    make = torch.empty if kernel else torch.zeros
    grad_z = make(logits.shape, dtype=logits.dtype, device=logits.device)
    if n and kernel:
        constants = _launch_constants(rows)
        first = _first_of_blocks(columns, v, constants["BLOCK_V"])
        grid = (n, triton.cdiv(v, constants["BLOCK_V"]))
        inputs = (logits, live, columns, first, top, log_total, scale, values)
        with torch.cuda.device_of(logits):
            _gradient_kernel[grid](*inputs, grad_z, **constants)
    elif n:
        for chunk in live_chunks(logits, live):
            x = load_rows(logits, chunk, *options)
            grad = (x - top[chunk, None]).sub_(log_total[chunk, None]).exp_()
            grad.mul_(scale[chunk, None])
            if columns is not None:
                row, k = _inside(columns[chunk], v)
                grad[row, columns[chunk[row], k]] = values[chunk[row], k]
            grad = transform_gradient_(grad, x, *options)
            grad_z.index_copy_(0, chunk, grad.to(logits.dtype))
    return grad_z
