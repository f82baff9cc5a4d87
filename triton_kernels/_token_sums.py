"""Sums over a vocabulary that is split in parts: what one part gives, and how parts become one.

Parts are the splits of a kernel, the tiles of a matrix, the shards of a process group. Letters are
those of token_stats.py; d = x - top, K the kept entries.

    WholeSums: top >= every x of the part, s1 = sum e^d, s2 = sum e^(2d), sd = sum d e^d,
               label = x of the row's label and 0 elsewhere, found = 1 where the label is here
    KeptSums:  the same s1, s2, sd over K, relative to the top of the whole vocabulary; count = |K|

Labels are local to a part here: `IGNORED` rows take no part in anything, `ELSEWHERE` is a label
that another shard has (or that no shard has: then `found` stays 0).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from ._rows import check_group, check_number, check_softcap, check_temperature

IGNORED, ELSEWHERE = -1, -2
NONFINITE = ("nan", "skip", "raise")


class Options(NamedTuple):
    """What every path needs to know beside its tensors."""

    temperature: float
    softcap: float | None
    prune: float | None
    group: ProcessGroup | None
    nonfinite: str

    @property
    def log_rho(self) -> float:
        return 0.0 if self.prune is None else math.log(self.prune)


def make_options(temperature, softcap, prune, group, nonfinite) -> Options:
    """The options, after checks of each."""
    if prune is not None:
        prune = check_number(prune, "prune", 0, 1)
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {NONFINITE}, got {nonfinite!r}")
    check_group(group)
    return Options(check_temperature(temperature), check_softcap(softcap), prune, group, nonfinite)


class WholeSums(NamedTuple):
    """[N] or [parts, N], fp32 or fp64."""

    top: Tensor
    s1: Tensor
    s2: Tensor
    sd: Tensor
    label: Tensor
    found: Tensor


class KeptSums(NamedTuple):
    """[N] or [parts, N], fp32 or fp64; count is exact to 2^24 in fp32."""

    s1: Tensor
    s2: Tensor
    sd: Tensor
    count: Tensor


def add_whole(a: WholeSums, b: WholeSums) -> WholeSums:
    """Sums over both parts; b.top >= a.top."""
    a = _moved(a, b.top)
    return WholeSums(b.top, *(x + y for x, y in zip(a[1:], b[1:])))


def merge_whole(parts: WholeSums) -> WholeSums:
    """[N] of [parts, N], added in the order of the parts."""
    top = parts.top.amax(0)
    return _add_up(_moved(parts, top))


def _moved(sums: WholeSums, top: Tensor) -> WholeSums:
    """The same sums relative to a larger `top`."""
    shift = sums.top - top
    keep = shift.exp()
    shift = torch.where(keep == 0, 0, shift)  # else 0 * -inf
    return WholeSums(
        top,
        sums.s1 * keep,
        sums.s2 * keep.square(),
        keep * (sums.sd + shift * sums.s1),
        sums.label,
        sums.found,
    )


def _add_up(moved: WholeSums) -> WholeSums:
    return WholeSums(moved.top, *(x.sum(0) for x in moved[1:]))


def reduce_whole(sums: WholeSums, group: ProcessGroup | None) -> WholeSums:
    """Sums over all shards of `group`: one all-reduce of the maxima, one of the five sums."""
    if group is None:
        return sums
    top = sums.top.clone()
    dist.all_reduce(top, ReduceOp.MAX, group)
    packed = torch.stack(_moved(sums, top)[1:])
    dist.all_reduce(packed, ReduceOp.SUM, group)
    return WholeSums(top, *packed)


def reduce_kept(sums: KeptSums, group: ProcessGroup | None) -> KeptSums:
    """Sums over all shards of `group`, in one all-reduce."""
    if group is None:
        return sums
    packed = torch.stack(sums)
    dist.all_reduce(packed, ReduceOp.SUM, group)
    return KeptSums(*packed)


class Shard(NamedTuple):
    """Where a rank's columns lie in the whole vocabulary: first column and number of all columns.

    Ints in one process; 0-d tensors on the device in a group, so that nothing waits for them.
    """

    start: int | Tensor
    total: int | Tensor


def locate_shard(columns: int, group: ProcessGroup | None, device: torch.device) -> Shard:
    """The shard of this rank, shards lying in the order of the ranks; one all-reduce of sizes."""
    if group is None:
        return Shard(0, columns)
    check_group(group)
    rank = dist.get_rank(group)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[rank] = columns
    dist.all_reduce(sizes, ReduceOp.SUM, group)
    return Shard(sizes[:rank].sum(), sizes.sum())


def local_labels(labels: Tensor, columns: int, shard: Shard, ignore_index: int) -> Tensor:
    """[N] int64: the label's column in this shard, `ELSEWHERE` or `IGNORED`."""
    y = labels - shard.start
    y = torch.where((y < 0) | (y >= columns), ELSEWHERE, y)
    return torch.where(labels == ignore_index, IGNORED, y)


def check_labels(labels: Tensor, total: int, ignore_index: int) -> None:
    """Raise at the first label that is neither a column nor `ignore_index`; waits for a device."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= total))
    if wrong.any():
        n = int(wrong.int().argmax())
        raise ValueError(
            f"labels must be in [0, {total}) or {ignore_index}, got labels[{n}] = {int(labels[n])}"
        )


def finish(
    whole: WholeSums, kept: KeptSums | None, y: Tensor, options: Options
) -> tuple[Tensor | None, ...]:
    """The first nine fields of `TokenStats` [N], of sums over the whole vocabulary."""
    log_sum = whole.s1.log()
    top, lse = whole.top, whole.top + log_sum
    kept_mass = count = inside = None
    s1, s2, sd, log_q_sum = whole.s1, whole.s2, whole.sd, log_sum
    if kept is not None:
        s1, s2, sd, log_q_sum = kept.s1, kept.s2, kept.sd, kept.s1.log()
        kept_mass = (log_q_sum - log_sum).clamp_max(0)
        count = kept.count.to(torch.int64)
        inside = whole.label >= top + options.log_rho
    logp = (whole.label - top) - log_q_sum
    outputs = [logp, log_q_sum - sd / s1, s2 / s1.square(), lse, top, kept_mass]

    ignored = y == IGNORED
    broken = ~(lse.isfinite() & (whole.found > 0)) & ~ignored
    outputs = [
        x if x is None else x.masked_fill(broken, math.nan).masked_fill(ignored, 0) for x in outputs
    ]
    if kept is not None:
        count = count.masked_fill(broken | ignored, 0)
        inside = (inside & ~broken) | ignored
    return (*outputs, count, inside, broken)


def settle(
    outputs: tuple[Tensor | None, ...], y: Tensor, nonfinite: str
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """What becomes of broken rows: NaN as they are, rows that are skipped, or an error.

    Args:
        outputs: the first nine fields of `TokenStats`.
        y: local labels.
        nonfinite: "nan", "skip" or "raise".

    Returns:
        The outputs and the labels that backward sees: a skipped row is an ignored one there.

    Raises:
        ValueError: "raise", and a row is broken. Waits for the device.
    """
    *numbers, count, inside, broken = outputs
    if nonfinite == "raise" and broken.any():
        rows = broken.nonzero().squeeze(-1)
        raise ValueError(
            f"expected logits without NaN or +inf, with a finite entry in every row and labels "
            f"within the vocabulary, got {rows.numel()} of {broken.numel()} rows without, the "
            f"first at row {int(rows[0])}"
        )
    if nonfinite == "skip":
        numbers = [x if x is None else x.masked_fill(broken, 0) for x in numbers]
        inside = inside if inside is None else inside | broken
        y = y.masked_fill(broken, IGNORED)
    return (*numbers, count, inside, broken), y
