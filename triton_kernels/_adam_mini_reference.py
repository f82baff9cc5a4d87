"""The step of adam_mini.py in plain PyTorch, and the pieces of tensors that it works on.

Formulas and letters are those of adam_mini.py. Temporaries are a few chunks of `_CHUNK` entries.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Entries of an elementwise piece that share one partial sum of g^2 in `unit_sums`.
ELEMENTWISE_UNIT = 4096
# Entries that the PyTorch form works on at a time: more stay in no cache, fewer cost more calls.
_CHUNK = 1 << 19
# Longest rows whose squares are added up one after the other.
_IN_ORDER = 1 << 16

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
_STEP_SIZE, _DECAY, _WEIGHT1, _WEIGHT2, _ROOT, _EPS, _GRAD_SCALE, _SKIP = range(len(HYPER))


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
    """What `one_pass` does, in plain PyTorch; column pieces too, also in fp64, on any device."""
    for work, h in zip(_with_keys(works, keys), hyper.tolist(), strict=True):
        if h[_SKIP] or not work.piece.n_entries:  # no mean of nothing
            continue
        if work.piece.kind == "elementwise":
            _update_elementwise(work, h, round_params)
            continue
        first = work.piece.first
        for matrix in _matrices(work, h, round_params):
            v = work.exp_avg_sq.view(-1)[first : first + matrix.n_units]
            first += matrix.n_units
            for band in matrix.bands():
                moments = v[band]
                means = matrix.square_sums(band).mul_(h[_GRAD_SCALE] ** 2 / matrix.length)
                _update_moments(moments, means, h)
                matrix.update(band, _steps(moments, h))


def unit_sums_reference(works: Sequence[Work]) -> Tensor:
    """What `unit_sums` returns, in plain PyTorch; fp64 if the moments are."""
    sums = []
    for work in works:
        parts = [work]
        if work.piece.kind == "elementwise":
            full, rest = divmod(work.piece.shape[0], ELEMENTWISE_UNIT)
            runs = Piece("row", (full, ELEMENTWISE_UNIT), work.piece.offset)
            last = Piece("row", (1, rest), work.piece.offset + full * ELEMENTWISE_UNIT)
            parts = [work._replace(piece=piece) for piece in (runs, last) if piece.n_entries]
        sums += [
            matrix.square_sums(band)
            for part in parts
            for matrix in _matrices(part)
            for band in matrix.bands()
        ]
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
        mine = steps[start : start + work.piece.n_units]
        start += work.piece.n_units
        if h[_SKIP] or not work.piece.n_entries:
            continue
        if work.piece.kind == "elementwise":
            _update_elementwise(work, h, round_params)
            continue
        for i, matrix in enumerate(_matrices(work, h, round_params)):
            own = mine[i * matrix.n_units : (i + 1) * matrix.n_units].to(matrix.dtype)
            for band in matrix.bands():
                matrix.update(band, own[band])


def _with_keys(works: Sequence[Work], keys: Tensor | None) -> Sequence[Work]:
    if keys is None:
        return works
    return [work._replace(key=key) for work, key in zip(works, keys.tolist(), strict=True)]


def _update_moments(moments: Tensor, means: Tensor, h: Sequence[float]) -> None:
    new = torch.lerp(moments, means, h[_WEIGHT2])
    moments.copy_(new.where(~moments.isinf(), moments))  # overflowed ones stay: no inf - inf


def _steps(moments: Tensor, h: Sequence[float]) -> Tensor:
    """Step sizes from second moments."""
    denominators = moments.sqrt().mul_(h[_ROOT]).add_(h[_EPS])
    return denominators.reciprocal_().mul_(h[_STEP_SIZE])


def _update_elementwise(work: Work, h: Sequence[float], round_params: bool) -> None:
    n, first = work.piece.shape[0], work.piece.first
    row = work._replace(piece=work.piece._replace(kind="row", shape=(1, n)))
    v = work.exp_avg_sq.view(-1)[first : first + n]
    (matrix,) = _matrices(row, h, round_params)
    for tile in matrix.tiles(slice(0, 1)):
        moments = v[None, tile[1]]
        _update_moments(moments, matrix.gradient(tile).square(), h)
        matrix.update_tile(tile, _steps(moments, h))


class _Matrix:
    """A matrix of a row or column piece; the step comes to it band by band, tile by tile.

    A band is some of its units, whole: rows of about _CHUNK entries, or all columns.
    """

    def __init__(self, work: Work, h: Sequence[float], round_params: bool) -> None:
        piece = work.piece
        self.index, self.stride, self.key, self.h = piece.index, piece.stride, work.key, h
        self.dim = 1 if piece.kind == "row" else 0  # the one within a unit
        self.rows, self.columns = piece.shape[-2:]
        self.n_units, self.length = self.rows, self.columns
        if self.dim == 0:
            self.n_units, self.length = self.length, self.n_units
        tensors = (work.param, work.grad, work.exp_avg)
        if work.param.numel() != self.rows * self.columns:
            part = slice(piece.offset, piece.offset + self.rows * self.columns)
            tensors = (tensor.view(-1)[part] for tensor in tensors)
        self.param, self.grad, self.exp_avg = (
            tensor.view(self.rows, self.columns) for tensor in tensors
        )
        self.whole = (slice(0, self.rows), slice(0, self.columns))
        self.dtype = torch.promote_types(work.exp_avg_sq.dtype, torch.float32)
        self.round_exp_avg = work.exp_avg.dtype == torch.bfloat16
        self.round_param = round_params and work.param.dtype == torch.bfloat16
        rounds = self.round_exp_avg or self.round_param
        self.chunk = _CHUNK // 4 if rounds else _CHUNK  # noise is int64

    def bands(self) -> Iterator[slice]:
        """Units of every band: all columns, as parts of them are slow to walk through."""
        most = self.chunk // max(self.length, 1) if self.dim else self.n_units
        return _cut(self.n_units, max(most, 1))

    def tiles(self, band: slice) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of the tiles of a band, of about _CHUNK entries each."""
        for part in _cut(self.length, max(self.chunk // max(band.stop - band.start, 1), 1)):
            yield (band, part) if self.dim else (part, band)

    def part(self, tensor: Tensor, tile: tuple[slice, slice]) -> Tensor:
        """A tile of one of the tensors; of small ones, where Python is what takes time, all."""
        return tensor if tile == self.whole else tensor[tile]

    def square_sums(self, band: slice) -> Tensor:
        """Sums of g^2 over the units of a band."""
        sums = None
        for tile in self.tiles(band):
            g = self.part(self.grad, tile).to(self.dtype)  # squares of fp16 would overflow
            # vector_norm adds up in order: less exact along long rows, and slow down the columns.
            if self.dim and self.length <= _IN_ORDER:
                squares = torch.linalg.vector_norm(g, dim=1).square_()
            else:
                squares = g.square().sum(self.dim)
            sums = squares if sums is None else sums.add_(squares)
        if sums is None:
            sums = torch.zeros(band.stop - band.start, dtype=self.dtype, device=self.grad.device)
        return sums

    def update(self, band: slice, steps: Tensor) -> None:
        """m and p of a band; steps: [units]."""
        steps = steps[:, None] if self.dim else steps
        for tile in self.tiles(band):
            self.update_tile(tile, steps)

    def gradient(self, tile: tuple[slice, slice]) -> Tensor:
        """The scaled gradient in the dtype of the arithmetic; perhaps the memory of `.grad`."""
        g, scale = self.part(self.grad, tile).to(self.dtype), self.h[_GRAD_SCALE]
        return g if scale == 1 else g * scale

    def update_tile(self, tile: tuple[slice, slice], steps: Tensor) -> None:
        """m and p of a tile; `steps` broadcasts over it."""
        param, exp_avg = self.part(self.param, tile), self.part(self.exp_avg, tile)
        m = exp_avg.to(self.dtype).lerp_(self.gradient(tile), self.h[_WEIGHT1])
        p = param.to(self.dtype)
        if self.h[_DECAY] != 1:
            p = p.mul_(self.h[_DECAY])
        p.addcmul_(m, steps, value=-1)
        noise = self._noise(tile) if self.round_exp_avg or self.round_param else None
        if exp_avg.dtype != self.dtype:
            exp_avg.copy_(round_stochastically(m, noise & 0xFFFF) if self.round_exp_avg else m)
        if param.dtype != self.dtype:
            param.copy_(round_stochastically(p, noise >> 16) if self.round_param else p)

    def _noise(self, tile: tuple[slice, slice]) -> Tensor:
        rows, columns = (
            torch.arange(part.start, part.stop, device=self.param.device) for part in tile
        )
        return rounding_noise(self.index + rows[:, None] * self.stride + columns, self.key)


def _matrices(work: Work, h: Sequence[float] = (), round_params: bool = False) -> Iterator[_Matrix]:
    """The matrix of a row piece, or the stacked ones of a column piece."""
    piece = work.piece
    if piece.kind == "row":
        yield _Matrix(work, h, round_params)
        return
    batch, length, units = piece.shape
    for b in range(batch):
        part = piece._replace(
            shape=(length, units),
            offset=piece.offset + b * length * units,
            index=piece.index + b * length * piece.stride,
        )
        yield _Matrix(work._replace(piece=part), h, round_params)


def _cut(n: int, most: int) -> Iterator[slice]:
    """[0, n) in parts of about equal size, of at most `most`."""
    count = -(-n // most)
    for i in range(count):
        yield slice(n * i // count, n * (i + 1) // count)


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
