"""A group of ragged responses with a loss that uses every statistic, and its definition."""

import torch
from tiny_models import VOCAB, causal_lm, keep_norm_dtype
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

LENGTHS = (5, 1, 7, 7, 3, 9)
MEMORY = ["keep", "recompute", "offload"]
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
OTHERS = {
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=26),  # the longest sequence
    "gemma": lambda: GemmaConfig(**SMALL),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, layer_types=["sliding_attention", "full_attention"], sliding_window=26
    ),
    "gemma3n": lambda: Gemma3nTextConfig(
        **SMALL | {"num_hidden_layers": 4, "intermediate_size": [40] * 4},
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=512,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=None,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        init_std=0.3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
}


def model_of(kind, dtype=torch.float64, attention="sdpa", **changes):
    if kind not in OTHERS:
        model = causal_lm(kind, dtype=dtype, attention=attention, **changes)
    else:
        config = OTHERS[kind]()
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            for p in model.parameters():
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=0.3)
        model = model.to(dtype).eval()
    model.config._experts_implementation = "eager"
    return keep_norm_dtype(model) if dtype == torch.float64 and "gemma" not in kind else model


def group_of_responses(prompt=17, lengths=LENGTHS, seed=0):
    """Prompt, responses, and a weight for each response token."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(VOCAB, (n,), generator=g).tolist()

    weights = [torch.randn(n, generator=g, dtype=torch.float64) for n in lengths]
    return tokens(prompt), [tokens(n) for n in lengths], weights


def token_loss(logp, entropy, sum_p2, weights):
    return (weights * (logp + 0.3 * weights * entropy - 0.2 * sum_p2)).sum()


def loss_of(weights):
    """The loss as `SharedPrefix` calls it."""

    def loss(out, wave):
        own = [weights[i] for i in wave.rows]
        padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True).to(out.logp)
        return token_loss(out.logp, out.stats.entropy, out.stats.sum_p2, padded)

    return loss


def dense_loss(model, context, response, weights, temperature=1.0):
    """One trajectory alone through the model as it is."""
    ids = torch.tensor([[*context, *response]])
    logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = (logits.to(dtype) / temperature).log_softmax(-1)
    p = logp.exp()
    own = logp.gather(-1, torch.tensor(response)[:, None])[:, 0]
    return token_loss(own, -(p * logp).sum(-1), p.square().sum(-1), weights.to(dtype))


def gradient(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


def dense_gradient(model, prompt, responses, weights, **options):
    """Sum of the losses, and all parameters' gradient, flat; gradients are None afterwards."""
    model.zero_grad()
    total = 0.0
    for response, w in zip(responses, weights, strict=True):
        loss = dense_loss(model, prompt, response, w, **options)
        loss.backward()
        total += float(loss.detach())
    found = gradient(model)
    model.zero_grad()
    return total, found


def relative_l2(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def shared_gradient(step, prompt, responses, weights, **options):
    step.host.model.zero_grad()
    with step.group(prompt) as g:
        total = g.accumulate(responses, loss_of(weights), **options)
        assert g.shared
    found = gradient(step.host.model)
    step.host.model.zero_grad()
    return total, found
