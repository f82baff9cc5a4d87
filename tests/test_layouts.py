import json
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from trimtab.optim import BlockLayout, BlockMap, geometric_layout

# One layout per kind; heads, one head, fused rows that repeat and that do not; stacked matrices;
# convolutions; one block, one entry a block, scalars.
LAYOUTS = [
    BlockLayout("elementwise", (3, 4)),
    BlockLayout("row", (3, 4)),
    BlockLayout("column", (3, 4)),
    BlockLayout("whole", (3, 4)),
    BlockLayout("row", (6, 4), ((1, 2),)),
    BlockLayout("row", (6, 4), ((1, 6),)),
    BlockLayout("row", (10, 4), ((2, 3), (4, 1))),
    BlockLayout("row", (10, 4), ((1, 3), (2, 1))),
    BlockLayout("column", (4, 10), ((1, 3), (2, 1))),
    BlockLayout("row", (3, 2, 5, 2)),
    BlockLayout("column", (3, 2, 5)),
    BlockLayout("row", (2, 6, 4), ((1, 2),), 1),
    BlockLayout("column", (2, 4, 6), ((1, 2),), 1),
    BlockLayout("row", (2, 3, 4, 5), stacked=2),
    BlockLayout("row", (2, 4, 3), ((1, 2), (2, 1)), 1),
    BlockLayout("row", (5,)),
    BlockLayout("elementwise", ()),
    BlockLayout("whole", ()),
]


def layout_id(layout):
    shape = "x".join(map(str, layout.shape)) or "scalar"
    segments = "+".join(f"{count}of{size}" for count, size in layout.segments)
    return f"{layout.kind}-{shape}-{segments}-stacked{layout.stacked}"


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


@every_layout
def test_mean_and_expand_agree_with_the_block_numbers(layout):
    torch.manual_seed(0)
    x = torch.randn(layout.shape, dtype=torch.float64)
    index = layout.index()
    assert index.unique().tolist() == list(range(layout.n_blocks))
    assert torch.equal(index.flatten().bincount(), layout.block_lengths())
    want = torch.stack([x[index == b].mean() for b in range(layout.n_blocks)])
    torch.testing.assert_close(layout.mean(x).flatten(), want, rtol=1e-14, atol=1e-14)
    assert layout.mean(x).shape == layout.state_shape
    values = torch.arange(layout.n_blocks, dtype=torch.float64).view(layout.state_shape)
    assert torch.equal(layout.expand(values), index.double())


@every_layout
def test_runs_are_the_blocks_of_one_matrix(layout):
    if layout.kind not in ("row", "column"):
        return
    blocks = [row for row, count, size in layout.runs for _ in range(count) for _ in range(size)]
    assert len(blocks) == layout.n_units
    starts = [row + i * size for row, count, size in layout.runs for i in range(count)]
    first = [layout.unit_blocks().tolist().index(b) for b in range(len(starts))]
    assert starts == first


def test_rows_of_experts_and_heads_by_hand():
    x = torch.arange(24.0).view(2, 3, 4)
    assert BlockLayout("row", (2, 3, 4), stacked=1).mean(x).tolist() == [
        [1.5, 5.5, 9.5],
        [13.5, 17.5, 21.5],
    ]
    assert BlockLayout("column", (2, 3, 4), stacked=1).mean(x)[0].tolist() == [4, 5, 6, 7]
    fused = BlockLayout("row", (6, 1), ((1, 2), (1, 1)))  # a head of 2, a neuron, and again
    assert fused.unit_blocks().tolist() == [0, 0, 1, 2, 2, 3]


def test_mean_of_transposed_storage_is_right():
    x = torch.arange(12.0).view(4, 3).t()
    torch.testing.assert_close(BlockLayout("row", (3, 4)).mean(x), x.mean(1))


@pytest.mark.parametrize("kind", ["row", "column", "whole", "elementwise"])
def test_empty_parameters_have_a_layout(kind):
    layout = BlockLayout(kind, (0, 4))
    assert layout.index().shape == (0, 4)
    assert layout.mean(torch.zeros(0, 4)).shape == layout.state_shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rows", (3, 4)), "kind: .*'rows'"),
        (("row", ()), "shape: row .* expects 1"),
        (("column", (3,)), "shape: column .* expects 2"),
        (("column", (3, 4), ((1, 1),), 1), "shape: column with 1 stacked .* expects 3"),
        (("row", (6, 4), ((1, 4),)), "segments: .* rows 4 to 5 are left over"),
        (("column", (4, 7), ((1, 2), (1, 1))), "segments: .* columns 6 to 6 are left over"),
        (("row", (6, 4), ((1, 0),)), "segments: expected positive"),
        (("row", (6, 4), ()), "segments: expected positive"),
        (("whole", (6, 4), ((1, 2),)), "whole takes none"),
        (("elementwise", (6, 4), ((1, 1),), 1), "elementwise takes none"),
    ],
)
def test_impossible_layouts_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout(*arguments)


def test_layouts_are_frozen_and_validate():
    layout = BlockLayout("row", [3, 4])
    assert layout.shape == (3, 4) and hash(layout) == hash(BlockLayout("row", (3, 4)))
    with pytest.raises(FrozenInstanceError):
        layout.kind = "whole"
    layout.validate("w", torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"'w'.*\(3, 4\), found \(4, 3\)"):
        layout.validate("w", torch.zeros(4, 3))


def test_geometric_layouts():
    assert geometric_layout(torch.zeros(3, 4)) == BlockLayout("row", (3, 4))
    assert geometric_layout(torch.zeros(3)) == BlockLayout("elementwise", (3,))


@pytest.fixture
def blocks():
    return BlockMap(
        {
            "h.0.q.weight": (BlockLayout("row", (6, 4), ((1, 2),)), "query"),
            "h.1.q.weight": (BlockLayout("row", (6, 4), ((1, 2),)), "query"),
            "h.0.experts": (BlockLayout("row", (2, 3, 4), stacked=1), "experts"),
            "h.0.q.bias": (BlockLayout("elementwise", (6,)), "1-D"),
        }
    )


def test_map_prints_as_a_table_and_round_trips(blocks):
    lines = str(blocks).splitlines()
    assert lines[0].split() == ["parameter", "shape", "rule", "blocks", "why"]
    assert len(lines) == 1 + len(blocks)
    assert lines[1].split() == ["h.0.q.weight", "6x4", "2", "rows", "3", "query"]
    assert BlockMap.from_dict(json.loads(json.dumps(blocks.to_dict()))) == blocks
    assert pickle.loads(pickle.dumps(blocks)) == blocks
    with pytest.raises(TypeError):
        blocks["x"] = blocks["h.0.q.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reason": None}, r"entries\['w'\]: expected key 'reason'"),
        ({"kind": "rows"}, r"entries\['w'\]: kind"),
        ({"segments": [[1, 3]]}, r"entries\['w'\]: segments"),
        ({"segments": [1, 3]}, r"entries\['w'\]: "),
    ],
)
def test_broken_entries_are_named(change, message):
    entry = {"kind": "row", "shape": [2, 2], "segments": [[1, 1]], "stacked": 0, "reason": ""}
    entry = {key: value for key, value in (entry | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        BlockMap.from_dict({"w": entry})


def test_edits_by_pattern(blocks):
    edited = blocks.edited(
        {
            "*.weight": "row",
            "h.1.*": "column",  # a later pattern wins
            "*.experts": "column",  # of every expert
            "h.0.q.bias": "whole",
        }
    )
    assert {name: entry.layout for name, entry in edited.items()} == {
        "h.0.q.weight": BlockLayout("row", (6, 4)),
        "h.1.q.weight": BlockLayout("column", (6, 4)),
        "h.0.experts": BlockLayout("column", (2, 3, 4), stacked=1),
        "h.0.q.bias": BlockLayout("whole", (6,)),
    }
    assert edited["h.1.q.weight"].reason == "set by pattern 'h.1.*'"
    assert list(edited) == list(blocks) and blocks["h.0.q.weight"].reason == "query"  # a new map


def test_edits_by_layout_and_by_segments(blocks):
    whole = BlockLayout("whole", (6, 4))
    edited = blocks.edited({"h.0.q.weight": whole, "h.1.q.weight": [(1, 4), (2, 1)]})
    assert edited["h.0.q.weight"].layout == whole
    assert edited["h.1.q.weight"].layout == BlockLayout("row", (6, 4), ((1, 4), (2, 1)))
    assert edited["h.0.experts"] == blocks["h.0.experts"]
    stacked = blocks.edited({"h.0.experts": ((1, 3),)})["h.0.experts"].layout
    assert stacked == BlockLayout("row", (2, 3, 4), ((1, 3),), 1)
    assert blocks.edited({"*.bias": ((1, 3),)})["h.0.q.bias"].layout.n_blocks == 2


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"h.0.q": "row"}, r"rules\['h.0.q'\]: none of 4 parameters"),
        ({"*": "row", "nothing.*": "row"}, r"rules\['nothing.\*'\]: none"),
        ({"*.bias": "column"}, r"rules\['\*.bias'\]: parameter 'h.0.q.bias': shape: column"),
        ({"h.1.*": ((1, 4),)}, r"rules\['h.1.\*'\]: parameter 'h.1.q.weight': segments: .* 4 to 5"),
        ({"h.1.*": "head"}, r"parameter 'h.1.q.weight': kind: .*'head'"),
        ({"h.1.*": BlockLayout("row", (4, 6))}, r"'h.1.q.weight': .*\(6, 4\), found \(4, 6\)"),
        ({"h.1.*": 3}, r"parameter 'h.1.q.weight': "),
    ],
)
def test_impossible_edits_are_named(blocks, rules, message):
    with pytest.raises(ValueError, match=message):
        blocks.edited(rules)
    assert blocks["h.1.q.weight"].layout == BlockLayout("row", (6, 4), ((1, 2),))


def test_a_rule_that_a_later_one_replaces_need_not_fit(blocks):
    edited = blocks.edited({"*": "column", "*.bias": "elementwise"})
    assert edited["h.0.q.bias"].layout.kind == "elementwise"


# Edits to layouts.py that must turn this file red:
#   1. unit_dim of row: self.stacked -> 0
#   2. runs: runs.append((start, count, size)) -> (0, count, size)
#   3. block_lengths: .repeat(batch) -> .repeat_interleave(batch)
#   4. _recut: stacked=stacked -> stacked=0
#   5. edited: winners.update(...) -> keep the first pattern (setdefault)
def test_equal_cuts_compare_equal():
    heads = BlockLayout("row", (48, 4), ((1, 8),))
    assert BlockLayout("row", (48, 4), ((2, 8), (4, 8))) == heads
    assert BlockLayout("row", (48, 4), ((1, 8), (1, 8), (8, 1))).segments == ((2, 8), (8, 1))
    with pytest.raises(
        ValueError, match=r"segments: expected \(count, size\) pairs, found \(1, 2\)"
    ):
        BlockLayout("row", (4, 4), (1, 2))
