"""The step of adam_mini.py in plain PyTorch, and the pieces of tensors that it works on.

Formulas and letters are those of adam_mini.py. Temporaries are a few chunks of `_CHUNK` entries.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Entries of an elementwise piece that share one partial sum of g^2 in `unit_sums`.
ELEMENTWISE_UNIT = 4096
# Entries that the PyTorch form works on at a time: three fp32 tensors of this size fit an L2 cache.
_CHUNK = 1 << 17

# Columns of `hyper`, one row per piece, fp32 or fp64:
#   step_size    lr / (1 - beta1^t)
#   decay        1 - lr * weight_decay
#   weight1      1 - beta1
#   weight2      1 - beta2
#   root         1 / sqrt(1 - beta2^t)
#   eps
#   grad_scale   factor on the gradient: clipping, unscaling, -1 to maximize
#   skip         0 to update; else the piece is left as it is
HYPER = ("step_size", "decay", "weight1", "weight2", "root", "eps", "grad_scale", "skip")


class Piece(NamedTuple):
    """A part of a flattened contiguous tensor that is cut into units in one way.

    Args:
        kind: "elementwise", "row" or "column".
        shape: elementwise (n,); row (U, L), unit u is entries [u * L, (u + 1) * L); column
            (B, L, U), unit (b, u) is the column u of matrix b: L entries, U apart.
        offset: first entry of the piece in the flattened param, grad and exp_avg.
        first: first entry of the piece in the flattened exp_avg_sq: of entry 0 if elementwise,
            of unit 0 else. Read by `one_pass`, and by `apply` if elementwise.
        index: number of the first entry in the whole (unsharded) tensor, for stochastic rounding.
        stride: distance in the whole tensor between neighbouring rows: from unit to unit of a row
            piece, from entry to entry of a column. Entry (r, c) is number index + r * stride + c.
    """

    kind: Literal["elementwise", "row", "column"]
    shape: tuple[int, ...]
    offset: int = 0
    first: int = 0
    index: int = 0
    stride: int = 0

    @property
    def n_entries(self) -> int:
        """Entries in the piece."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def n_units(self) -> int:
        """Numbers that `unit_sums` returns for the piece."""
        if self.kind == "elementwise":
            return -(-self.shape[0] // ELEMENTWISE_UNIT)
        return self.shape[0] if self.kind == "row" else self.shape[0] * self.shape[2]


class Work(NamedTuple):
    """One piece with its tensors: contiguous, of one device; the same tensors in many works.

    param, grad and exp_avg have equally many entries, of fp32, bf16 or fp16 each (or all fp64);
    exp_avg_sq is fp32 (fp64), one number per block. `key`: 32 bits, for stochastic rounding,
    where no `keys` are given.
    """

    piece: Piece
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    key: int = 0


def one_pass_reference(
    works: Sequence[Work],
    hyper: Tensor,
    *,
    round_params: bool = False,
    keys: Tensor | None = None,
) -> None:
    """What `one_pass` does, in plain PyTorch; also in fp64, and on any device."""
    for work, h in zip(_with_keys(works, keys), hyper.tolist(), strict=True):
        piece = work.piece
        if piece.n_entries == 0:  # no mean
            continue
        if piece.kind == "elementwise" or h[7]:
            _apply_elementwise(work, h, round_params)
            continue
        units, length = piece.shape
        v = work.exp_avg_sq.view(-1)[piece.first : piece.first + units]
        step_size, _, _, weight2, root, eps, grad_scale, _ = h
        rows = max(1, _CHUNK // max(length, 1))
        for start in range(0, units, rows):
            stop = min(start + rows, units)
            part = piece._replace(
                shape=(stop - start, length),
                offset=piece.offset + start * length,
                index=piece.index + start * piece.stride,
            )
            part = work._replace(piece=part)
            means = _row_sums(part).to(v.dtype).mul_(grad_scale * grad_scale / length)
            moment = v[start:stop].lerp_(means, weight2)
            _apply_rows(part, h, step_size / moment.sqrt().mul_(root).add_(eps), round_params)


def unit_sums_reference(works: Sequence[Work]) -> Tensor:
    """What `unit_sums` returns, in plain PyTorch; fp64 if the moments are."""
    sums = []
    for work in works:
        piece = work.piece
        if piece.kind == "row":
            sums.append(_row_sums(work))
        elif piece.kind == "column":
            sums.append(_column_sums(work))
        else:
            full, rest = divmod(piece.shape[0], ELEMENTWISE_UNIT)
            runs = Piece("row", (full, ELEMENTWISE_UNIT), piece.offset)
            last = Piece("row", (min(rest, 1), rest), piece.offset + full * ELEMENTWISE_UNIT)
            sums += [_row_sums(work._replace(piece=part)) for part in (runs, last)]
    return torch.cat(sums) if sums else torch.zeros(0)


def apply_reference(
    works: Sequence[Work],
    hyper: Tensor,
    steps: Tensor,
    *,
    round_params: bool = False,
    keys: Tensor | None = None,
) -> None:
    """What `apply` does, in plain PyTorch; also in fp64, and on any device."""
    start = 0
    for work, h in zip(_with_keys(works, keys), hyper.tolist(), strict=True):
        piece = work.piece
        mine = steps[start : start + piece.n_units]
        start += piece.n_units
        if piece.kind == "elementwise":
            _apply_elementwise(work, h, round_params)
        elif h[7]:
            continue
        elif piece.kind == "row":
            _apply_rows(work, h, mine, round_params)
        else:
            _apply_columns(work, h, mine, round_params)


def _with_keys(works: Sequence[Work], keys: Tensor | None) -> Sequence[Work]:
    if keys is None:
        return works
    return [work._replace(key=key) for work, key in zip(works, keys.tolist(), strict=True)]


def _row_sums(work: Work) -> Tensor:
    units, length = work.piece.shape
    dtype = _compute_dtype(work)
    sums = torch.zeros(units, dtype=dtype, device=work.grad.device)
    grad = _matrix(work.grad, work.piece)
    for rows, columns in _tiles(units, length):
        # fp16 is squared in fp32, where it cannot overflow.
        sums[rows] += torch.linalg.vector_norm(grad[rows, columns], dim=1, dtype=dtype).square_()
    return sums


def _column_sums(work: Work) -> Tensor:
    batch, length, units = work.piece.shape
    dtype = _compute_dtype(work)
    sums = torch.zeros(batch, units, dtype=dtype, device=work.grad.device)
    for b, part in enumerate(_matrices(work)):
        grad = _matrix(part.grad, part.piece)
        for rows, columns in _tiles(length, units):
            squares = torch.linalg.vector_norm(grad[rows, columns], dim=0, dtype=dtype).square_()
            sums[b, columns] += squares
    return sums.view(-1)


def _apply_rows(work: Work, h: list[float], steps: Tensor, round_params: bool) -> None:
    units, length = work.piece.shape
    for rows, columns in _tiles(units, length):
        _apply_tile(work, h, steps[rows, None], rows, columns, round_params)


def _apply_columns(work: Work, h: list[float], steps: Tensor, round_params: bool) -> None:
    batch, length, units = work.piece.shape
    for part, mine in zip(_matrices(work), steps.view(batch, units), strict=True):
        for rows, columns in _tiles(length, units):
            _apply_tile(part, h, mine[columns], rows, columns, round_params)


def _apply_elementwise(work: Work, h: list[float], round_params: bool) -> None:
    step_size, _, _, weight2, root, eps, grad_scale, skip = h
    if skip:
        return
    piece = work.piece
    flat = work._replace(piece=piece._replace(kind="row", shape=(1, piece.shape[0])))
    v = work.exp_avg_sq.view(-1)[piece.first : piece.first + piece.shape[0]]
    for rows, columns in _tiles(1, piece.shape[0]):
        g = _matrix(work.grad, flat.piece)[rows, columns].to(v.dtype) * grad_scale
        moment = v[None, columns].lerp_(g.square_(), weight2)
        steps = step_size / moment.sqrt().mul_(root).add_(eps)
        _apply_tile(flat, h, steps, rows, columns, round_params)


def _apply_tile(
    work: Work, h: list[float], steps: Tensor, rows: slice, columns: slice, round_params: bool
) -> None:
    """m and p of one tile of a matrix; `steps` broadcasts over it."""
    piece = work.piece
    _, decay, weight1, _, _, _, grad_scale, _ = h
    dtype = _compute_dtype(work)
    param, grad, exp_avg = (
        _matrix(tensor, piece)[rows, columns] for tensor in (work.param, work.grad, work.exp_avg)
    )
    rounded_m, rounded_p = (
        exp_avg.dtype == torch.bfloat16,
        round_params and param.dtype == torch.bfloat16,
    )
    noise = None
    if rounded_m or rounded_p:
        r = torch.arange(rows.start, rows.stop, device=param.device)[:, None]
        c = torch.arange(columns.start, columns.stop, device=param.device)
        noise = rounding_noise(piece.index + r * piece.stride + c, work.key)
    g = grad.to(dtype)
    if grad_scale != 1:
        g = g * grad_scale
    m = exp_avg.to(dtype).lerp_(g, weight1)
    if m.data_ptr() != exp_avg.data_ptr():
        exp_avg.copy_(round_stochastically(m, noise & 0xFFFF) if rounded_m else m)
    p = param.to(dtype).mul_(decay).addcmul_(m, steps.to(dtype), value=-1)
    if p.data_ptr() != param.data_ptr():
        param.copy_(round_stochastically(p, noise >> 16) if rounded_p else p)


def rounding_key(seed: int, parameter: int, step: int) -> int:
    """The 32-bit key of one parameter at one step.

    Args:
        seed: of the optimizer.
        parameter: its position among the parameters of the optimizer.
        step: t, 1 for the first step.

    Returns:
        An integer in [0, 2^32).
    """
    key = 0
    for number in (seed, parameter, step):
        key = _mix((key ^ (number & 0xFFFFFFFF)) + 0x9E3779B9 & 0xFFFFFFFF)
    return key


def rounding_noise(index: Tensor, key: int) -> Tensor:
    """32 random bits for every entry: a hash of its number and the key.

    Args:
        index: int64, number of the entry in the whole tensor.
        key: from `rounding_key`.

    Returns:
        int64 in [0, 2^32), the shape of `index`: the lower 16 bits are for the first moment, the
        upper 16 for the parameter.

    Source: the mixing function is "lowbias32" of C. Wellons' hash-prospector (public domain).
    """
    high = (index >> 32) * 0x9E3779B9
    return _mix((index ^ high ^ key) & 0xFFFFFFFF)


def _mix(x):
    """lowbias32 on an int, or on an int64 tensor, of 32 bits."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """Rounds fp32 to bf16, up or down with probabilities that keep the expected value.

    Args:
        x: fp32.
        noise: int64 in [0, 2^16), uniform; the shape of x.

    Returns:
        bf16; numbers that bf16 holds exactly, infinities and NaN stay what they are.
    """
    x = x.float()  # momentum of fp64 parameters
    rounded = (x.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def _compute_dtype(work: Work) -> torch.dtype:
    return torch.promote_types(work.exp_avg_sq.dtype, torch.float32)


def _matrix(tensor: Tensor, piece: Piece) -> Tensor:
    """The piece as the [rows, columns] it is stored in; a column piece must have B = 1."""
    rows, columns = piece.shape[-2:]
    return tensor.view(-1)[piece.offset : piece.offset + rows * columns].view(rows, columns)


def _matrices(work: Work) -> Iterator[Work]:
    """The stacked matrices of a column piece, one by one."""
    piece = work.piece
    batch, length, units = piece.shape
    for b in range(batch):
        yield work._replace(
            piece=piece._replace(
                shape=(1, length, units),
                offset=piece.offset + b * length * units,
                index=piece.index + b * length * piece.stride,
            )
        )


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cuts a matrix into tiles of at most _CHUNK entries: whole rows where they fit."""
    width = min(columns, _CHUNK)
    height = max(1, _CHUNK // max(width, 1))
    for row in range(0, rows, height):
        for column in range(0, columns, max(width, 1)):
            yield (
                slice(row, min(row + height, rows)),
                slice(column, min(column + width, columns)),
            )
