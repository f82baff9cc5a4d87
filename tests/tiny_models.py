"""Small causal language models with random weights, built from their configs without a download."""

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
_ROPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.3,  # far from uniform, so that a wrong token costs something
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_ROPE),
    "llama_gqa": lambda: LlamaConfig(**_ROPE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_ROPE, num_key_value_heads=1),
    "qwen3": lambda: Qwen3Config(**_ROPE, num_key_value_heads=2, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    ),
}
KINDS = list(_CONFIGS)


def causal_lm(
    kind: str = "llama_gqa",
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    **changes: object,
) -> PreTrainedModel:
    """A model of one of KINDS in evaluation mode; `changes` are set on its config."""
    config = _CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for p in model.parameters():  # biases and norms too, so that no gradient is trivially zero
            if p.ndim == 1:
                p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype).eval()


def keep_norm_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """RMS norms compute in fp32 whatever comes in; this makes those of a float64 model float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(x, m=module):
                return (
                    m.weight * x * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
                )

            module.forward = forward
    return model
