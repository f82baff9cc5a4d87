"""What both engines of vLLM must do, in a server and in this process."""

import pytest
import torch

from trimtab.rl.engine import TransformersEngine
from trimtab.rl.rollout import Request, Sampling
from trimtab.stability import response_statistics

PROMPTS = [[5, 17, 3, 9, 11], [8], [2, 2, 30, 31], [14, 7], [1, 3, 5, 7, 9, 11, 13]]
STOPS = (18, 20)
DISTRIBUTIONS = [
    ({}, {}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"temperature": 1.4, "min_p": 0.3}, {"temperature": 1.4, "prune": 0.3}),
]
"""Of sampling, and the same for the trainer."""


def requests(**changes):
    options = dict(n=4, max_tokens=20, stop_token_ids=STOPS) | changes
    return [Request(prompt, Sampling(seed=100 * i, **options)) for i, prompt in enumerate(PROMPTS)]


@torch.no_grad()
def trainers(model, prompt, sample, **options):
    """Log-probs of a sample as the trainer computes them, and its distribution's size."""
    ids = torch.tensor([[*prompt, *sample.token_ids]])
    logits = model(ids).logits[:, len(prompt) - 1 : -1]
    tokens = ids[:, len(prompt) :]
    return response_statistics(logits, tokens, torch.ones_like(tokens).bool(), **options)


def check_log_probs_are_the_trainers(engine, policy, changes, options):
    asked = requests(**changes)
    groups = engine.generate(asked)
    assert engine.generate(asked) == groups, "the seed does not decide"
    reasons = set()
    for request, group in zip(asked, groups, strict=True):
        assert len({tuple(sample.token_ids) for sample in group}) > 1
        for sample in group:
            reasons.add(sample.finish_reason)
            stats = trainers(policy, request.prompt_ids, sample, **options)
            assert stats.in_safe_set is None or stats.in_safe_set.all()
            found = torch.tensor(sample.logprobs)
            torch.testing.assert_close(found, stats.logp[0], atol=1e-4, rtol=0)
            inside = [token in STOPS for token in sample.token_ids]
            assert sum(inside) == inside[-1] == (sample.finish_reason == "stop")
    assert reasons == {"stop", "length"}


def check_min_p_leaves_out_what_it_should(engine, policy):
    found = []
    for min_p in (0.0, 0.5):
        sampling = Sampling(n=128, max_tokens=1, temperature=2.0, min_p=min_p)
        [group] = engine.generate([Request(PROMPTS[0], sampling)])
        found.append({sample.token_ids[0] for sample in group})
    logits = policy(torch.tensor([PROMPTS[0]])).logits[0, -1]
    p = (logits.double() / 2.0).softmax(-1)
    safe = set((p >= 0.5 * p.max()).nonzero().flatten().tolist())
    plain, pruned = found
    assert pruned <= safe and not plain <= safe


def check_greedy_is_that_of_our_engine(engine, policy):
    asked = requests(temperature=0.0, n=1)
    expected = TransformersEngine(policy, dtype=torch.float32).generate(asked)
    for [found], [sample] in zip(engine.generate(asked), expected, strict=True):
        assert found.token_ids == sample.token_ids
        assert found.logprobs == pytest.approx(sample.logprobs, abs=1e-4)


def check_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy):
    # a block of the cache on a CPU has 128 tokens: the last prompt fills one
    long = Request([3 + i % 20 for i in range(200)], requests()[0].sampling)
    asked = [*requests(), long]
    before = engine.generate(asked)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    engine.update_weights(policy.named_parameters(), 3)
    groups = engine.generate(asked)
    for old, new in zip(before, groups, strict=True):
        assert [sample.token_ids for sample in old] != [sample.token_ids for sample in new]
    for request, group in zip(asked, groups, strict=True):
        for sample in group:
            assert sample.version == 3
            logp = trainers(policy, request.prompt_ids, sample).logp[0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), logp, atol=1e-4, rtol=0)
