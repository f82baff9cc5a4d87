"""Heads of the `paper` preset against autograd: the weights that one head's queries (keys) depend
on, found by their gradient in the model's own forward, are exactly one block."""

import importlib

import pytest
import torch
from architectures import TINY, blocks_behind, inputs_for, tiny
from torch import nn
from transformers import AttentionInterface
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

from trimtab.optim.blocks import infer_blocks

# The attribute of an attention module that makes queries (keys); the first it has.
QUERY = ("q_attn", "q_b_proj", "q_proj", "query", "query_proj", "q", "q_lin")
KEY = ("kv_b_proj", "k_proj", "key", "key_proj", "k", "k_lin")
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj")
# Norms over all heads at once would make every head depend on every weight.
ACROSS_HEADS = {"OLMo2": ("q_norm", "k_norm")}
# No attention; DeBERTa-V2 hands out its queries nowhere.
WITH_HEADS = [name for name in TINY if name not in ("Mamba", "Mamba-2", "ConvNeXt", "DeBERTa-V2")]


@pytest.fixture
def calls(monkeypatch):
    """(module, queries, keys) of every attention, both [B, H, T, D], filled by a forward pass."""
    seen = []

    def attend(module, query, key, value, *args, **kwargs):
        seen.append((module, query, key))
        mixed = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
        return mixed.expand(-1, -1, query.shape[2], -1).transpose(1, 2), None

    AttentionInterface.register("capture", attend)
    # Classes that do not ask AttentionInterface; GPT-J and CodeGen do from transformers 5.24 on.
    for path, method, pick in (
        ("bloom.modeling_bloom.BloomAttention", "_reshape", lambda _, qkv: qkv[:2]),
        ("gptj.modeling_gptj.GPTJAttention", "_attn", lambda arguments, _: arguments[:2]),
        ("codegen.modeling_codegen.CodeGenAttention", "_attn", lambda arguments, _: arguments[:2]),
        (
            "falcon.modeling_falcon.FalconAttention",
            "_split_heads",
            lambda _, qkv: (qkv[0].transpose(1, 2), qkv[1].transpose(1, 2)),
        ),
        (
            "deberta.modeling_deberta.DisentangledSelfAttention",
            "transpose_for_scores",
            lambda arguments, out: out.chunk(3, -1)[:2] if arguments[0].shape[-1] == 96 else None,
        ),
    ):
        watch(monkeypatch, seen, f"transformers.models.{path}", method, pick)
    return seen


def watch(monkeypatch, seen, path, method, pick):
    module, _, name = path.rpartition(".")
    host = importlib.import_module(module)
    owner = getattr(host, name)
    if not hasattr(owner, method) and hasattr(host, "ALL_ATTENTION_FUNCTIONS"):
        return
    original = getattr(owner, method)

    def wrapped(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        found = pick(args, out)
        if found is not None:
            seen.append((self, *found))
        return out

    monkeypatch.setattr(owner, method, wrapped)


def captured(name):
    own = {"BLOOM", "DeBERTa", "DeBERTa-V2"}
    own |= {
        name
        for name, owner in (("GPT-J", GPTJAttention), ("CodeGen", CodeGenAttention))
        if hasattr(owner, "_attn")
    }
    model = tiny(name, None if name in own or name.startswith("Falcon") else "capture")
    for module in model.modules():
        for norm in ACROSS_HEADS.get(name, ()):
            if hasattr(module, norm):
                setattr(module, norm, nn.Identity())
    return model


def weight_of(module, names):
    made = [getattr(module, name, None) for name in names]
    return next(made for made in made if made is not None).weight


def check_heads(model, calls, blocks):
    """Every head of every call is one block, and what is no head is single neurons."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert calls
    for module, queries, keys in calls:
        heads = {}  # by parameter
        for states, attributes in ((queries, QUERY + FUSED), (keys, KEY + FUSED)):
            weight = weight_of(module, attributes)
            layout = blocks[names[weight]].layout
            found = blocks_behind(states.unbind(1), weight, layout)
            heads.setdefault(weight, set()).update(found)
        for weight, claimed in heads.items():
            layout = blocks[names[weight]].layout
            rest = set(range(layout.n_blocks)) - claimed
            assert all(layout.block_lengths()[b] == layout.unit_length for b in rest)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_head_is_a_block(name, calls):
    model = captured(name)
    blocks = infer_blocks(model, "paper", strict=True)
    calls.clear()  # of buildings that ran a forward
    model(**inputs_for(model))
    check_heads(model, calls, blocks)


@pytest.mark.parametrize("name", ["DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-V3"])
def test_the_rotary_key_that_latent_heads_share_is_a_block(name, calls):
    model = captured(name)
    blocks = infer_blocks(model, "paper", strict=True)
    model(**inputs_for(model))
    module, _, keys = calls[0]
    layout = blocks["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].layout
    weight = module.kv_a_proj_with_mqa.weight
    rotary = keys[..., module.qk_nope_head_dim :]
    (shared,) = set(blocks_behind(rotary.unbind(1), weight, layout))
    assert shared == layout.n_blocks - 1 == module.kv_lora_rank


class CausalSelfAttention(nn.Module):
    """As in karpathy/nanoGPT, model.py."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)
        self.n_head, self.n_embd = 4, 32

    def forward(self, x):
        q, k, v = (part.view(*x.shape[:2], 4, 8) for part in self.c_attn(x).split(32, dim=2))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """As timm.layers.attention.Attention in timm 1.0."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(y.transpose(1, 2).flatten(2))


def multihead(**sizes):
    made = nn.MultiheadAttention(32, 4, batch_first=True, **sizes)
    made.forward = lambda x: nn.MultiheadAttention.forward(
        made, x, x[..., : made.kdim], x[..., : made.vdim], need_weights=False
    )
    return made


@pytest.mark.parametrize(
    ("make", "query", "key"),
    [
        (CausalSelfAttention, "c_attn.weight", "c_attn.weight"),
        (Attention, "qkv.weight", "qkv.weight"),
        (multihead, "in_proj_weight", "in_proj_weight"),
        (lambda: multihead(kdim=20, vdim=12), "q_proj_weight", "k_proj_weight"),
    ],
    ids=["nanoGPT", "timm", "MultiheadAttention", "MultiheadAttention-kdim"],
)
def test_heads_outside_transformers(make, query, key, monkeypatch):
    monkeypatch.setattr(Attention, "__module__", "timm.layers.attention")
    torch.manual_seed(0)
    model, states = make(), []
    blocks = infer_blocks(model, "paper", strict=True)
    product = nn.functional.scaled_dot_product_attention

    def watched(q, k, v, *args, **kwargs):
        states.extend((q, k))
        return product(q, k, v, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    model(torch.randn(1, 5, 32))
    weights = dict(model.named_parameters())
    for state, name in zip(states, (query, key), strict=True):
        found = blocks_behind(state.unbind(1), weights[name], blocks[name].layout)
        assert len(set(found)) == 4


# Edits that must turn this file red:
#   block_roles.py:
#   1. _GATED_QUERY -> ()
#   2. _grouped: queries // keys -> queries
#   3. _FUSED: order of Phi3Attention _contiguous -> _grouped
#   4. _latent: nope[0] + rope[0] -> nope[0]
#   5. _codegen: "qvk" -> "qkv"
