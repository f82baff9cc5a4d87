"""Which models a prefix may be shared in; what would change their results is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# dropout by function, not by a module (others of a configuration belong to other heads)
_DROPOUT = (
    "attention_dropout", "attn_pdrop", "attn_dropout", "dropout", "activation_dropout",
    "hidden_dropout", "layerdrop",
)  # fmt: skip
_WINDOWED = {"sliding_attention"}


def refuse_unsupported(model: PreTrainedModel, longest: int | None = None) -> None:
    """Raises if sharing a prefix would change what the model computes.

    Args:
        model: a transformers causal LM.
        longest: tokens of the longest prompt with its response: a sliding window of at least so
            many is no window. None: every window is refused.

    Raises:
        ValueError: attention outside transformers' registry (ALiBi among others), rotary embeddings
            that depend on the current length, positions that do not start at 0, layers without
            softmax attention, a sliding window
            shorter than `longest`, dropout in training mode, or experts whose choice depends on
            the other tokens (capacity, expert choice, jitter); the message names which.
    """
    if not model._supports_attention_backend:
        name = type(model).__name__
        raise ValueError(f"model: {name} does not use transformers' attention registry, refused")
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    # flat, or one for each kind of layer
    for parameters in [r for r in rope.values() if isinstance(r, dict)] or [rope]:
        kind = parameters.get("rope_type", "default")
        if kind in _LENGTH_DEPENDENT_ROPE:
            raise ValueError(f"model: rope type {kind!r} depends on the current length, refused")
    _refuse_layers(config, longest)
    for name, module in model.named_modules():
        # RoBERTa and its kin: positions are counted from padding_idx + 1, in the model
        table = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if table and module.padding_idx is not None:
            raise ValueError(
                f"model: positions of {name} start at {module.padding_idx + 1} (padding_idx), "
                "refused"
            )
    if model.training:
        _refuse_dropout(model, config)
    _refuse_experts(model, config)


def _refuse_layers(config: PreTrainedConfig, longest: int | None) -> None:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    narrow = window is not None and (longest is None or window < longest)
    allowed = {"full_attention"} | (set() if narrow or longest is None else _WINDOWED)
    if layers - allowed:
        raise ValueError(
            f"model: expected full attention in every layer, got {sorted(layers)}"
            + (f" with a sliding window of {window} tokens" if layers & _WINDOWED else "")
            + ("" if longest is None else f", and a longest sequence of {longest}")
        )
    if narrow and "layer_types" not in config:
        raise ValueError(f"model: sliding window of {window} tokens, refused")


def _refuse_dropout(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    for name, value in _settings(config):
        if name.rpartition(".")[2] in _DROPOUT and value:
            raise ValueError(f"model: {name} is {value}, expected 0: a group would share its mask")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"model: dropout of {module.p} at {name}, expected 0: a group would share its mask"
            )


def _refuse_experts(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    for name, value in _settings(config):
        if "jitter" in name and value and model.training:
            raise ValueError(f"model: {name} is {value}, expected 0")
    capacity = getattr(config, "expert_capacity", None) or getattr(config, "capacity_factor", None)
    if capacity:
        raise ValueError(f"model: experts of limited capacity ({capacity}) drop tokens, refused")
    if "expert_choice" in str(getattr(config, "router_type", "")):
        raise ValueError("model: experts choose tokens (expert choice), expected tokens to choose")


def _settings(config: PreTrainedConfig) -> Iterator[tuple[str, object]]:
    """Names and values of a configuration, with those of configurations within it."""
    for name, value in vars(config).items():
        inner = vars(value) if isinstance(value, PreTrainedConfig) else value
        if isinstance(inner, dict):
            yield from ((f"{name}.{key}", x) for key, x in inner.items())
        else:
            yield name, value


def refuse_for_phases(model: nn.Module, config: PreTrainedConfig) -> None:
    """Raises for what only the phases cannot do: they replace attention and go backward by parts.

    Args:
        model: as the user has it, wrapped or not.
        config: of its text model.

    Raises:
        ValueError: capped attention scores, FSDP1, a model compiled as a whole, an adapter of
            prompt learning, or a parameter with a hook that acts in backward.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"model: attention scores capped at {config.attn_logit_softcapping} "
            "(attn_logit_softcapping), expected uncapped scores"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "model: it is compiled as a whole (model.compile()), expected the model itself or "
            "compiled layers: [layer.compile() for layer in model.model.layers]"
        )
    prompt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if prompt:
        raise ValueError(
            "model: an adapter of prompt learning (prefix or prompt tuning) puts tokens of its own "
            "before the prompt, refused"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("model: FSDP1 (FullyShardedDataParallel), expected FSDP2 (fully_shard)")
    for name, parameter in model.named_parameters():
        if parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"model: {name} has a post-accumulate-grad hook; a group accumulates several times"
            )
