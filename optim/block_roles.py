"""What the output neurons of a matrix are: heads of queries, values, gates, ... and in which order.

A role is read from the attributes of the module that owns a projection (q_proj, k_proj and v_proj
of one module make it attention), head sizes from its own counts and those of its config. The tables
below are all the knowledge there is; what they lack stays a plain matrix. Checked against
transformers 5.23, megatron-core 0.16 and peft 0.21; heads by autograd, tests/test_blocks_heads.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from .block_storage import Storage, class_name, is_one_of, numbers

Site = tuple[nn.Module, str]  # a module and the name of one of its own parameters


class Part(NamedTuple):
    """Consecutive output neurons of one role: `count` heads of `size` neurons each.

    role: q, k, v, o, gate, gate/up, down or latent.
    """

    role: str
    count: int
    size: int


class Role(NamedTuple):
    """What a matrix is.

    parts: its output neurons in order; the pattern repeats. Empty where that is not known.
    words: the same for a reader, or what is not known.
    """

    parts: tuple[Part, ...]
    words: str


class Period(NamedTuple):
    """Parts that repeat: `repeats` times in a matrix, or as often as they fit if 0."""

    parts: tuple[Part, ...]
    repeats: int = 0

    def tiles(self, outputs: int) -> bool:
        """Whether it makes up `outputs` output neurons."""
        length = sum(part.count * part.size for part in self.parts)
        whole = all(part.count > 0 and part.size > 0 for part in self.parts)
        return whole and outputs % length == 0 and self.repeats in (0, outputs // length)


# Orders of fused projections, given the numbers of query and key heads and the size of a head:
# the periods to try.
def _contiguous(queries: int, keys: int, size: int) -> list[Period]:
    parts = (Part("q", queries, size), Part("k", keys, size), Part("v", keys, size))
    return [Period(parts, 1)]


def _grouped(queries: int, keys: int, size: int) -> list[Period]:
    """The queries of a group, its key, its value; one query a group in plain attention."""
    q, k, v = Part("q", queries // keys, size), Part("k", 1, size), Part("v", 1, size)
    return [Period((q, k, v), keys)]


def _grouped_gated_or_not(queries: int, keys: int, size: int) -> list[Period]:
    """Megatron's: with attention_output_gate, as many gates follow the queries of a group."""
    (((q, k, v), _),) = _grouped(queries, keys, size)
    return [Period((q, k, v), keys), Period((q, q._replace(role="gate"), k, v), keys)]


def _codegen(queries: int, keys: int, size: int) -> list[Period]:
    """Cut in four for the TPU cores that it was trained on; values before keys."""
    return [Period(tuple(Part(role, queries // 4, size) for role in "qvk"), 4)]


def _keys_values(queries: int, keys: int, size: int) -> list[Period]:
    return [Period((Part("k", keys, size), Part("v", keys, size)), 1)]


def _key_value_pairs(queries: int, keys: int, size: int) -> list[Period]:
    return [Period((Part("k", 1, size), Part("v", 1, size)), keys)]


# Attention with projections of their own: query, key, value, and where the output is.
_SEPARATE = (
    ("self.query", "self.key", "self.value", ("output.dense",)),  # BertAttention
    ("attention.query", "attention.key", "attention.value", ("output.dense",)),
    (
        "q_proj", "k_proj", "v_proj",
        ("o_proj", "out_proj", "dense", "proj", "output_proj", "projection_layer", "linear", "Wo"),
    ),
    ("query", "key", "value", ("dense", "out_proj", "proj", "output")),
    ("q", "k", "v", ("o", "proj", "out_proj")),
    ("q_lin", "k_lin", "v_lin", ("out_lin",)),
    ("query_proj", "key_proj", "value_proj", ("out_proj",)),
    ("linear_q", "linear_k", "linear_v", ("linear_out",)),
    ("wq", "wk", "wv", ("wo",)),
    ("Wq", "Wk", "Wv", ("dense",)),
    ("c_q", "c_k", "c_v", ("c_proj",)),
    ("to_q", "to_k", "to_v", ("to_out.0", "to_out")),
    ("q_head", "k_head", "v_head", ("post_proj",)),
    ("project_q", "project_k", "project_v", ("attention_out",)),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight", ("out_proj",)),  # nn.MultiheadAttention
)  # fmt: skip

# Classes whose query projection gives every head its query and then as many output gates.
_GATED_QUERY = (
    "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention",
)  # fmt: skip

# Fused attention: classes or packages, projection, order, a query kept apart, the output.
_CONV1D = (
    "GPT2Attention", "ImageGPTAttention", "DecisionTransformerGPT2Attention",
    "transformers.models.openai.modeling_openai.Attention",
)  # fmt: skip
_TIMM = (
    "timm.layers.attention.Attention", "timm.layers.attention.AttentionRope",
    "timm.models.vision_transformer.Attention", "timm.models.swin_transformer.WindowAttention",
    "timm.models.beit.Attention", "timm.models.eva.EvaAttention",
)  # fmt: skip
_Order = Callable[[int, int, int], list[Period]]
_FUSED: tuple[tuple[tuple[type | str, ...], str, _Order, str, str], ...] = (
    ((nn.MultiheadAttention,), "in_proj_weight", _contiguous, "", "out_proj"),
    ((*_CONV1D, "GPTBigCodeAttention"), "c_attn", _keys_values, "q_attn", "c_proj"),
    ((*_CONV1D, "CausalSelfAttention"), "c_attn", _contiguous, "", "c_proj"),  # the latter: nanoGPT
    (("GPTBigCodeAttention",), "c_attn", _grouped, "", "c_proj"),
    (("Phi3Attention", "Phi4MultimodalAttention"), "qkv_proj", _contiguous, "", "o_proj"),
    (("MiniMaxLightningAttention",), "qkv_proj", _grouped, "", "out_proj"),
    (("CodeGenAttention",), "qkv_proj", _codegen, "", "out_proj"),
    (("GPTNeoXAttention", "GPTNeoXJapaneseAttention"), "query_key_value", _grouped, "", "dense"),
    (("BloomAttention", "FalconAttention"), "query_key_value", _grouped, "", "dense"),
    (("PersimmonAttention",), "query_key_value", _grouped, "", "dense"),
    (("DisentangledSelfAttention",), "in_proj", _grouped, "", ""),
    (("MptAttention",), "Wqkv", _contiguous, "", "out_proj"),
    (("ModernBertAttention",), "Wqkv", _contiguous, "", "Wo"),
    (("BarkSelfAttention",), "att_proj", _contiguous, "", "out_proj"),
    (("JetMoeAttention",), "kv_proj", _keys_values, "", ""),
    (("transformers", *_TIMM), "qkv", _contiguous, "", "proj"),  # every vision tower of theirs
    (("transformers",), "qkv", _contiguous, "", "projection"),
    (("megatron",), "linear_qkv", _grouped_gated_or_not, "", "linear_proj"),
    (("megatron",), "linear_kv", _key_value_pairs, "linear_q", "linear_proj"),
)

# Fused projections whose order depends on the class: a doubt where the class is not in _FUSED.
_ORDER_UNKNOWN = (
    "qkv", "qkv_proj", "Wqkv", "wqkv", "W_pack", "c_attn", "query_key_value", "to_qkv",
    "linear_qkv", "in_proj_weight",
)  # fmt: skip

# Latent attention (MLA): query, with and without a latent; latent and shared key; key and value.
_LATENT = (
    (("q_b_proj", "q_proj"), "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    (
        ("linear_q_up_proj", "linear_q_proj"),
        "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj",
    ),
)  # fmt: skip
_NOPE = ("qk_nope_head_dim", "qk_head_dim")
_ROPE = ("qk_rope_head_dim", "qk_pos_emb_head_dim")

# Feed-forward blocks: ways in, way back.
_FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("linear_fc1",), "linear_fc2"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate_dense",), "output_dense"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("Wi",), "Wo"),
    (("w1", "w3"), "w2"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("linear_1",), "linear_2"),
    (("layer_1",), "layer_2"),
    (("pwconv1",), "pwconv2"),
    (("ffn",), "ffn_output"),
    (("input_linear",), "output_linear"),
)

_QUERY_HEADS = (
    "num_attention_heads_per_partition", "num_heads", "num_attention_heads", "n_heads", "n_head",
    "num_attn_heads", "heads", "num_k_heads", "groups",
)  # fmt: skip
_KEY_HEADS = (
    "num_query_groups_per_partition", "num_key_value_heads", "num_kv_heads", "kv_heads",
    "n_kv_heads", "kv_n_heads",
)  # fmt: skip
_HEAD_SIZES = (
    "hidden_size_per_attention_head", "head_dim", "attention_head_size", "head_size",
    "key_value_proj_dim", "head_k_dim", "dim_head", "qk_channels_per_head",
)  # fmt: skip

# What peft and torch put between a module and its projection; copies have the original's role.
_WRAPPED = (
    "base_layer", "original_module", "modules_to_save",
    "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module",
)  # fmt: skip


def find_roles(model: nn.Module, storage: Mapping[Site, Storage]) -> dict[Site, Role]:
    """The roles of the matrices of a model, as far as the tables know them.

    Args:
        model: any module.
        storage: of its parameters, from `find_storage`.

    Returns:
        A dict by (module, name of the parameter in it) that lacks matrices without a role.
    """
    shapes = {}
    for (module, key), stored in storage.items():
        shape = getattr(module, key).shape[stored.stacked :]
        if stored.axis and stored.known and len(shape) > 1:
            outputs = shape[0] if stored.axis == "row" else shape[-1]
            shapes[module, key] = (outputs, shape.numel() // max(outputs, 1))
    roles: dict[Site, Role] = {}
    for owner in model.modules():
        for find in (_latent, _fused, _separate, _feed_forward, _order_unknown):
            for site, role in find(owner, shapes):
                roles.setdefault(site, role)
    return roles


_Shapes = Mapping[Site, tuple[int, int]]  # output neurons and inputs of a matrix
_Found = Iterator[tuple[Site, Role]]


def _latent(owner: nn.Module, shapes: _Shapes) -> _Found:
    for queries, down, up, output in _LATENT:
        query = next((path for path in queries if _sites(owner, path, shapes)), "")
        if not query or not _sites(owner, up, shapes):
            continue
        names = (_NOPE, _ROPE, ("v_head_dim",), ("kv_lora_rank",))
        nope, rope, value, rank = (numbers(owner, sizes, least=0) or [0] for sizes in names)
        k, v = Part("k", 1, nope[0]), Part("v", 1, value[0])
        shared = Period((Part("latent", 1, rank[0]), Part("k", 1, rope[0])), 1)
        alone = Period(shared.parts[:1], 1)  # layers without rotary embedding
        yield from _assign(owner, query, [Period((Part("q", 1, nope[0] + rope[0]),))], shapes)
        yield from _assign(owner, down, [shared, alone], shapes)
        yield from _assign(owner, up, [Period((k, v))], shapes)
        yield from _one(owner, output, "o", shapes)


def _fused(owner: nn.Module, shapes: _Shapes) -> _Found:
    for classes, path, order, query, output in _FUSED:
        sites = _sites(owner, path, shapes)
        if not sites or not is_one_of(owner, classes):
            continue
        if query and not _sites(owner, query, shapes):  # the same class without cross-attention
            continue
        queries = numbers(owner, _QUERY_HEADS)[:1]
        keys = numbers(owner, _KEY_HEADS)[:1] or queries
        sizes = numbers(owner, _HEAD_SIZES) or [shapes[sites[0]][0] // (3 * n) for n in queries]
        heads = [(q, k, size) for q in queries for k in keys for size in sizes]
        periods = [period for pair in heads for period in order(*pair)]
        yield from _assign(owner, path, periods, shapes)
        apart = [Period((Part("q", 1, size),)) for size in sizes]
        yield from _assign(owner, query, apart, shapes)
        yield from _one(owner, output, "o", shapes)


def _separate(owner: nn.Module, shapes: _Shapes) -> _Found:
    for query, key, value, outputs in _SEPARATE:
        if not all(_sites(owner, path, shapes) for path in (query, key, value)):
            continue
        holder = owner.get_submodule(query.rpartition(".")[0])
        gated = is_one_of(holder, _GATED_QUERY)
        heads = _query_heads(holder, shapes[_sites(owner, query, shapes)[0]][0] // (1 + gated))
        gates = [Part("gate", 1, size) for _, size in heads if gated]
        queries = [Period((Part("q", 1, size), *gates), n) for n, size in heads]
        keys = [
            Period((Part("k", 1, size),), n // served)
            for n, size in heads
            for served in range(1, n + 1)
            if n % served == 0
        ]
        yield from _assign(owner, query, queries, shapes)
        yield from _assign(owner, key, keys, shapes)
        for role, path in (("v", value), *(("o", output) for output in outputs)):
            yield from _one(owner, path, role, shapes)


def _feed_forward(owner: nn.Module, shapes: _Shapes) -> _Found:
    for ups, down in _FEED_FORWARD:
        first, back = _sites(owner, ups[0], shapes), _sites(owner, down, shapes)
        if not first or not back:
            continue
        (wide, width), (width_back, wide_back) = shapes[first[0]], shapes[back[0]]
        if width == width_back and wide in (wide_back, 2 * wide_back):  # else a projector, a head
            for role, path in (*(("gate/up", up) for up in ups), ("down", down)):
                yield from _one(owner, path, role, shapes)


def _order_unknown(owner: nn.Module, shapes: _Shapes) -> _Found:
    for path in _ORDER_UNKNOWN:
        for site in _sites(owner, path, shapes):
            yield site, Role((), f"order of q, k, v in {class_name(owner)} not known")


def _query_heads(owner: nn.Module, outputs: int) -> list[tuple[int, int]]:
    """The number and size of the query heads that `outputs` neurons are: one pair, or none."""
    counts, sizes = numbers(owner, _QUERY_HEADS), numbers(owner, _HEAD_SIZES)
    counts = counts or [outputs // size for size in sizes]
    sizes = sizes or [outputs // n for n in counts if n]
    return [(n, size) for size in sizes for n in counts if n * size == outputs][:1]


def _one(owner: nn.Module, path: str, role: str, shapes: _Shapes) -> _Found:
    """A matrix of one role whose heads, if any, do not matter."""
    for site in _sites(owner, path, shapes):
        yield site, Role((Part(role, 1, shapes[site][0]),), f"{role} of {class_name(owner)}")


def _assign(owner: nn.Module, path: str, periods: list[Period], shapes: _Shapes) -> _Found:
    """The first period that tiles the matrix, or the doubt that none does."""
    for site in _sites(owner, path, shapes):
        outputs = shapes[site][0]
        fitting = (period.parts for period in periods if period.tiles(outputs))
        parts = next(fitting, ())
        roles = ", ".join(dict.fromkeys(part.role for part in parts))
        doubt = f"its {outputs} output neurons are not whole groups of heads of {class_name(owner)}"
        yield site, Role(parts, f"{roles} of {class_name(owner)}" if parts else doubt)


def _sites(owner: nn.Module, path: str, shapes: _Shapes) -> list[Site]:
    """The matrix at an attribute path of a module, and its copies where peft keeps some."""
    *parents, name = path.split(".")
    for parent in parents:
        inner = owner._modules.get(parent)
        if inner is None:
            return []
        owner = inner
    if name in owner._parameters:
        return [(owner, name)] if (owner, name) in shapes else []
    return [site for site in _weights(owner._modules.get(name)) if site in shapes]


def _weights(module: nn.Module | None) -> Iterator[Site]:
    if module is None:
        return
    wrapped = [module._modules[name] for name in _WRAPPED if name in module._modules]
    for inner in wrapped:
        for copy in inner.children() if isinstance(inner, nn.ModuleDict) else (inner,):
            yield from _weights(copy)
    if not wrapped:
        yield module, "weight"
