"""Plans of whole tensors and of shards: every entry once, with its second moment and its number."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.optim import BlockLayout, pieces
from trimtab.optim.pieces import Shard, make_plan

CASES = settings(max_examples=300, deadline=None)


@st.composite
def layouts(draw):
    """Any kind of blocks on up to four dims of up to six."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    kind = draw(st.sampled_from(["elementwise", "whole", "row", "column"]))
    least = {"row": 1, "column": 2}.get(kind)
    if least is None or len(shape) < least:
        return BlockLayout("whole" if kind == "whole" else "elementwise", shape)
    stacked = draw(st.integers(0, len(shape) - least))
    units = shape[stacked if kind == "row" else -1]
    period = draw(st.sampled_from([n for n in range(1, units + 1) if units % n == 0]))
    cuts = sorted(draw(st.sets(st.integers(1, period - 1), max_size=2)) if period > 1 else ())
    edges = [0, *cuts, period]
    segments = tuple((1, b - a) for a, b in zip(edges, edges[1:], strict=False))
    return BlockLayout(kind, shape, segments, stacked)


@st.composite
def slices(draw, layout):
    """Of the flattened tensor."""
    start, stop = sorted(draw(st.integers(0, prod(layout.shape))) for _ in range(2))
    return Shard(layout.shape, flat=(start, stop), groups=((-1, "flat"),))


@st.composite
def boxes(draw, layout):
    """One or two intervals of every dim, seldom none; group 'd' for a dim d that is not whole."""
    box = []
    for size in layout.shape:
        n = draw(st.sampled_from([2, 2, 2, 0] if size < 3 else [2, 2, 2, 4, 4, 4, 0]))
        edges = sorted(draw(st.permutations(range(size + 1)))[:n])
        box.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
    groups = [
        (dim, str(dim))
        for dim, (size, intervals) in enumerate(zip(layout.shape, box, strict=True))
        if intervals != ((0, size),)
    ]
    return Shard(layout.shape, tuple(box), groups=tuple(groups))


def cut(values, box):
    """What a box has of a tensor."""
    for dim, intervals in enumerate(box):
        here = [i for start, stop in intervals for i in range(start, stop)]
        values = values.index_select(dim, torch.tensor(here, dtype=torch.int64))
    return values


def part(values, shard):
    """What a shard has of a whole tensor, flattened."""
    if shard.flat is not None:
        return values.flatten()[slice(*shard.flat)]
    return cut(values, shard.box).flatten()


def walk(plan, n):
    """The whole tensor's number and the second moment of every one of n local entries."""
    numbers, moments = torch.full((n,), -1), torch.full((n,), -1)
    first_unit = 0
    for piece in plan.pieces:
        here = slice(piece.offset, piece.offset + piece.n_entries)
        assert here.stop <= n and (numbers[here] == -1).all(), "entries twice"
        if piece.kind == "elementwise":
            run = torch.arange(piece.n_entries)
            numbers[here], moments[here] = piece.index + run, piece.first + run
            continue
        *batch, rows, columns = piece.shape
        lines = torch.arange(prod(batch) * rows)[:, None]
        numbers[here] = (piece.index + lines * piece.stride + torch.arange(columns)).flatten()
        units = torch.arange(first_unit, first_unit + piece.n_units)
        first_unit += piece.n_units
        of_units = units if plan.blocks is None else plan.blocks[units]
        if plan.one_pass:
            assert of_units.equal(piece.first + torch.arange(piece.n_units))
        if piece.kind == "row":
            moments[here] = of_units.repeat_interleave(columns)
        else:
            of_units = of_units.view(*batch, 1, columns).expand(*batch, rows, columns)
            moments[here] = of_units.flatten()
    assert plan.blocks is None or plan.blocks.numel() == first_unit
    assert (numbers >= 0).all(), "entries without a piece"
    return numbers, moments


def one_run_a_row(layout, box):
    """Whether what is here of each row, or line along the last dim, is one run."""
    dims = layout.shape[layout.unit_dim + 1 :] if layout.kind == "row" else layout.shape[-1:]
    inner = box[len(box) - len(dims) :]
    whole = [intervals == ((0, size),) for size, intervals in zip(dims, inner, strict=True)]
    return not inner or (len(inner[0]) < 2 and all(whole[1:]))


@CASES
@given(layouts())
def test_plan_of_a_whole_tensor(layout):
    n = prod(layout.shape)
    plan = make_plan(layout)
    numbers, moments = walk(plan, n)
    assert numbers.equal(torch.arange(n)) and moments.equal(layout.index().flatten())
    assert plan.state_shape == layout.state_shape and not plan.reduce and not plan.groups
    assert plan.one_pass == (layout.kind != "column" or layout.plain)
    if layout.kind != "elementwise":
        assert plan.lengths.equal(layout.block_lengths())


@pytest.mark.parametrize("kind", [slices, boxes])
@CASES
@given(st.data())
def test_plan_of_a_shard(kind, data):
    layout = data.draw(layouts())
    shard = data.draw(kind(layout))
    whole = torch.arange(prod(layout.shape)).view(layout.shape)
    mine = part(whole, shard)
    plan = make_plan(layout, shard)
    numbers, moments = walk(plan, mine.numel())
    assert all(piece.n_entries for piece in plan.pieces)
    if shard.flat is not None or one_run_a_row(layout, shard.box):
        assert numbers.equal(mine)
    # Which block of the whole tensor the local second moments are of.
    blocks = torch.arange(layout.n_blocks).view(layout.state_shape)
    cut_alike = layout.kind == "elementwise" or (layout.plain and shard.flat is None)
    if shard.flat is not None and layout.kind == "elementwise":
        blocks = blocks.flatten()[slice(*shard.flat)]
    elif cut_alike and layout.kind == "elementwise":
        blocks = cut(blocks, shard.box)
    elif cut_alike:
        blocks = cut(blocks, (*shard.box[: layout.stacked], shard.box[layout.unit_dim]))
    assert plan.state_shape == tuple(blocks.shape)
    assert blocks.flatten()[moments].equal(layout.index().flatten()[mine])
    if layout.kind != "elementwise":
        assert plan.lengths.equal(layout.block_lengths()[blocks.flatten()])
    # Sums cross the groups that cut blocks, and no others.
    assert plan.groups == tuple(group for _, group in shard.groups)
    kept = {*range(layout.stacked), layout.unit_dim} if layout.plain else set()
    if layout.kind == "elementwise":
        kept = set(range(-1, 4))
    assert plan.reduce == tuple(group for dim, group in shard.groups if dim not in kept)


@CASES
@given(st.data())
def test_slices_give_entries_their_second_moments_and_take_them_back(data):
    layout = data.draw(layouts())
    start, stop = sorted(data.draw(st.integers(0, prod(layout.shape))) for _ in range(2))
    plan = make_plan(layout, Shard(layout.shape, flat=(start, stop)))
    v = torch.rand(layout.state_shape)
    own = v.flatten()[start:stop] if layout.kind == "elementwise" else v
    entries = plan.spread(own)
    assert entries.equal(layout.expand(v).flatten()[start:stop])
    found = plan.gather(entries)
    assert tuple(found.shape) == plan.state_shape
    assert plan.spread(found).equal(entries), "blocks that the slice touches"


def test_several_numbers_for_a_block_are_refused():
    plan = make_plan(BlockLayout("row", (3, 4)), Shard((3, 4), flat=(2, 9)))
    with pytest.raises(ValueError, match="one number a block, found several"):
        plan.gather(torch.tensor([1.0, 1, 2, 2, 2, 3, 3]))


def test_stacked_matrices_with_a_gap_are_two_pieces_of_one_pass():
    layout = BlockLayout("column", (5, 4, 3), stacked=1)
    box = (((0, 1), (3, 5)), ((0, 4),), ((0, 3),))
    plan = make_plan(layout, Shard((5, 4, 3), box, groups=((0, "d"),)))
    assert plan.one_pass and [piece.first for piece in plan.pieces] == [0, 3]
    assert walk(plan, 36)[1].view(3, 4, 3)[:, 0].equal(torch.arange(9).view(3, 3))


def test_elementwise_lines_that_are_too_many_share_one_piece(monkeypatch):
    layout, shard = BlockLayout("elementwise", (5, 4)), Shard((5, 4), (((0, 5),), ((1, 3),)))
    assert len(make_plan(layout, shard).pieces) == 5
    monkeypatch.setattr(pieces, "_MOST_LINES", 4)
    plan = make_plan(layout, shard)
    assert len(plan.pieces) == 1
    assert walk(plan, 10)[1].equal(torch.arange(10))


# Edits that must turn this file red:
#   pieces.py: `line * width` in _column_pieces               ->  `number * width`
#   pieces.py: `height - line % height` in _lines             ->  `height`
#   pieces.py: `kept = {*range(stacked), unit_dim}`           ->  `{unit_dim}`
#   pieces.py: `blocks = None if torch.equal(...) else here`  ->  `None`
#   pieces.py: `number * stride + left` in _row_pieces        ->  `number * stride`
