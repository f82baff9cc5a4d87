"""The two halves of an RL update with one shared few-shot prompt a group, each against a peer.

    pytest benchmarks/bench_rl.py --benchmark-json=benchmarks/results/bench_rl.json

8 prompts of 180 tokens x 16 rollouts on the demo's model size, fp32, random weights.
Rollout: our engine and transformers' continuous batching against its `generate`, 32 tokens each
and no stop token, so that all decode the same 4,096 tokens. Update: each prompt once for its group
(packed) against repeated (dense), responses of 4 to 40 tokens. Engine, `generate` and the routes
are checked against each other first; compare them within one run.
"""

from __future__ import annotations

import platform

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.rl import (
    ContinuousBatchingEngine,
    Request,
    Sampling,
    TransformersEngine,
    response_logits,
)

PROMPTS, GROUP, NEW = 8, 16, 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 64, (PROMPTS, 180), generator=generator)


def with_generate(model, prompts):
    ids = prompts.repeat_interleave(GROUP, 0)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, top_k=0
    )


def with_engine(model, prompts, engine_class):
    engine = engine_class(model, dtype=torch.float32)
    requests = [
        Request(row, Sampling(n=GROUP, max_tokens=NEW, seed=i))
        for i, row in enumerate(prompts.tolist())
    ]
    return lambda: engine.generate(requests)


@pytest.mark.benchmark(group="rollout", min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("provider", ["engine", "continuous_batching", "generate"])
def test_rollout(benchmark, provider, model, prompts):
    engines = {"engine": TransformersEngine, "continuous_batching": ContinuousBatchingEngine}
    call = lambda: with_generate(model, prompts)
    if provider in engines:
        call = with_engine(model, prompts, engines[provider])
    check_greedy(model, prompts)
    with torch.no_grad():
        benchmark(call)
    tokens = PROMPTS * GROUP * NEW
    benchmark.extra_info |= {
        "tokens_per_second": tokens / benchmark.stats.stats.median,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
    }


def check_greedy(model, prompts):
    """Refuses to time an engine that decodes anything else than `generate`."""
    engine = TransformersEngine(model, dtype=torch.float32)
    requests = [Request(row, Sampling(max_tokens=8, temperature=0.0)) for row in prompts.tolist()]
    ours = [group[0].token_ids for group in engine.generate(requests)]
    theirs = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False
    )
    assert ours == theirs[:, prompts.shape[1] :].tolist()


@pytest.fixture(scope="module")
def responses():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 41, (PROMPTS * GROUP,), generator=generator)
    tokens = torch.randint(3, 64, (PROMPTS * GROUP, 40), generator=generator)
    return tokens, torch.arange(40) < lengths[:, None]


def gradient(model, prompts, responses, route):
    tokens, mask = responses
    index = torch.arange(PROMPTS).repeat_interleave(GROUP)
    logits = response_logits(model, prompts.tolist(), tokens, mask, index, route=route)
    loss = torch.nn.functional.cross_entropy(logits, tokens[mask], reduction="sum")
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.benchmark(group="update", min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("route", ["packed", "dense"])
def test_update(benchmark, route, model, prompts, responses):
    packed, dense = (gradient(model, prompts, responses, r) for r in ("packed", "dense"))
    error = sum((p - d).square().sum() for p, d in zip(packed, dense, strict=True)) ** 0.5
    assert error / sum(d.square().sum() for d in dense) ** 0.5 < 2e-6
    benchmark(gradient, model, prompts, responses, route)
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
