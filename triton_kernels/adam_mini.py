"""The Adam-mini step on many tensors at once: block sums of g^2, then one streaming update.

Legend: U units (rows or columns that share one step size), L entries of a unit, B stacked matrices.
A `Piece` is a part of a tensor whose blocks have one shape. With h = a row of `hyper` (see HYPER),
g' = grad * h.grad_scale, for every unit u of a piece
    S_u = sum(grad_u ^ 2)                                           `unit_sums`
    v_u <- v_u + (mean(g'_u ^ 2) - v_u) * h.weight2                  one per unit
    s_u = h.step_size / (sqrt(v_u) * h.root + h.eps)
    m   <- m + (g' - m) * h.weight1;   p <- p * h.decay - m * s_u    `apply`, s_u given
`one_pass` does all four lines where a unit is a whole block; elementwise pieces have U = entries.
With h.skip != 0 nothing is written.

Moments of bf16, and parameters of bf16 if asked, are rounded stochastically: the upper 16 bits of
(fp32 bits + noise), noise from a counter-based hash of (key, index of the entry in the whole
tensor), so the result depends neither on sharding nor on the order of programs.

Cost (fp32): `one_pass` reads p, g, m once and writes p, m once: 20 bytes an entry, where AdamW
moves 28; `unit_sums` then `apply` read g twice: 24 bytes. Elementwise pieces move what AdamW does.
`one_pass` reads g twice in rows of more than 4096 entries: up to 28672 of them the second time from
a cache, beyond that from memory (24 bytes).

One launch per regime and set of dtypes, whatever tensors pieces are in: see _adam_mini_table.py.

Source: arXiv 2406.16793, the update rule.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._adam_mini_reference import (
    ELEMENTWISE_UNIT,
    HYPER,
    Piece,
    Work,
    apply_reference,
    one_pass_reference,
    round_stochastically,
    rounding_key,
    rounding_noise,
    unit_sums_reference,
)
from ._adam_mini_table import Table, is_capturing, table_of, why_not
from ._launch import jit, tl

__all__ = [
    "ELEMENTWISE_UNIT",
    "HYPER",
    "Piece",
    "Work",
    "apply",
    "apply_reference",
    "one_pass",
    "one_pass_reference",
    "round_stochastically",
    "rounding_key",
    "rounding_noise",
    "unit_sums",
    "unit_sums_reference",
    "why_not",
]


@jit
def _pointer(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """A pointer from the table. Loaded numbers have lost their alignment: say it again."""
    if DTYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif DTYPE == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _length(address, VECTOR: tl.constexpr):
    length = tl.load(address)
    if VECTOR > 1:
        length = tl.multiple_of(length, VECTOR)
    return length


@jit
def _lerp(x, y, weight):
    """x + (y - x) * weight, as torch.lerp: y itself at weight = 1."""
    near_x = weight < 0.5
    return tl.where(near_x, x, y) + (y - x) * tl.where(near_x, weight, weight - 1)


@jit
def _next_moments(v, means, weight):
    """A second moment that has overflowed stays infinite: no inf - inf."""
    return tl.where(v == float("inf"), v, _lerp(v, means, weight))


@jit
def _step_size(v, step_size, root, eps):
    return tl.div_rn(step_size + tl.zeros_like(v), tl.sqrt_rn(v) * root + eps)


@jit
def _noise(index, key):
    """`rounding_noise` in uint32."""
    x = index.to(tl.uint32) ^ ((index >> 32).to(tl.uint32) * 0x9E3779B9) ^ key
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _store(pointer, x, mask, noise, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """Stores fp32 x; bf16 is rounded by its bits: so do all devices, and the interpreter."""
    if DTYPE == "bf16":
        bits = x.to(tl.uint32, bitcast=True)
        if not ROUND:  # to the nearest, ties to even
            noise = 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, bits + noise, 0x7FC00000) >> 16
        tl.store(pointer, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, x, mask=mask)


@jit
def _update(
    p_ptr, m_ptr, p, g, m, mask, s, decay, weight1, scale, index, key,
    PARAM: tl.constexpr, EXP_AVG: tl.constexpr, ROUND_P: tl.constexpr, ROUND_M: tl.constexpr,
):  # fmt: skip
    """The last line of the module's docstring on a tile; p, g, m are fp32."""
    m = _lerp(m, g * scale, weight1)
    p = p * decay - m * s
    noise = 0
    if ROUND_P or ROUND_M:
        noise = _noise(index, key)
    _store(m_ptr, m, mask, noise & 0xFFFF, EXP_AVG, ROUND_M)
    _store(p_ptr, p, mask, noise >> 16, PARAM, ROUND_P)


# A row of the table, of int64:
#   0 param   1 grad   2 exp_avg   3 exp_avg_sq: addresses of the first entries of the piece
#   4 number of the work   5 its first program   6 units   7 pitch: entries of a row
#   8 index   9 stride: as in Piece   14 entries
#   10 first of its units, 11 first of its partial sums: in the workspace
#   12 partial sums of a unit; where there is one, it is the sum
#   13 height: rows of one of its matrices (of sums of rows: entries of a row)


@jit
def _row_sums_kernel(
    table_ptr,
    map_ptr,
    workspace_ptr,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums of g^2 over chunks of rows; the last row may be shorter than the pitch."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(map_ptr + program).to(tl.int64) * 16
    tile = program - tl.load(row + 5).to(tl.int32)
    pitch = _length(row + 7, VECTOR)
    parts = tl.load(row + 12).to(tl.int32)
    first = (tile // parts).to(tl.int64) * ROWS  # row
    part = tile % parts
    start = part.to(tl.int64) * CHUNK
    begin = first * pitch + start
    g_ptr = _pointer(tl.load(row + 1), GRAD, VECTOR) + begin
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    # entries of each row that are in its chunk: of a whole row, then of the last one
    width = tl.minimum(pitch - start, _length(row + 14, VECTOR) - begin - r * pitch)
    width = tl.minimum(tl.maximum(width, 0), CHUNK).to(tl.int32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for done in tl.static_range(0, CHUNK, BLOCK):
        offset = (r * pitch)[:, None] + (done + c)[None, :]
        mask = (done + c)[None, :] < width[:, None]
        g = tl.load(g_ptr + offset, mask=mask, other=0).to(tl.float32)
        total += g * g
    unit = first + r
    out = workspace_ptr + tl.load(row + 11) + unit * parts + part
    tl.store(out, tl.sum(total, 1), mask=unit < tl.load(row + 6))


@jit
def _column_sums_kernel(
    table_ptr,
    map_ptr,
    workspace_ptr,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums of g^2 over chunks of the columns of stacked matrices."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(map_ptr + program).to(tl.int64) * 16
    tile = program - tl.load(row + 5).to(tl.int32)
    pitch = _length(row + 7, VECTOR)
    parts = tl.load(row + 12).to(tl.int32)
    height = tl.load(row + 13)
    across = tl.cdiv(pitch, BLOCK).to(tl.int32)
    part = (tile // across).to(tl.int64)  # of all matrices
    column = (tile % across).to(tl.int64) * BLOCK
    first = part % parts * CHUNK  # row of its matrix
    begin = (part // parts * height + first) * pitch + column
    g_ptr = _pointer(tl.load(row + 1), GRAD, VECTOR) + begin
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = c < tl.minimum(pitch - column, BLOCK).to(tl.int32)
    rows = tl.minimum(height - first, CHUNK).to(tl.int32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for done in range(0, CHUNK, ROWS):
        offset = ((done + r) * pitch)[:, None] + c[None, :]
        mask = (done + r < rows)[:, None] & inside[None, :]
        g = tl.load(g_ptr + offset, mask=mask, other=0).to(tl.float32)
        total += g * g
    out = workspace_ptr + tl.load(row + 11) + part * pitch + column
    tl.store(out + c, tl.sum(total, 0), mask=inside)


@jit
def _reduce_kernel(
    table_ptr,
    map_ptr,
    hyper_ptr,
    workspace_ptr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the partial sums of units in a fixed order; with MOMENTS, on to v and step sizes."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(map_ptr + program).to(tl.int64) * 16
    units = tl.load(row + 6)
    if MOMENTS:
        h = hyper_ptr + tl.load(row + 4) * 8
        units = tl.where(tl.load(h + 7) == 0, units, 0)
    tile = (program - tl.load(row + 5)).to(tl.int64)
    pitch = tl.load(row + 7)  # from one partial sum of a unit to the next
    parts = tl.load(row + 12).to(tl.int32)
    unit = tile * ROWS + tl.arange(0, ROWS)
    inside = unit < units
    k = tl.arange(0, BLOCK)
    begin = workspace_ptr + tl.load(row + 11) + unit // pitch * parts * pitch + unit % pitch
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for done in range(0, parts, BLOCK):
        mask = inside[:, None] & (done + k < parts)[None, :]
        total += tl.load(begin[:, None] + ((done + k) * pitch)[None, :], mask=mask, other=0)
    sums = tl.sum(total, 1)
    if MOMENTS:
        scale = tl.load(h + 6)
        v_ptr = _pointer(tl.load(row + 3), "fp32", 1) + unit
        v = tl.load(v_ptr, mask=inside, other=0)
        means = sums * scale * (scale / tl.load(row + 13).to(tl.float32))
        v = _next_moments(v, means, tl.load(h + 3))
        tl.store(v_ptr, v, mask=inside)
        sums = _step_size(v, tl.load(h), tl.load(h + 4), tl.load(h + 5))
    tl.store(workspace_ptr + tl.load(row + 10) + unit, sums, mask=inside)


@jit
def _one_pass_kernel(
    table_ptr,
    map_ptr,
    hyper_ptr,
    keys_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    ROUND_P: tl.constexpr,
    ROUND_M: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """The whole step of some rows: all that fit a tile, or one, in two loops over its entries."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(map_ptr + program).to(tl.int64) * 16
    work = tl.load(row + 4)
    h = hyper_ptr + work * 8
    if tl.load(h + 7) != 0:
        return
    tile = (program - tl.load(row + 5)).to(tl.int64)
    length = _length(row + 7, VECTOR)
    first = tile * ROWS
    begin = first * length
    p_ptr = _pointer(tl.load(row), PARAM, VECTOR) + begin
    g_ptr = _pointer(tl.load(row + 1), GRAD, VECTOR) + begin
    m_ptr = _pointer(tl.load(row + 2), EXP_AVG, VECTOR) + begin
    v_ptr = _pointer(tl.load(row + 3), "fp32", 1) + first
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    rows = r < tl.load(row + 6) - first
    width = length.to(tl.int32)
    mask = rows[:, None] & (c < width)[None, :]
    offset = c[None, :]
    if ROWS > 1:
        offset += (r * width)[:, None]
    # All loads stand before the sum, so that they are under way together.
    v = tl.load(v_ptr + r, mask=rows, other=0)
    step_size = tl.load(h)
    decay = tl.load(h + 1)
    weight1 = tl.load(h + 2)
    weight2 = tl.load(h + 3)
    root = tl.load(h + 4)
    eps = tl.load(h + 5)
    scale = tl.load(h + 6)
    key = 0
    index = tl.zeros([ROWS, BLOCK], tl.int64)
    if ROUND_P or ROUND_M:
        key = tl.load(keys_ptr + work).to(tl.uint32)
        index += tl.load(row + 8) + ((first + r) * tl.load(row + 9))[:, None] + c[None, :]

    if LOOPED:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for done in range(0, width, BLOCK):
            inside = (done + c < width)[None, :]
            g = tl.load(g_ptr + done + offset, mask=inside, other=0, eviction_policy="evict_last")
            squares += g.to(tl.float32) * g.to(tl.float32)
    else:
        g = tl.load(g_ptr + offset, mask=mask, other=0).to(tl.float32)
        m = tl.load(m_ptr + offset, mask=mask, other=0).to(tl.float32)
        p = tl.load(p_ptr + offset, mask=mask, other=0).to(tl.float32)
        squares = g * g
    means = tl.sum(squares, 1) * scale * (scale / length.to(tl.float32))
    v = _next_moments(v, means, weight2)
    tl.store(v_ptr + r, v, mask=rows)
    s = _step_size(v, step_size, root, eps)[:, None]

    if LOOPED:
        for done in range(0, width, BLOCK):
            inside = (done + c < width)[None, :]
            here = done + offset
            g = tl.load(g_ptr + here, mask=inside, other=0, eviction_policy="evict_first")
            m = tl.load(m_ptr + here, mask=inside, other=0, eviction_policy="evict_first")
            p = tl.load(p_ptr + here, mask=inside, other=0, eviction_policy="evict_first")
            _update(
                p_ptr + here, m_ptr + here, p.to(tl.float32), g.to(tl.float32), m.to(tl.float32),
                inside, s, decay, weight1, scale, done + index, key,
                PARAM, EXP_AVG, ROUND_P, ROUND_M,
            )  # fmt: skip
    else:
        _update(
            p_ptr + offset, m_ptr + offset, p, g, m, mask, s, decay, weight1, scale, index, key,
            PARAM, EXP_AVG, ROUND_P, ROUND_M,
        )  # fmt: skip


@jit
def _apply_kernel(
    table_ptr,
    map_ptr,
    hyper_ptr,
    keys_ptr,
    units_ptr,
    KIND: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    ROUND_P: tl.constexpr,
    ROUND_M: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of a matrix whose step sizes are known, or of an elementwise piece (one row)."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(map_ptr + program).to(tl.int64) * 16
    work = tl.load(row + 4)
    h = hyper_ptr + work * 8
    if tl.load(h + 7) != 0:
        return
    tile = program - tl.load(row + 5).to(tl.int32)
    pitch = _length(row + 7, VECTOR)
    height = tl.load(row + 13)
    across = tl.cdiv(pitch, BLOCK).to(tl.int32)
    down = tl.cdiv(height, ROWS).to(tl.int32)
    column = (tile % across).to(tl.int64) * BLOCK
    matrix = (tile // across // down).to(tl.int64)
    inner = (tile // across % down).to(tl.int64) * ROWS  # row of its matrix
    first = matrix * height + inner
    begin = first * pitch + column
    p_ptr = _pointer(tl.load(row), PARAM, VECTOR) + begin
    g_ptr = _pointer(tl.load(row + 1), GRAD, VECTOR) + begin
    m_ptr = _pointer(tl.load(row + 2), EXP_AVG, VECTOR) + begin
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    rows = r < tl.minimum(height - inner, ROWS).to(tl.int32)
    columns = c < tl.minimum(pitch - column, BLOCK).to(tl.int32)
    offset = (r * pitch)[:, None] + c[None, :]
    mask = rows[:, None] & columns[None, :]
    g = tl.load(g_ptr + offset, mask=mask, other=0).to(tl.float32)
    m = tl.load(m_ptr + offset, mask=mask, other=0).to(tl.float32)
    p = tl.load(p_ptr + offset, mask=mask, other=0).to(tl.float32)
    scale = tl.load(h + 6)
    if KIND == "elementwise":
        v_ptr = _pointer(tl.load(row + 3), "fp32", VECTOR) + begin + offset
        v = tl.load(v_ptr, mask=mask, other=0)
        scaled = g * scale
        v = _next_moments(v, scaled * scaled, tl.load(h + 3))
        tl.store(v_ptr, v, mask=mask)
        s = _step_size(v, tl.load(h), tl.load(h + 4), tl.load(h + 5))
    else:
        s_ptr = units_ptr + tl.load(row + 10)
        if KIND == "row":
            s = tl.load(s_ptr + first + r, mask=rows, other=0)[:, None]
        else:
            s = tl.load(s_ptr + matrix * pitch + column + c, mask=columns, other=0)[None, :]
    key = 0
    index = tl.zeros([ROWS, BLOCK], tl.int64)
    if ROUND_P or ROUND_M:
        key = tl.load(keys_ptr + work).to(tl.uint32)
        index += tl.load(row + 8) + ((first + r) * tl.load(row + 9))[:, None]
        index += (column + c)[None, :]
    _update(
        p_ptr + offset, m_ptr + offset, p, g, m, mask, s,
        tl.load(h + 1), tl.load(h + 2), scale, index, key, PARAM, EXP_AVG, ROUND_P, ROUND_M,
    )  # fmt: skip


_KERNELS = {
    "row_sums": _row_sums_kernel,
    "column_sums": _column_sums_kernel,
    "reduce": _reduce_kernel,
    "one_pass": _one_pass_kernel,
    "apply": _apply_kernel,
}


def one_pass(
    works: Sequence[Work],
    hyper: Tensor,
    *,
    round_params: bool = False,
    keys: Tensor | None = None,
) -> None:
    """The whole step, in place, of pieces whose units are whole blocks (elementwise or row).

    Pieces without entries keep their exp_avg_sq. Can be captured in a CUDA graph after one call on
    the same tensors.

    Args:
        works: their pieces do not overlap; see `why_not`.
        hyper: [len(works), 8], see HYPER; fp32 on the device of the works spares a copy.
        round_params: bf16 parameters are rounded stochastically instead of to the nearest.
        keys: [len(works)] int64 on the device of the works, in place of their `key`.

    Raises:
        ValueError: works that the kernels cannot take, column pieces among them, or a tensor of
            another shape.
        RuntimeError: captured without a call on the same tensors before.

    Source: arXiv 2406.16793, the update rule.
    """
    if works:
        table = table_of("one_pass", works, round_params)
        workspace = _workspace(table)
        _launch(table, works, hyper, keys, workspace, workspace)


def unit_sums(works: Sequence[Work]) -> Tensor:
    """Sums of the squared gradient over every unit of every piece.

    Args:
        works: pieces of any kind; see `why_not`. Only the gradients are read.

    Returns:
        [sum of n_units] fp32, in the order of works, then of units (an elementwise piece: runs of
        ELEMENTWISE_UNIT entries, the last may be shorter).

    Raises:
        ValueError: works that the kernels cannot take.
        RuntimeError: captured without a call on the same tensors before.
    """
    if not works:
        return torch.zeros(0, dtype=torch.float32)
    table = table_of("unit_sums", works)
    workspace = _workspace(table)
    _launch(table, works, None, None, workspace, None)
    return workspace[: table.n_units]


def apply(
    works: Sequence[Work],
    hyper: Tensor,
    steps: Tensor,
    *,
    round_params: bool = False,
    keys: Tensor | None = None,
) -> None:
    """Updates parameters and first moments, in place, with the step size of every unit given.

    Elementwise pieces update their exp_avg_sq too, and do not read `steps`; the exp_avg_sq of other
    pieces is neither read nor written.

    Args:
        works: pieces of any kind.
        hyper: as in `one_pass`; weight2, root and eps matter to elementwise pieces only.
        steps: [sum of n_units], the s_u of every unit, in the order of `unit_sums`.
        round_params, keys: as in `one_pass`.

    Raises:
        ValueError: works that the kernels cannot take, or a tensor of another shape.
        RuntimeError: captured without a call on the same tensors before.

    Source: arXiv 2406.16793, the update rule.
    """
    if works:
        table = table_of("apply", works, round_params)
        device = works[0].grad.device
        steps = _on_device("steps", steps, (table.n_units,), torch.float32, device)
        _launch(table, works, hyper, keys, None, steps)


def _workspace(table: Table) -> Tensor:
    return torch.empty(table.n_workspace, dtype=torch.float32, device=table.rows.device)


def _launch(
    table: Table,
    works: Sequence[Work],
    hyper: Tensor | None,
    keys: Tensor | None,
    workspace: Tensor | None,
    steps: Tensor | None,
) -> None:
    device = works[0].grad.device
    if hyper is not None:
        hyper = _on_device("hyper", hyper, (len(works), len(HYPER)), torch.float32, device)
    if not table.rounds:
        keys = None
    elif keys is None:
        keys = torch.tensor([work.key for work in works], dtype=torch.int64, device="cpu")
    if keys is not None:
        keys = _on_device("keys", keys, (len(works),), torch.int64, device)
    arguments = {
        "row_sums": (workspace,),
        "column_sums": (workspace,),
        "reduce": (hyper, workspace),
        "one_pass": (hyper, keys),
        "apply": (hyper, keys, steps),
    }
    with torch.cuda.device_of(table.rows):
        for kernel, options, programs, rows_of in table.launches:
            grid = (programs,)
            _KERNELS[kernel][grid](table.rows, rows_of, *arguments[kernel], **options)
    if hyper is not None:  # autograd must see that a saved parameter is no longer what it was
        increment_version([t for w in works for t in (w.param, w.exp_avg, w.exp_avg_sq)])


def _on_device(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, found {list(tensor.shape)}")
    if tensor.device != device and is_capturing(device):
        raise RuntimeError(f"{name}: expected a tensor on {device} while a CUDA graph is captured")
    return tensor.to(device, dtype).contiguous()
