"""The update's forward and backward: each prompt once for its group, or repeated (dense).

    pytest benchmarks/bench_update.py --benchmark-json=benchmarks/results/bench_update.json

8 prompts of 180 tokens x 16 responses of 4 to 40 tokens on the demo's model size, fp32. Each round
takes the gradient of the sum of all response log-probs; the two routes are checked against each
other first.
"""

from __future__ import annotations

import pytest
import torch
from bench_rollout import GROUP, PROMPTS, model, prompts

from trimtab.rl import response_logits

__all__ = ["model", "prompts"]  # fixtures


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
