"""Tiny models of many architectures, and what their weights do, by autograd."""

import torch
import transformers

_BASE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GQA = _BASE | dict(num_key_value_heads=2)
_WIDE = _GQA | dict(head_dim=12)  # not hidden / heads
_GPT = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4) | dict(
    bos_token_id=1, eos_token_id=2
)
_EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16)
_LOCAL_EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
_LATENT = _BASE | dict(
    num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4,
    v_head_dim=5, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
_VISION = _BASE | dict(image_size=16, patch_size=8)
_T5 = dict(vocab_size=64, d_model=32, d_kv=12, d_ff=40, num_layers=2, num_heads=4)
_SPEECH = dict(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
_FALCON = {k: v for k, v in _BASE.items() if k != "intermediate_size"}

# name: (class in transformers, config)
TINY = {
    "Llama": ("LlamaForCausalLM", _WIDE),
    "Mistral": ("MistralForCausalLM", _WIDE),
    "Mixtral": ("MixtralForCausalLM", _GQA | _LOCAL_EXPERTS),
    "Qwen2": ("Qwen2ForCausalLM", _GQA),
    "Qwen3": ("Qwen3ForCausalLM", _WIDE),
    "Qwen3MoE": ("Qwen3MoeForCausalLM", _WIDE | _EXPERTS),
    "Qwen3Next": (
        "Qwen3NextForCausalLM",
        _WIDE | _EXPERTS | dict(
            layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=16,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
    "Gemma": ("GemmaForCausalLM", _WIDE),
    "Gemma2": ("Gemma2ForCausalLM", _WIDE),
    "Gemma3": ("Gemma3ForCausalLM", _WIDE),
    "GPT-2": ("GPT2LMHeadModel", _GPT),
    "GPT-2-cross": ("GPT2LMHeadModel", _GPT | dict(add_cross_attention=True)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", _BASE),
    "GPT-J": ("GPTJForCausalLM", _GPT | dict(rotary_dim=4)),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", _GPT),
    "GPT-BigCode-MHA": ("GPTBigCodeForCausalLM", _GPT | dict(multi_query=False)),
    "CodeGen": ("CodeGenForCausalLM", _GPT | dict(n_head=8, rotary_dim=4)),
    "BLOOM": ("BloomForCausalLM", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "Falcon": ("FalconForCausalLM", _FALCON),
    "Falcon-new": (
        "FalconForCausalLM", _FALCON | dict(num_kv_heads=2, new_decoder_architecture=True)
    ),
    "Falcon-MHA": ("FalconForCausalLM", _FALCON | dict(multi_query=False)),
    "OPT": (
        "OPTForCausalLM",
        dict(
            vocab_size=64, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=32,
        ),
    ),
    "Phi": ("PhiForCausalLM", _BASE),
    "Phi-3": ("Phi3ForCausalLM", _GQA),
    "StableLM": ("StableLmForCausalLM", _GQA),
    "OLMo2": ("Olmo2ForCausalLM", _GQA),
    "Granite": ("GraniteForCausalLM", _GQA),
    "Cohere": ("CohereForCausalLM", _GQA),
    "Persimmon": ("PersimmonForCausalLM", _BASE),
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", _LATENT),
    "DeepSeek-V2-Lite": ("DeepseekV2ForCausalLM", _LATENT | dict(q_lora_rank=None)),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", _LATENT),
    "gpt-oss": ("GptOssForCausalLM", _WIDE | _LOCAL_EXPERTS),
    "Llama-4": ("Llama4ForCausalLM", _WIDE | dict(intermediate_size_mlp=40, num_local_experts=3)),
    "MiniMax": (
        "MiniMaxForCausalLM",
        _WIDE | _LOCAL_EXPERTS | dict(layer_types=["linear_attention", "full_attention"]),
    ),
    "Mamba": ("MambaForCausalLM", dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
    "Mamba-2": (
        "Mamba2ForCausalLM",
        dict(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1,
            state_size=8,
        ),
    ),
    "BERT": ("BertForMaskedLM", _BASE),
    "RoBERTa": ("RobertaForMaskedLM", _BASE),
    "DistilBERT": (
        "DistilBertForMaskedLM", dict(vocab_size=64, dim=32, hidden_dim=40, n_layers=2, n_heads=4)
    ),
    "DeBERTa": ("DebertaForMaskedLM", _BASE),
    "DeBERTa-V2": ("DebertaV2ForMaskedLM", _BASE),
    "ALBERT": ("AlbertForMaskedLM", _BASE | dict(embedding_size=16)),
    "ModernBERT": (
        "ModernBertForMaskedLM", _BASE | dict(cls_token_id=1, sep_token_id=2)
    ),
    "ViT": ("ViTForImageClassification", _VISION),
    "CLIP": (
        "CLIPModel",
        dict(text_config=_BASE | dict(max_position_embeddings=16), vision_config=_VISION),
    ),
    "ConvNeXt": (
        "ConvNextModel", dict(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=16)
    ),
    "T5": ("T5ForConditionalGeneration", _T5),
    "mT5": ("MT5ForConditionalGeneration", _T5),
    "BART": ("BartForConditionalGeneration", _SPEECH | dict(max_position_embeddings=32)),
    "Whisper": (
        "WhisperForConditionalGeneration",
        _SPEECH | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=16),
    ),
    "Wav2Vec2": (
        "Wav2Vec2Model",
        _BASE | dict(
            conv_dim=(16, 16), conv_kernel=(3, 3), conv_stride=(2, 2), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
    ),
}  # fmt: skip


def tiny(name, attention="eager", **overrides):
    """A model of TINY in evaluation mode.

    Args:
        name: a key of TINY.
        attention: the implementation of attention; None for the class's own.
        overrides: of its config.
    """
    class_name, config = TINY[name]
    model_class = getattr(transformers, class_name)
    made = model_class.config_class(**config | overrides)
    torch.manual_seed(0)
    if attention is None:
        return model_class(made).eval()
    return model_class._from_config(made, attn_implementation=attention).eval()


def inputs_for(model):
    """A batch of one for the forward of any model of TINY, without the padding token."""
    tokens = torch.tensor([[3, 9, 27, 17]])
    made = {
        "pixel_values": torch.randn(1, 3, 16, 16),
        "input_features": torch.randn(1, 8, 32),
        "input_values": torch.randn(1, 400),
        "input_ids": tokens,
    }
    batch = {model.main_input_name: made[model.main_input_name]}
    if model.config.model_type == "clip":
        batch |= {"pixel_values": made["pixel_values"]}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": tokens}
    if getattr(model.config, "add_cross_attention", False):
        batch |= {"encoder_hidden_states": torch.randn(1, 5, model.config.n_embd)}
    return batch


def blocks_behind(parts, weight, layout):
    """The block of `layout` that each part depends on; fails where that is not exactly one.

    Args:
        parts: tensors computed from `weight`, the output of a head or of a neuron each.
        weight: a parameter that the layout is of.
    """
    index, found = layout.index(), []
    for number, part in enumerate(parts):
        total = (part * torch.randn_like(part)).sum()
        (gradient,) = torch.autograd.grad(total, weight, retain_graph=True)
        touched = gradient != 0
        block = index[touched].unique()
        assert block.numel() == 1 and torch.equal(touched, index == block), f"part {number}"
        found.append(block.item())
    return found
