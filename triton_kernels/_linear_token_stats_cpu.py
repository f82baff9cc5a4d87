"""`linear_token_stats` without Triton: plain PyTorch over tiles of logits.

Formulas and letters are those of token_stats.py. A tile has ENTRIES logits, 2 MB in fp32, of ROWS
tokens or of all if there are fewer; two or three live at a time. Columns are the outer loop, so
that each entry of `weight` is read once a sweep. Ignored rows are skipped. fp32, or fp64 for fp64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rows import sum_dtype
from ._token_stats_cpu import FLOOR, kept_mask, logit_gradient
from ._token_sums import IGNORED, KeptSums, Options, WholeSums, add_whole
from ._transform import transform, transform_

ROWS, ENTRIES = 512, 2**19
SLACK = 0.01  # nats: a bound is computed in another order than its tile
ROUNDING = 3e-5  # of a sum of products in fp32, relative to the sum of their magnitudes


class Head:
    """A linear head and the rows that are read through it, tile by tile.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
        y: [N] local labels.
        options: those of `token_stats`.
    """

    def __init__(self, hidden, weight, bias, y: Tensor, options: Options) -> None:
        self.hidden, self.weight, self.bias, self.options = hidden, weight, bias, options
        self.dtype = sum_dtype(hidden)
        self.all_y = y
        self.rows = (y != IGNORED).nonzero().squeeze(-1)
        self.y = y[self.rows]
        self.height = max(1, min(ROWS, len(self.rows)))
        self.width = max(1, ENTRIES // self.height)
        self.row_slices = _slices(len(self.rows), self.height)
        self.column_slices = _slices(len(weight), self.width)

    def hidden_rows(self, rows: slice) -> Tensor:
        """[rows, D] in fp32 or fp64."""
        if len(self.rows) == len(self.hidden):
            return self.hidden[rows].to(self.dtype)
        return self.hidden.index_select(0, self.rows[rows]).to(self.dtype)

    def columns(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Weight [columns, D] and bias [columns], in fp32 or fp64."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return self.weight[columns].to(self.dtype), bias

    def tile(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x of a tile."""
        z = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
        return transform_(z, self.options.temperature, self.options.softcap)

    def labels(self, rows: slice, columns: slice) -> Tensor:
        """[rows, 1] labels as columns of the tile, negative where they are elsewhere."""
        y = self.y[rows] - columns.start
        return torch.where((y >= 0) & (y < columns.stop - columns.start), y, -2)[:, None]

    def label_floor(self, rows: slice) -> Tensor:
        """[rows] a number that the label's x surely reaches, -inf where the label is elsewhere."""
        y = self.y[rows]
        column = y.clamp_min(0)
        terms = self.hidden_rows(rows) * self.weight[column].to(self.dtype)
        z = terms.sum(-1)
        rounding = ROUNDING * terms.abs_().sum(-1) / self.options.temperature
        if self.bias is not None:
            z += self.bias[column]
        x = transform(z, self.options.temperature, self.options.softcap)
        exact = torch.get_float32_matmul_precision() == "highest"  # else tiles are of other numbers
        return torch.where((y >= 0) & exact, x - rounding, -torch.inf)

    def empty(self, numbers: int) -> list[Tensor]:
        return [self.hidden.new_zeros(len(self.rows), dtype=self.dtype) for _ in range(numbers)]

    def scattered(self, values: Tensor) -> Tensor:
        """[N] of [live rows], 0 at ignored ones."""
        whole = values.new_zeros(len(self.all_y))
        return whole.index_copy_(0, self.rows, values)

    def with_labels(self, live: Tensor) -> Tensor:
        """`live` with the tiles that hold a label."""
        rows = torch.arange(len(self.y), device=self.y.device)
        here = self.y >= 0
        live = live.clone()
        live[rows[here] // self.height, self.y[here] // self.width] = True
        return live

    def live_without_broken(self, live: Tensor, y: Tensor) -> Tensor | None:
        """`live` for a head without the rows that `y` has come to ignore: its blocks of rows are
        others then, so none of its tiles may be skipped."""
        return live if len(self.rows) == int((y != IGNORED).sum()) else None

    def skipped_fraction(self, live: Tensor) -> Tensor:
        """[N] share of the tiles of a row that are not live; 0 at ignored rows."""
        share = 1 - live.to(self.dtype).mean(1)
        return self.scattered(share.repeat_interleave(self.height)[: len(self.rows)])


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def _tiles(head: Head) -> Iterator[tuple[int, int, slice, slice, Tensor, Tensor]]:
    """(row block, tile, rows, columns, weight, bias) of every tile, columns outermost."""
    for j, columns in enumerate(head.column_slices):
        weight, bias = head.columns(columns)
        for i, rows in enumerate(head.row_slices):
            yield i, j, rows, columns, weight, bias


def whole_sums(head: Head, track: bool) -> tuple[WholeSums, Tensor | None]:
    """Sums [N] of this shard, and for each tile the bound of its excess, as Triton's has
    it, if asked to `track` it."""
    pruned = head.options.prune is not None
    sums = WholeSums(*head.empty(6))
    sums.top.fill_(torch.finfo(head.dtype).min)
    bound = floors = None
    if track:
        shape = len(head.row_slices), len(head.column_slices)
        bound = head.hidden.new_zeros(shape, dtype=head.dtype)
        floors = [head.label_floor(rows) for rows in head.row_slices]
    for i, j, rows, columns, weight, bias in _tiles(head):
        x = head.tile(head.hidden_rows(rows), weight, bias)
        column = head.labels(rows, columns)
        here = (column >= 0).squeeze(-1)
        label = x.gather(-1, column.clamp_min(0)).squeeze(-1)
        row_max = x.amax(-1)
        top = torch.maximum(sums.top[rows], row_max)
        d = x.sub_(top[:, None]).clamp_(min=FLOOR)
        e = d.exp()
        s1 = e.sum(-1)
        sd = s2 = torch.zeros_like(s1)
        if not pruned:
            sd = d.mul_(e).sum(-1)
            s2 = e.square_().sum(-1)
        tile = WholeSums(top, s1, s2, sd, torch.where(here, label, 0), here.to(s1.dtype))
        running = add_whole(WholeSums(*(t[rows] for t in sums)), tile)
        for total, value in zip(sums, running):
            total[rows] = value
        if track:
            level = running.top if pruned else running.top + running.s1.log()
            excess = row_max - torch.maximum(level, floors[i])
            bound[i, j] = excess.nan_to_num(torch.inf, torch.inf, -torch.inf).amax()
    return WholeSums(*map(head.scattered, sums)), bound


def kept_sums(head: Head, top: Tensor, bound: Tensor) -> tuple[KeptSums, Tensor]:
    """Sums [N] of this shard over K, and which tiles hold an entry of it (bool, as `bound`)."""
    sums = KeptSums(*head.empty(4))
    top = top[head.rows, None]
    live = bound >= head.options.log_rho - SLACK
    for i, j, rows, columns, weight, bias in _tiles(head):
        column = head.labels(rows, columns)
        if not live[i, j] and (column < 0).all():
            continue
        x = head.tile(head.hidden_rows(rows), weight, bias)
        kept = kept_mask(x, top[rows], column, head.options)
        # a broken row (top NaN) keeps its tiles, so that its NaN reaches the gradient
        live[i, j] = bool(kept.any()) or bool(top[rows].isnan().any())
        d = x.sub_(top[rows]).clamp_(min=FLOOR)
        e = d.exp().mul_(kept)
        sums.count[rows] += kept.sum(-1)
        sums.s1[rows] += e.sum(-1)
        sums.sd[rows] += d.mul_(e).sum(-1)
        sums.s2[rows] += e.square_().sum(-1)
    return KeptSums(*map(head.scattered, sums)), live


def gradients(
    head: Head,
    saved: list[Tensor | None],
    upstream: list[Tensor | None],
    live: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for hidden, weight and bias, those that are needed, in their dtypes.

    Args:
        head: the head.
        saved: [N] each: top, log_sum, log_kept_mass (None: not pruned), entropy, sum_p2.
        upstream: [N] each, None where there is none: of logp, entropy, sum_p2, logsumexp,
            log_kept_mass.
        live: [row blocks, column blocks] bool, tiles that have a gradient; None: all.
        needed: which of the three.
    """
    hidden, weight, bias = head.hidden, head.weight, head.bias
    saved = [t if t is None else t[head.rows, None] for t in saved]
    upstream = [t if t is None else t[head.rows, None] for t in upstream]
    grad_rows = hidden.new_zeros(len(head.rows), hidden.shape[1], dtype=head.dtype)
    grad_weight = torch.zeros_like(weight) if needed[1] else None
    grad_bias = torch.zeros_like(bias) if needed[2] else None
    for j, columns in enumerate(head.column_slices):
        if live is not None and not live[:, j].any():
            continue
        w, b = head.columns(columns)
        weight_sum = torch.zeros_like(w) if needed[1] else None
        bias_sum = torch.zeros_like(b) if needed[2] else None
        for i, rows in enumerate(head.row_slices):
            if live is not None and not live[i, j]:
                continue
            h = head.hidden_rows(rows)
            dz = logit_gradient(
                head.tile(h, w, b),
                head.labels(rows, columns),
                [t if t is None else t[rows] for t in saved],
                [t if t is None else t[rows] for t in upstream],
                head.options,
            )
            if needed[0]:
                grad_rows[rows].addmm_(dz, w)
            if needed[1]:
                weight_sum.addmm_(dz.t(), h)
            if needed[2]:
                bias_sum += dz.sum(0)
        if needed[1]:
            grad_weight[columns] = weight_sum
        if needed[2]:
            grad_bias[columns] = bias_sum
    if not needed[0]:
        return None, grad_weight, grad_bias
    if len(head.rows) == len(hidden):
        return grad_rows.to(hidden.dtype), grad_weight, grad_bias
    grad_hidden = torch.zeros_like(hidden).index_copy_(0, head.rows, grad_rows.to(hidden.dtype))
    return grad_hidden, grad_weight, grad_bias
