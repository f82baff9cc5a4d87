"""From a block layout and a shard to the pieces that the step kernels work on.

A kernel sees pieces of flat tensors and their units (rows or columns). A `Plan` says which pieces a
local tensor has, to which second moment every unit belongs, and over which process groups the sums
of its units have to be added before the moments can be updated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..triton_kernels.adam_mini import Piece
from .layouts import BlockLayout

# [start, stop) of the indices of one dim that are here, in local order.
Intervals = tuple[tuple[int, int], ...]

# An elementwise tensor cut along its last dim gets one piece a line, up to this many.
_MOST_LINES = 4096


@dataclass(frozen=True)
class Shard:
    """Where a local tensor lies in the whole one, and the process groups that hold the rest.

    Args:
        shape: of the whole tensor.
        box: one entry per dim, the intervals of its indices that are here; None for a flat shard.
        flat: [start, stop) of the flattened whole tensor; None for a box.
        groups: (dim, process group) for every cut of a dim of a box; of a flat shard, dim is -1.
            Groups that hold copies are not named.
        number: of the parameter in an order that all ranks share, where some ranks lack the
            parameter (Megatron); None where all have the same ones in the same order.
    """

    shape: tuple[int, ...]
    box: tuple[Intervals, ...] | None = None
    flat: tuple[int, int] | None = None
    groups: tuple[tuple[int, Any], ...] = ()
    number: int | None = None


@dataclass(frozen=True)
class Plan:
    """How one local tensor is updated.

    Args:
        pieces: together they cover the local tensor; none if it has no entries.
        state_shape: of the local second moments.
        blocks: [units of all pieces], the second moment of every unit, flattened; None if the
            units are the second moments, in order. None if elementwise.
        lengths: [second moments] entries of the block of each, in the whole tensor; None if
            elementwise.
        reduce: process groups over which the sums of the blocks are added.
        groups: process groups over which the tensor is cut, for the norm of the gradient.
        one_pass: every unit is a whole block.
        flat: the shard is a slice of the flattened tensor. It may be empty, and only the second
            moments of blocks that it touches count.
    """

    pieces: tuple[Piece, ...]
    state_shape: tuple[int, ...]
    blocks: Tensor | None
    lengths: Tensor | None
    reduce: tuple[Any, ...] = ()
    groups: tuple[Any, ...] = ()
    one_pass: bool = False
    flat: bool = False

    @property
    def n_entries(self) -> int:
        """Entries of the local tensor."""
        return sum(piece.n_entries for piece in self.pieces)

    @property
    def elementwise(self) -> bool:
        """Whether every entry has a second moment of its own."""
        return self.lengths is None

    def spread(self, second_moments: Tensor) -> Tensor:
        """Gives every entry of a flat shard its second moment: [entries], a new tensor."""
        values = second_moments.reshape(-1)
        return values.clone() if self.elementwise else values[self.entry_blocks(values.device)]

    def gather(self, entries: Tensor) -> Tensor:
        """The inverse of `spread`: `state_shape`; 0 for blocks that the shard does not touch.

        Args:
            entries: [entries].

        Returns:
            The second moments.

        Raises:
            ValueError: entries of one block differ.
        """
        if self.elementwise:
            return entries.reshape(self.state_shape)
        blocks = self.entry_blocks(entries.device)
        found = entries.new_zeros(self.state_shape)
        found.view(-1).scatter_(0, blocks, entries.reshape(-1))
        if not torch.equal(found.view(-1)[blocks], entries.reshape(-1)):
            raise ValueError("entries: expected one number a block, found several")
        return found

    def entry_blocks(self, device: torch.device) -> Tensor:
        """The second moment of every entry of a flat shard: [entries], int64."""
        assert self.flat
        blocks, entries = self.blocks, []
        if blocks is None:
            blocks = torch.arange(sum(piece.n_units for piece in self.pieces))
        for piece in self.pieces:
            mine, blocks = blocks[: piece.n_units], blocks[piece.n_units :]
            if piece.kind == "row":
                entries.append(mine.repeat_interleave(piece.shape[1]))
            else:
                units = mine.view(piece.shape[0], 1, -1)
                entries.append(units.expand(piece.shape).reshape(-1))
        return torch.cat([blocks, *entries]).to(device)


def make_plan(layout: BlockLayout, shard: Shard | None = None) -> Plan:
    """The plan of a tensor, or of a shard of it.

    Random bits of stochastic rounding go by the position in the whole tensor, so they are those of
    the unsharded tensor: for every flat shard, and for a box if what is here of each row (row) or
    of each line along the last dim (other kinds) is one run, in at most 4096 lines if elementwise.

    Args:
        layout: the blocks of the whole tensor.
        shard: the part that is here; None for all of it.

    Returns:
        Its Plan; second moments are local where no block is cut, else they are those of the whole
        tensor, on every rank.
    """
    if shard is None:
        return _whole_plan(layout)
    if shard.flat == (0, prod(layout.shape)) and not shard.groups:
        return replace(_whole_plan(layout), flat=True)
    plan = _box_plan(layout, shard) if shard.flat is None else _flat_plan(layout, shard)
    pieces = tuple(piece for piece in plan.pieces if piece.n_entries)
    if plan.pieces and not pieces:
        nothing = None if plan.elementwise else torch.zeros(0, dtype=torch.int64)
        return replace(plan, pieces=(), blocks=nothing)
    return plan


def _whole_plan(layout: BlockLayout) -> Plan:
    shape, n = layout.shape, prod(layout.shape)
    if layout.kind == "elementwise":
        return Plan((Piece("elementwise", (n,)),), shape, None, None, one_pass=True)
    lengths = layout.block_lengths()
    if layout.kind == "whole":
        pieces = (Piece("row", (1, n), stride=n),)
        return Plan(pieces, (1,), None, lengths, one_pass=True)
    batch, length = prod(shape[: layout.stacked]), layout.unit_length
    if layout.kind == "column":
        units = layout.n_units
        pieces = (Piece("column", (batch, length, units), stride=units),)
        blocks = None if layout.plain else _unit_blocks(layout).view(-1)
        return Plan(pieces, layout.state_shape, blocks, lengths, one_pass=layout.plain)
    if len(layout.runs) == 1:  # matrices follow one another without a gap
        (_, count, size), entries = layout.runs[0], layout.runs[0][2] * length
        pieces = (Piece("row", (batch * count, entries), stride=entries),)
        return Plan(pieces, layout.state_shape, None, lengths, one_pass=True)
    pieces, first = [], 0
    for matrix in range(batch):
        for start, count, size in layout.runs:
            offset = (matrix * layout.n_units + start) * length
            entries = size * length
            pieces.append(Piece("row", (count, entries), offset, first, offset, entries))
            first += count
    return Plan(tuple(pieces), layout.state_shape, None, lengths, one_pass=True)


def _box_plan(layout: BlockLayout, shard: Shard) -> Plan:
    assert shard.box is not None
    groups = tuple(group for _, group in shard.groups)
    local = tuple(sum(stop - start for start, stop in intervals) for intervals in shard.box)
    if layout.kind == "elementwise":
        pieces = _elementwise_pieces(layout.shape, shard.box, local)
        return Plan(pieces, local, None, None, groups=groups, one_pass=True)
    if layout.kind == "whole":
        pieces, _ = _row_pieces(layout.shape, shard.box, local, max(len(local) - 1, 0))
        blocks = torch.zeros(sum(piece.n_units for piece in pieces), dtype=torch.int64)
        return Plan(pieces, (1,), blocks, layout.block_lengths(), groups, groups)
    stacked, unit_dim = layout.stacked, layout.unit_dim
    matrices = _numbers(layout.shape, shard.box, stacked)
    if layout.kind == "row":
        pieces, rows = _row_pieces(layout.shape, shard.box, local, unit_dim + 1)
        whole, here = rows, torch.arange(rows.numel())
    else:
        pieces, owner = _column_pieces(layout, shard.box, local)
        columns = _numbers(layout.shape[unit_dim:], shard.box[unit_dim:], 1)
        whole = (matrices[owner, None] * layout.n_units + columns).view(-1)
        here = (owner[:, None] * local[-1] + torch.arange(local[-1])).view(-1)
    if not layout.plain:
        blocks = _unit_blocks(layout).view(-1)[whole]
        return Plan(pieces, layout.state_shape, blocks, layout.block_lengths(), groups, groups)
    # Second moments are cut as the parameter is.
    kept = {*range(stacked), unit_dim}
    reduce = tuple(group for dim, group in shard.groups if dim not in kept)
    state_shape = (*local[:stacked], local[unit_dim])
    lengths = torch.full((prod(state_shape),), layout.unit_length)
    blocks = None if torch.equal(here, torch.arange(len(lengths))) else here
    return Plan(pieces, state_shape, blocks, lengths, reduce, groups, one_pass=not reduce)


def _row_pieces(
    shape: tuple[int, ...], box: tuple[Intervals, ...], local: tuple[int, ...], dims: int
) -> tuple[tuple[Piece, ...], Tensor]:
    """Pieces with a unit for every index of the first `dims` dims; the number of each unit."""
    units, length, stride = _numbers(shape, box, dims), prod(local[dims:]), prod(shape[dims:])
    left = _first(shape[dims:], box[dims:])
    pieces = [
        Piece("row", (count, length), start * length, start, number * stride + left, stride)
        for start, count, number in _runs(units)
    ]
    return tuple(pieces), units


def _column_pieces(
    layout: BlockLayout, box: tuple[Intervals, ...], local: tuple[int, ...]
) -> tuple[tuple[Piece, ...], Tensor]:
    """Pieces of whole local columns; for each row of units, the local number of its matrix."""
    shape, stacked = layout.shape, layout.stacked
    height, width = prod(local[stacked:-1]), local[-1]
    lines = _numbers(shape, box, len(shape) - 1)
    left, stride = _first(shape[-1:], box[-1:]), layout.n_units
    matrices = prod(local[:stacked])
    if height == layout.unit_length:
        numbers = _numbers(shape, box, stacked)
        runs = [
            (start * height, start * width, (count, height), number * height)
            for start, count, number in _runs(numbers)
        ]
        owner = torch.arange(matrices)
    else:
        runs, owners = [], []
        for matrix in range(matrices):
            of_matrix = lines[matrix * height : (matrix + 1) * height]
            for start, count, number in _runs(of_matrix):
                runs.append((matrix * height + start, 0, (1, count), number))
                owners.append(matrix)
        owner = torch.tensor(owners, dtype=torch.int64)
    pieces = [
        Piece("column", (*size, width), line * width, first, number * stride + left, stride)
        for line, first, size, number in runs
    ]
    return tuple(pieces), owner


def _elementwise_pieces(
    shape: tuple[int, ...], box: tuple[Intervals, ...], local: tuple[int, ...]
) -> tuple[Piece, ...]:
    lines = _numbers(shape, box, max(len(shape) - 1, 0))
    width, stride = prod(local[-1:]), prod(shape[-1:])
    left = _first(shape[-1:], box[-1:])
    runs: Any = _runs(lines)
    if width != stride and lines.numel() <= _MOST_LINES:
        runs = ((line, 1, number) for line, number in enumerate(lines.tolist()))
    elif width != stride:
        runs = [(0, lines.numel(), int(lines[0]))]
    return tuple(
        Piece("elementwise", (count * width,), at * width, at * width, number * stride + left)
        for at, count, number in runs
    )


def _flat_plan(layout: BlockLayout, shard: Shard) -> Plan:
    assert shard.flat is not None
    start, stop = shard.flat
    groups = tuple(group for _, group in shard.groups)
    n = stop - start
    if layout.kind == "elementwise":
        pieces = (Piece("elementwise", (n,), index=start),)
        return Plan(pieces, (n,), None, None, groups=groups, one_pass=True, flat=True)
    lengths = layout.block_lengths()
    if layout.kind == "whole":
        pieces = (Piece("row", (1, n), index=start, stride=n),)
        blocks = torch.zeros(1, dtype=torch.int64)
        return Plan(pieces, (1,), blocks, lengths, groups, groups, flat=True)
    unit_blocks = _unit_blocks(layout).view(-1, layout.n_units)
    width = layout.unit_length if layout.kind == "row" else layout.n_units
    pieces, blocks = [], [torch.zeros(0, dtype=torch.int64)]
    for line, count, left, right in _lines(start, stop, width, layout):
        offset = line * width + left - start
        index = line * width + left
        if layout.kind == "row":
            matrix, row = divmod(line, layout.n_units)
            pieces.append(Piece("row", (count, right - left), offset, 0, index, width))
            blocks.append(unit_blocks[matrix, row : row + count])
        else:
            pieces.append(Piece("column", (1, count, right - left), offset, 0, index, width))
            blocks.append(unit_blocks[line // layout.unit_length, left:right])
    joined = torch.cat(blocks)
    return Plan(tuple(pieces), layout.state_shape, joined, lengths, groups, groups, flat=True)


def _lines(
    start: int, stop: int, width: int, layout: BlockLayout
) -> Iterator[tuple[int, int, int, int]]:
    """Cuts [start, stop) of the flattened tensor into (first line, lines, left, right).

    A line is `width` entries; a part has whole lines of one matrix, or a part of one line.
    """
    height = layout.n_units if layout.kind == "row" else layout.unit_length
    while start < stop:
        line, left = divmod(start, width)
        if left or stop - start < width:
            count, right = 1, min(width, left + stop - start)
        else:
            count, right = min((stop - start) // width, height - line % height), width
        yield line, count, left, right
        start += count * (right - left)


def _unit_blocks(layout: BlockLayout) -> Tensor:
    """The block number of every row or column: [*stacked dims, n_units], int64."""
    batch = layout.shape[: layout.stacked]
    first = torch.arange(prod(batch)).view(*batch, 1) * layout.state_shape[-1]
    return first + layout.unit_blocks()


def _numbers(shape: tuple[int, ...], box: tuple[Intervals, ...], dims: int) -> Tensor:
    """Which indices of the first `dims` dims, counted together, are here: int64, local order."""
    numbers = torch.zeros(1, dtype=torch.int64)
    for size, intervals in zip(shape[:dims], box[:dims], strict=True):
        parts = [torch.arange(start, stop) for start, stop in intervals]
        here = torch.cat([numbers[:0], *parts])
        numbers = (numbers[:, None] * size + here).view(-1)
    return numbers


def _first(shape: tuple[int, ...], box: tuple[Intervals, ...]) -> int:
    """The number of the first entry that is here."""
    number = 0
    for size, intervals in zip(shape, box, strict=True):
        number = number * size + (intervals[0][0] if intervals else 0)
    return number


def _runs(numbers: Tensor) -> Iterator[tuple[int, int, int]]:
    """(position, length, first number) of every run of consecutive numbers."""
    if not numbers.numel():
        return
    breaks = (numbers.diff() != 1).nonzero().view(-1) + 1
    starts = [0, *breaks.tolist(), numbers.numel()]
    for start, stop in zip(starts, starts[1:], strict=False):
        yield start, stop - start, int(numbers[start])
