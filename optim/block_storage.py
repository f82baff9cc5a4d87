"""How modules store their parameters: the dim whose indices are output neurons, channels or tokens.

nn.Linear keeps one output neuron per row, transformers' Conv1D one per column, fused experts one
per row or column of every expert's matrix. Modules are known by class, by what they say of
themselves (in_features, is_transposed, num_experts) and by the attribute that holds a bare
parameter; classes of libraries this package does not need are known by name. Read for it:
transformers 5.23, megatron-core 0.16, peft 0.21, timm 1.0.
"""

from typing import Literal, NamedTuple

from torch import nn


class Storage(NamedTuple):
    """Where the units of a parameter lie.

    axis: "row" or "column", as in BlockLayout; None if entries share nothing (a vector, a norm).
    unit: what a row or column is, in words; what the parameter is if axis is None.
    stacked: number of leading dims that index matrices of their own.
    known: False where "row" is a guess.
    """

    axis: Literal["row", "column"] | None
    unit: str
    stacked: int = 0
    known: bool = True


_NEURON = Storage("row", "output neuron")
_IN_X_OUT = Storage("column", "output neuron, stored in x out")
_EXPERT_ROW = Storage("row", "output neuron of an expert", 1)
_EXPERT_COLUMN = Storage("column", "output neuron of an expert, stored in x out", 1)

# By a class, its name, its name with that of the parameter, or the package it comes from.
_BY_CLASS: tuple[tuple[tuple[type | str, ...], Storage], ...] = (
    ((nn.LayerNorm, nn.RMSNorm), Storage(None, "norm")),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),  # stored in x out x kernel
        Storage("row", "kernel from one input to one output channel", 1),
    ),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), Storage("row", "output channel")),
    (
        (nn.Embedding, nn.EmbeddingBag, "VocabParallelEmbedding", "QuantEmbedding"),
        Storage("row", "token"),
    ),
    ((nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention), _NEURON),
    (("ColumnParallelLinear", "RowParallelLinear", "transformer_engine", "QuantLinear"), _NEURON),
    (
        (
            "transformers.pytorch_utils.Conv1D", "XCLIPModel.prompts_visual_projection",
            "Gemma3MultiModalProjector.mm_input_projection_weight",
            "T5Gemma2MultiModalProjector.mm_input_projection_weight",
            "CLIP.text_projection", "VisionTransformer.proj",  # open_clip
        ),
        _IN_X_OUT,
    ),
    (
        (
            "InklingSharedExperts", "JetMoeParallelExperts", "LongcatFlashExperts",
            "Step3p7Experts",
        ),
        _EXPERT_ROW,
    ),
    (("Llama4TextExperts", "CsmCodebooksHead"), _EXPERT_COLUMN),
    (("DbrxExpertGLU.w2",), Storage("row", "input neuron of an expert, stored in x out")),
    (("DbrxExpertGLU",), Storage("row", "output neuron of an expert")),
    # 2-D tensors that Megatron views as [experts, in, out]:
    (("GroupedMLP.weight1",), Storage(None, "neurons lie at strides that no layout has")),
    (("GroupedMLP.weight2",), Storage("row", "input neuron of an expert, stored in x out")),
)  # fmt: skip

# Bare parameters by the attribute that holds them, which are tables in their last two dims.
_BY_ATTRIBUTE = (
    (
        (
            "position_embeddings", "position_embedding", "positional_embedding", "pos_embed",
            "pos_embedding", "decoder_pos_embed", "rel_pos_h", "rel_pos_w", "query_tokens",
            "register_tokens", "latents",
        ),
        Storage("row", "learned token"),
    ),
    (("lora_A", "lora_B", "lora_embedding_B"), _NEURON),
    (("lora_embedding_A",), Storage("column", "token, stored rank x tokens")),
    (("A_log",), Storage(None, "decay rates of a state space")),
    (
        (
            "bias_u", "bias_v", "pos_bias_u", "pos_bias_v", "r_w_bias", "r_r_bias", "r_s_bias",
            "relative_position_bias_table", "attention_biases",
        ),
        Storage(None, "bias"),
    ),
)  # fmt: skip

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "num_moe_experts")
_FEATURES = (
    ("out_features", "in_features"),
    ("output_size_per_partition", "input_size"),
    ("output_size", "input_size_per_partition"),
)


def find_storage(model: nn.Module) -> dict[tuple[nn.Module, str], Storage]:
    """The Storage of every parameter of a model.

    Args:
        model: any module.

    Returns:
        A dict by (module, name of the parameter in it); a tied parameter is in it once per module.
    """
    modules = dict(model.named_modules())
    found = {}
    for path, module in modules.items():
        parent, _, attribute = path.rpartition(".")
        for key, parameter in module.named_parameters(recurse=False):
            if is_one_of(module, ("ParametrizationList",)):  # <owner>.parametrizations.<attribute>
                owner = modules[parent.rpartition(".")[0]]
                found[module, key] = _storage(owner, key, attribute, parameter)
            else:
                held_by = attribute if isinstance(module, nn.ParameterDict) else key
                found[module, key] = _storage(module, key, held_by, parameter)
    return found


def is_one_of(module: nn.Module, classes: tuple[type | str, ...], key: str = "") -> bool:
    """Whether a module's class or a base of it is listed, as class, name, name.key or package."""
    for c in type(module).__mro__:
        names = {c.__name__, f"{c.__name__}.{key}", f"{c.__module__}.{c.__qualname__}"}
        if c in classes or not names.isdisjoint(classes) or c.__module__.split(".")[0] in classes:
            return True
    return False


def class_name(module: nn.Module) -> str:
    """The name of a module's class, before FSDP2 or a parametrization made one of its own."""
    made = ("torch.distributed", "torch.nn.utils")
    return next(c.__name__ for c in type(module).__mro__ if not c.__module__.startswith(made))


def numbers(module: nn.Module, names: tuple[str, ...], least: int = 1) -> list[int]:
    """The ints from `least` on among named attributes, a module's own before its config's."""
    holders = (module, _attribute(module, "config"))
    values = [_attribute(holder, name) for holder in holders for name in names]
    return [n for n in values if isinstance(n, int) and n >= least and not isinstance(n, bool)]


def _attribute(holder: object, name: str) -> object:
    try:
        return getattr(holder, name, None)
    except Exception:  # transformers' configs raise where layers differ (5.23, heterogeneity)
        return None


def _storage(module: nn.Module, key: str, held_by: str, parameter: nn.Parameter) -> Storage:
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        return Storage(None, f"{len(shape)}-D")
    vector = sum(n > 1 for n in shape) < 2
    if key == "weight" or not vector:
        for classes, storage in _BY_CLASS:
            if is_one_of(module, classes, key):
                return storage
    if vector:
        return Storage(None, "vector")
    for names, storage in _BY_ATTRIBUTE:
        if held_by in names:
            return storage._replace(stacked=len(shape) - 2 if storage.axis else 0)
    transposed = _attribute(module, "is_transposed")  # transformers' use_experts_implementation
    if isinstance(transposed, bool) and len(shape) == 3:
        return _EXPERT_COLUMN if transposed else _EXPERT_ROW
    if isinstance(transposed, bool):
        return Storage(None, "bias of every expert")
    if len(shape) == 2 and shape[0] in numbers(module, _EXPERTS):
        return Storage("row", "routing weights of an expert")
    for names in _FEATURES:
        sizes = tuple(_attribute(module, name) for name in names)
        if shape == sizes and shape[0] != shape[1]:
            return _NEURON
        if shape == sizes[::-1] and shape[0] != shape[1]:
            return _IN_X_OUT
    return Storage("row", "unknown role", next(i for i, n in enumerate(shape) if n > 1), False)
