"""What infer_blocks makes of modules; heads are in test_blocks_heads.py, hosts in
test_blocks_hosts.py."""

import logging
from fnmatch import fnmatchcase
from math import prod

import pytest
import torch
from architectures import TINY, blocks_behind, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from trimtab.optim import BlockLayout, geometric_layout
from trimtab.optim.blocks import infer_blocks

PRESETS = ("rows", "paper", "snr")

# Rules by role, as (rows, paper, snr); the first pattern that fits counts.
ROW, COLUMN = ("row",) * 3, ("column",) * 3
BY_INPUT = ("row", "row", "column")


def heads(size):
    return ("row", f"{size} rows", "row")


EMBEDDINGS = {"*emb*": ROW, "shared*": ROW, "*wte*": ROW, "*wpe*": ROW, "*lm_head*": ROW}
FEED_FORWARD = {"*gate_proj*": ROW, "*up_proj*": ROW, "*down_proj*": BY_INPUT}
EXPERTS = {"*.experts.down_proj": BY_INPUT, "*.experts.*": ROW, "*.gate.*": ROW, "*router*": ROW}
TRANSPOSED = {"*.experts.down_proj": ("column", "column", "row"), "*.experts.*": COLUMN}


def llama(size):
    attention = {"*v_proj*": BY_INPUT, "*o_proj*": BY_INPUT}
    return EMBEDDINGS | EXPERTS | attention | FEED_FORWARD | {"*.[qk]_proj*": heads(size)}


RULES = {
    "Llama": llama(12),
    "Mistral": llama(12),
    "Qwen2": llama(8),
    "Qwen3": llama(12),
    "Gemma": llama(12),
    "Gemma2": llama(12),
    "Gemma3": llama(12),
    "Mixtral": llama(8),
    "Qwen3MoE": llama(12),
    "gpt-oss": llama(12) | TRANSPOSED,
    "Llama-4": llama(12) | TRANSPOSED,
    "GPT-2": {
        "*c_attn*": ("column", "8 x 8 + 32 x 1 columns", "column"),
        "*c_proj*": ("column", "column", "row"),
        "*c_fc*": COLUMN,
    } | EMBEDDINGS,
    "Phi-3": {
        "*qkv_proj*": ("row", "6 x 8 + 16 x 1 rows", "row"),
        "*o_proj*": BY_INPUT,
        "*gate_up_proj*": ROW,
        "*down_proj*": BY_INPUT,
    } | EMBEDDINGS,
    "GPT-NeoX": {
        "*query_key_value*": ("row", "2 x 8 + 8 x 1 rows", "row"),
        "*dense_h_to_4h*": ROW,
        "*dense*": BY_INPUT,
    } | EMBEDDINGS,
    "Falcon-new": {
        "*query_key_value*": ("row", "3 x 8 + 8 x 1 rows", "row"),
        "*dense_h_to_4h*": ROW,
        "*dense*": BY_INPUT,
    } | EMBEDDINGS,
    "DeepSeek-V3": {
        "*q_a_proj*": ROW,
        "*q_b_proj*": heads(10),
        "*kv_a_proj*": ("row", "10 x 1 + 1 x 4 rows", "row"),
        "*kv_b_proj*": ("row", "1 x 6 + 5 x 1 rows", "row"),
        "*o_proj*": BY_INPUT,
    } | EMBEDDINGS | EXPERTS | FEED_FORWARD,
    "BERT": EMBEDDINGS | {
        "*self.query*": heads(8),
        "*self.key*": heads(8),
        "*self.value*": BY_INPUT,
        "*output.dense*": BY_INPUT,
        "*intermediate.dense*": ROW,
        "cls.*": ROW,
    },
    "ViT": {
        "*cls_token*": ("elementwise",) * 3,
        "*position_embeddings*": ROW,
        "*patch_embeddings*": ROW,
        "*.[qk]_proj*": heads(8),
        "*.[vo]_proj*": BY_INPUT,
        "*fc1*": ROW,
        "*fc2*": BY_INPUT,
        "classifier*": ROW,
    },
    "T5": EMBEDDINGS | {
        "*relative_attention_bias*": ROW,
        "*Attention.[qk].*": heads(12),
        "*Attention.[vo].*": BY_INPUT,
        "*.wi.*": ROW,
        "*.wo.*": BY_INPUT,
    },
    "Mamba-2": EMBEDDINGS | {"*conv1d*": ROW, "*_proj*": ROW},
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules_by_role(name):
    model, used = tiny(name), set()
    for number, preset in enumerate(PRESETS):
        for parameter, (layout, _) in infer_blocks(model, preset, strict=True).items():
            if len(layout.shape) < 2 or "_proj_bias" in parameter:  # gpt-oss: a vector per expert
                assert layout.kind == "elementwise"
            else:
                pattern = next(p for p in RULES[name] if fnmatchcase(parameter, p))
                used.add(pattern)
                assert layout.rule == RULES[name][pattern][number], (preset, parameter)
    assert {p for p, rule in RULES[name].items() if rule[1] not in ("row", "column")} <= used


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_tiled_known_and_printed(name):
    model = tiny(name, None)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    for preset in PRESETS:
        blocks = infer_blocks(model, preset, strict=True)
        assert {key: entry.layout.shape for key, entry in blocks.items()} == shapes
        assert len(str(blocks).splitlines()) == 1 + len(shapes)
        for layout, reason in blocks.values():
            assert reason and int(layout.block_lengths().sum()) == prod(layout.shape)


class Conv1DModule(Conv1D):
    """A subclass, as users write them."""


class Projection(nn.Module):
    """A linear layer of unknown class; `stored` is the shape of its weight."""

    def __init__(self, stored):
        super().__init__()
        self.in_features, self.out_features = 3, 5
        self.weight = nn.Parameter(torch.randn(stored))

    def forward(self, x):
        return x @ (self.weight if self.weight.shape[0] == 3 else self.weight.t())


@pytest.mark.parametrize(
    "module",
    [nn.Linear(3, 5), Conv1D(5, 3), Conv1DModule(5, 3), Projection((5, 3)), Projection((3, 5))],
    ids=["Linear", "Conv1D", "Conv1D-subclass", "features-out-in", "features-in-out"],
)
def test_an_output_neuron_is_a_block(module):
    layout = infer_blocks(module, strict=True)["weight"].layout
    found = blocks_behind(module(torch.randn(2, 3)).unbind(-1), module.weight, layout)
    assert sorted(found) == list(range(layout.n_blocks))


def test_an_output_channel_and_a_token_are_blocks():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    layout = infer_blocks(conv, strict=True)["weight"].layout
    channels = conv(torch.randn(1, 4, 5, 5)).unbind(1)
    assert blocks_behind(channels, conv.weight, layout) == list(range(6))
    table = nn.Embedding(5, 3)
    layout = infer_blocks(table, strict=True)["weight"].layout
    assert blocks_behind(table(torch.arange(5)).unbind(0), table.weight, layout) == list(range(5))


def test_transposed_convolutions_are_cut_finer_than_channels():
    layout = infer_blocks(nn.ConvTranspose2d(2, 5, 3), strict=True)["weight"].layout
    assert layout.state_shape == (2, 5)  # stored in x out; a channel is no run of rows


def run_expert(experts):
    """One token through expert 1 of 3 or more: [1, 32]."""
    hidden = torch.ones(1, 32)
    if type(experts).__name__ == "Llama4TextExperts":  # one run of tokens per expert
        return experts(torch.cat([0 * hidden, hidden, 0 * hidden]))[1:2]
    return experts(hidden, torch.tensor([[1]]), torch.ones(1, 1))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3MoE", "DeepSeek-V3", "gpt-oss", "Llama-4"])
def test_a_neuron_of_an_expert_is_a_block(name):
    classes = ("MixtralExperts", "Qwen3MoeExperts", "DeepseekV3Experts", "GptOssExperts")
    classes = (*classes, "Llama4TextExperts")
    experts = next(m for m in tiny(name).modules() if type(m).__name__ in classes)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    by_output, by_input = (infer_blocks(experts, preset, strict=True) for preset in ("rows", "snr"))
    outputs, layout = run_expert(experts).unbind(-1), by_output["down_proj"].layout
    assert blocks_behind(outputs, experts.down_proj, layout) == list(range(32, 64))  # of expert 1
    # With every input of down_proj off but the third, one gate and one up neuron matter.
    layout = by_input["down_proj"].layout
    third = torch.zeros(layout.state_shape).index_fill_(1, torch.tensor([2]), 1.0)
    with torch.no_grad():
        experts.down_proj.mul_(layout.expand(third))
    (gradient,) = torch.autograd.grad(run_expert(experts).sum(), experts.gate_up_proj)
    index, touched = by_output["gate_up_proj"].layout.index(), gradient != 0
    pair = index[touched].unique()
    assert pair.numel() == 2 and torch.equal(touched, torch.isin(index, pair))


def test_names_do_not_matter():
    """The authors' package finds 'wo' inside 'network' and 'q_proj' by name alone."""
    model = nn.ModuleDict({"network_q_proj": nn.Linear(4, 6), "embed_tokens": nn.Linear(4, 6)})
    blocks = infer_blocks(model, "paper", strict=True)
    assert {name: entry.layout.kind for name, entry in blocks.items()} == {
        "network_q_proj.weight": "row", "network_q_proj.bias": "elementwise",
        "embed_tokens.weight": "row", "embed_tokens.bias": "elementwise",
    }  # fmt: skip


class Attention(nn.Module):
    """4 queries and 2 keys of 6 rows; `sizes` are what it says of itself."""

    def __init__(self, rows=24, **sizes):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, rows), nn.Linear(8, 12)
        self.v_proj = nn.Linear(8, 12)
        for name, size in sizes.items():
            setattr(self, name, size)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(head_dim=6),
        dict(num_heads=4),
        dict(head_dim=6, n_head=4),
        dict(head_size=24, attention_head_size=6, num_attention_heads=4),  # LXMERT
    ],
)
def test_head_sizes_are_read_from_the_module(sizes):
    blocks = infer_blocks(Attention(**sizes), "paper", strict=True)
    assert blocks["q_proj.weight"].layout == BlockLayout("row", (24, 8), ((1, 6),))
    assert blocks["k_proj.weight"].layout == BlockLayout("row", (12, 8), ((1, 6),))
    assert blocks["v_proj.weight"].layout.plain


@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(head_dim=7),
        dict(head_dim=0),
        dict(head_dim=True, num_heads=-4),
        dict(head_dim=6, num_heads=2),  # twice the rows: something is beside the queries
        dict(head_dim=8, num_heads=3),  # keys of 12 rows are no heads of 8
    ],
)
def test_heads_are_not_guessed(sizes, caplog):
    with caplog.at_level(logging.WARNING):
        blocks = infer_blocks(Attention(**sizes), "paper")
    assert blocks["k_proj.weight"].layout == BlockLayout("row", (12, 8))
    assert len(caplog.records) == 1 and "k_proj.weight (12, 8)" in caplog.text
    with pytest.raises(ValueError, match=r"k_proj.weight \(12, 8\).* heads of Attention"):
        infer_blocks(Attention(**sizes), "paper", strict=True)
    infer_blocks(Attention(**sizes), "rows", strict=True)  # rows and snr need no heads
    infer_blocks(Attention(**sizes), "snr", strict=True)


def test_a_config_that_raises_is_no_config():
    class Config:
        @property
        def num_heads(self):
            raise RuntimeError("differs between layers")

    assert infer_blocks(Attention(head_dim=6, config=Config()), "paper", strict=True)


def test_fused_projections_of_an_unknown_class_are_not_guessed(caplog):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.num_heads, self.head_dim = nn.Linear(8, 24), 2, 4

    with caplog.at_level(logging.WARNING):
        assert infer_blocks(Mixer(), "paper")["qkv.weight"].layout.plain
    assert "order of q, k, v in Mixer" in caplog.text
    with pytest.raises(ValueError, match="order of q, k, v in Mixer"):
        infer_blocks(Mixer(), "paper", strict=True)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 3, 4))
        self.down = nn.Parameter(torch.zeros(1, 4, 3))
        self.square = Projection((3, 3))  # in x out or out x in?
        self.square.in_features = self.square.out_features = 3
        self.scale = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(1, 1, 5))


@pytest.mark.parametrize("preset", PRESETS)
def test_unknown_matrices_are_logged_once_or_refused(preset, caplog):
    model = nn.ModuleList([Unknown(), Unknown()])
    with caplog.at_level(logging.WARNING):
        blocks = infer_blocks(model, preset)
    assert blocks["0.up"].layout == BlockLayout("row", (2, 3, 4))
    assert blocks["0.down"].layout == BlockLayout("row", (1, 4, 3), stacked=1)  # past dims of 1
    assert blocks["0.square.weight"].layout == BlockLayout("row", (3, 3))
    assert blocks["0.scale"].layout == BlockLayout("elementwise", ())
    assert blocks["0.shift"].layout == BlockLayout("elementwise", (1, 1, 5))  # a vector
    assert len(caplog.records) == 1
    assert "0.up (2, 3, 4) and 3 more: unknown role of Unknown" in caplog.text
    with pytest.raises(ValueError, match=r"strict .*0.up .*unknown role of Unknown.*Projection"):
        infer_blocks(model, preset, strict=True)


def test_projectors_and_heads_are_not_feed_forward_blocks():
    """fc2 of a classifier is an output head, by row under snr too."""

    class Classifier(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, outputs)

    assert infer_blocks(Classifier(3), "snr")["fc2.weight"].layout.kind == "row"
    assert infer_blocks(Classifier(8), "snr")["fc2.weight"].layout.kind == "column"


def test_attention_of_convolutions_stays_by_channel():
    model = nn.ModuleDict({name: nn.Conv2d(8, 8, 1) for name in ("q", "k", "v", "o")})
    model.num_heads = 2
    assert infer_blocks(model, "paper", strict=True)["q.weight"].layout.state_shape == (2,)
    for name in ("v.weight", "o.weight"):  # the last dim is the kernel's
        assert infer_blocks(model, "snr", strict=True)[name].layout.state_shape == (8,)


def test_norms_learned_tokens_and_recurrent_layers():
    assert infer_blocks(nn.LayerNorm((2, 3)), strict=True)["weight"].layout.kind == "elementwise"
    lstm = infer_blocks(nn.LSTM(3, 4, proj_size=2), "paper", strict=True)
    assert lstm["weight_hh_l0"].layout == BlockLayout("row", (16, 2))
    attention = infer_blocks(nn.MultiheadAttention(8, 2, add_bias_kv=True), "paper", strict=True)
    assert attention["bias_k"].layout.kind == "elementwise"


def test_weight_norm_keeps_the_storage_of_its_layer():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2)  # as Wav2Vec2's
    blocks = infer_blocks(nn.Sequential(conv), strict=True)
    assert blocks["0.parametrizations.weight.original0"].layout.kind == "elementwise"
    original = blocks["0.parametrizations.weight.original1"]
    assert original.layout == BlockLayout("row", (6, 4, 3))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tied_parameter_has_one_entry(tied, caplog):
    model = tiny("Llama", tie_word_embeddings=tied)
    with caplog.at_level(logging.WARNING):
        blocks = infer_blocks(model, "paper", strict=True)
    assert list(blocks) == [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in blocks) is not tied and not caplog.records


def test_a_tie_between_different_layouts_is_reported(caplog):
    model = nn.Sequential(nn.Embedding(6, 6), Conv1D(6, 6))
    model[1].weight = model[0].weight
    with caplog.at_level(logging.WARNING):
        blocks = infer_blocks(model)
    assert list(blocks) == ["0.weight", "1.bias"] and blocks["0.weight"].layout.kind == "row"
    assert "1.weight keeps the blocks of 0.weight" in caplog.text


def test_the_first_name_of_a_shared_module_counts():
    shared = nn.Linear(2, 2)
    assert list(infer_blocks(nn.ModuleList([shared, shared]))) == ["0.weight", "0.bias"]


def test_models_without_storage_and_without_parameters():
    with torch.device("meta"):
        blocks = infer_blocks(nn.Linear(3, 5))
    assert blocks["weight"].layout == geometric_layout(torch.zeros(5, 3))
    assert len(infer_blocks(nn.ReLU())) == 0
    empty = nn.Embedding(5, 0)
    assert infer_blocks(empty)["weight"].layout.n_blocks == 5


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"preset: .*'rows'.*found 'row'"):
        infer_blocks(nn.Linear(2, 2), "row")
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet"):
        infer_blocks(nn.Sequential(nn.LazyLinear(2)))


# Edits that must turn this file red:
#   1. block_storage.py: "transformers.pytorch_utils.Conv1D" -> "Conv1d"
#   2. block_storage.py: `_EXPERT_COLUMN if transposed` -> `_EXPERT_ROW if transposed`
#   3. block_roles.py: _feed_forward: drop `width == width_back and`
#   4. blocks.py: `not kinds.issubset(_BY_INPUT)` -> False (kv_b of DeepSeek by input)
#   5. blocks.py: first_names.setdefault(id(parameter), name) -> name (tied parameters twice)
