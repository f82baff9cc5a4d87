import json
import logging
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from trimtab.optim import BlockLayout, BlockMap, geometric_layout, infer_blocks

# One layout per kind, then: 3-D and 4-D rows, 3-D column, one block, one entry a block, scalar,
# empty.
LAYOUTS = [
    BlockLayout("elementwise", (3, 4)),
    BlockLayout("row", (3, 4)),
    BlockLayout("column", (3, 4)),
    BlockLayout("head", (6, 4), 2),
    BlockLayout("whole", (3, 4)),
    BlockLayout("row", (3, 2, 5)),
    BlockLayout("row", (3, 2, 5, 2)),
    BlockLayout("column", (3, 2, 5)),
    BlockLayout("head", (6, 2, 2), 6),
    BlockLayout("head", (6, 4), 1),
    BlockLayout("row", (5,)),
    BlockLayout("elementwise", ()),
    BlockLayout("whole", ()),
]


def layout_id(layout):
    return f"{layout.kind}{layout.size}-{'x'.join(map(str, layout.shape)) or 'scalar'}"


def llama(**overrides):
    sizes = dict(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | overrides))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_view_mean_and_broadcast_agree_with_the_block_numbers(layout):
    torch.manual_seed(0)
    x = torch.randn(layout.shape, dtype=torch.float64)
    index = layout.index()
    assert index.unique().tolist() == list(range(layout.n_blocks))
    assert index.flatten().bincount().unique().numel() == 1  # blocks of equal length
    want = torch.stack([x[index == b].mean() for b in range(layout.n_blocks)])
    torch.testing.assert_close(layout.mean(x).flatten(), want, rtol=1e-14, atol=1e-14)
    assert layout.mean(x).shape == layout.state_shape
    values = torch.arange(layout.n_blocks, dtype=torch.float64).view(layout.state_shape)
    torch.testing.assert_close(layout.broadcastable(values).expand(layout.shape), index.double())


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_view_keeps_one_block_in_the_reduced_dims(layout):
    view = layout.view(layout.index())
    assert view.numel() == layout.index().numel()
    if layout.reduce_dims:
        low, high = view.amin(layout.reduce_dims), view.amax(layout.reduce_dims)
        assert torch.equal(low, high)
        assert low.tolist() == list(range(layout.n_blocks))


def test_view_of_transposed_storage_is_right():
    x = torch.arange(12.0).view(4, 3).t()
    torch.testing.assert_close(BlockLayout("row", (3, 4)).mean(x), x.mean(1))


@pytest.mark.parametrize("kind", ["row", "column", "whole", "elementwise"])
def test_empty_parameters_have_a_layout(kind):
    layout = BlockLayout(kind, (0, 4))
    assert layout.view(torch.zeros(0, 4)).numel() == 0
    assert layout.index().shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rows", (3, 4)), "kind: .*'rows'"),
        (("row", ()), "shape: row expects 1"),
        (("column", (3,)), "shape: column expects 2"),
        (("head", (6, 4), 4), "size: .*divisor of 6 rows, found 4"),
        (("head", (6, 4), 0), "size: .*found 0"),
        (("row", (6, 4), 2), "size: expected 1"),
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


@pytest.mark.parametrize("preset", ["rows", "paper"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama(preset, tied):
    model = llama(tie_word_embeddings=tied)  # head_dim 8 is not hidden/heads = 6
    blocks = infer_blocks(model, preset, strict=True)
    assert list(blocks) == [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in blocks) is not tied
    for name, parameter in model.named_parameters():
        layout = blocks[name].layout
        layout.validate(name, parameter)
        if preset == "paper" and name.endswith(("q_proj.weight", "k_proj.weight")):
            assert (layout.kind, layout.size) == ("head", 8)
            assert layout.n_blocks == (4 if "q_proj" in name else 2)
        else:
            assert layout == geometric_layout(parameter)


def test_qwen3_heads_and_norms():
    config = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=12, attention_bias=True)
    blocks = infer_blocks(Qwen3ForCausalLM(Qwen3Config(**config, **heads)), "paper", strict=True)
    attention = "model.layers.0.self_attn."
    assert blocks[attention + "q_proj.weight"].layout == BlockLayout("head", (24, 16), 12)
    assert blocks[attention + "k_proj.weight"].layout == BlockLayout("head", (12, 16), 12)
    assert blocks[attention + "v_proj.weight"].layout.kind == "row"
    assert blocks[attention + "q_proj.bias"].layout.kind == "elementwise"
    assert blocks[attention + "q_norm.weight"].layout.kind == "elementwise"


def test_gpt2_matrices_are_cut_by_column():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=12, n_layer=1, n_head=2)
    )
    blocks = infer_blocks(model, "paper", strict=True)
    assert blocks["transformer.h.0.attn.c_attn.weight"].layout == BlockLayout("column", (12, 36))
    assert blocks["transformer.h.0.mlp.c_proj.weight"].layout.n_blocks == 12
    assert blocks["transformer.wpe.weight"].layout.kind == "row"
    assert "lm_head.weight" not in blocks  # tied to wte


def test_column_of_conv1d_is_the_row_of_the_same_linear():
    conv = Conv1D(5, 3)
    blocks = infer_blocks(conv)
    torch.testing.assert_close(blocks["weight"].layout.mean(conv.weight), conv.weight.t().mean(1))


def test_names_do_not_matter():
    """The authors' package finds 'wo' inside 'network' and 'q_proj' by name alone."""
    model = nn.ModuleDict({"network_q_proj": nn.Linear(4, 6), "embed_tokens": nn.Linear(4, 6)})
    blocks = infer_blocks(model, "paper", strict=True)
    assert {name: entry.layout.kind for name, entry in blocks.items()} == {
        "network_q_proj.weight": "row", "network_q_proj.bias": "elementwise",
        "embed_tokens.weight": "row", "embed_tokens.bias": "elementwise",
    }  # fmt: skip


class Attention(nn.Module):
    def __init__(self, head_dim):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        if head_dim is not None:
            self.head_dim = head_dim


@pytest.mark.parametrize("head_dim", [None, 4, 0])
def test_attention_without_a_usable_head_dim_is_not_cut_in_silence(head_dim, caplog):
    assert infer_blocks(Attention(3), "paper", strict=True)["q_proj.weight"].layout.n_blocks == 2
    with caplog.at_level(logging.WARNING):
        blocks = infer_blocks(Attention(head_dim), "paper")
    assert blocks["q_proj.weight"].layout.kind == "row"
    assert len(caplog.records) == 1 and "q_proj.weight (6, 4)" in caplog.text
    with pytest.raises(ValueError, match=r"k_proj.weight \(6, 4\).*head_dim"):
        infer_blocks(Attention(head_dim), "paper", strict=True)
    infer_blocks(Attention(head_dim), "rows", strict=True)  # rows need no heads


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 3, 4))
        self.down = nn.Parameter(torch.zeros(2, 4, 3))
        self.scale = nn.Parameter(torch.zeros(()))


def test_unknown_matrices_are_logged_once_or_refused(caplog):
    with caplog.at_level(logging.WARNING):
        blocks = infer_blocks(Experts())
    assert blocks["up"].layout == BlockLayout("row", (2, 3, 4))
    assert blocks["scale"].layout == BlockLayout("elementwise", ())
    assert len(caplog.records) == 1 and "up (2, 3, 4)" in caplog.text and "down" in caplog.text
    with pytest.raises(ValueError, match=r"strict .*up .*unknown role in Experts"):
        infer_blocks(Experts(), strict=True)


def test_norms_of_two_dimensions_are_elementwise():
    assert infer_blocks(nn.LayerNorm((2, 3)), strict=True)["weight"].layout.kind == "elementwise"


def test_convolutions():
    assert infer_blocks(nn.Conv2d(2, 5, 3), strict=True)["weight"].layout.n_blocks == 5
    with pytest.raises(ValueError, match=r"ConvTranspose2d"):  # stored (in, out, ...)
        infer_blocks(nn.ConvTranspose2d(2, 5, 3), strict=True)


def test_a_tie_between_different_layouts_is_reported(caplog):
    model = nn.Sequential(nn.Embedding(6, 6), Conv1D(6, 6))
    model[1].weight = model[0].weight
    with caplog.at_level(logging.WARNING):
        blocks = infer_blocks(model)
    assert list(blocks) == ["0.weight", "1.bias"] and blocks["0.weight"].layout.kind == "row"
    assert "1.weight keeps the blocks of 0.weight" in caplog.text


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"preset: .*'snr'"):
        infer_blocks(nn.Linear(2, 2), "snr")


def test_map_prints_as_a_table_and_round_trips():
    blocks = infer_blocks(llama(), "paper")
    lines = str(blocks).splitlines()
    assert lines[0].split() == ["parameter", "shape", "kind", "blocks", "why"]
    assert len(lines) == 1 + len(blocks)
    row = next(line for line in lines if "layers.0.self_attn.q_proj.weight" in line)
    assert row.split()[1:] == ["32x24", "head", "of", "8", "4", "query", "or", "key", "head"]
    assert BlockMap.from_dict(json.loads(json.dumps(blocks.to_dict()))) == blocks
    assert pickle.loads(pickle.dumps(blocks)) == blocks
    with pytest.raises(TypeError):
        blocks["x"] = blocks["lm_head.weight"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "row", "shape": [2, 2], "size": 1}, r"entries\['w'\]: expected key 'reason'"),
        ({"kind": "rows", "shape": [2, 2], "size": 1, "reason": ""}, r"entries\['w'\]: kind"),
    ],
)
def test_broken_entries_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        BlockMap.from_dict({"w": entry})


# Edits to blocks.py that must turn this file red:
#   1. reduce_dims of column: (0,) -> (1,)
#   2. broadcastable: repeat_interleave(self.size) -> repeat(self.size)
#   3. _layout_by_role: drop the _is_transformers_conv1d branch
#   4. _head_rows: head_dim = hidden size // module.config.num_attention_heads (as the authors do)
#   5. infer_blocks: name_of.setdefault(parameter, name) -> name (tied parameters twice)
