import math

import pytest
import torch
from tiny_models import VOCAB, causal_lm
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from trimtab.rl.engine import TransformersEngine
from trimtab.rl.model_copy import quantize_weights_
from trimtab.rl.rollout import (
    Request,
    Sampling,
    truncate_distribution,
)

PROMPTS = [[5, 17, 3, 44, 9, 12, 30], [8], [2, 2, 59, 31], [40, 7], [1, 3, 5, 7, 9, 11, 13, 15, 17]]


def engine_of(model, **options):
    return TransformersEngine(model, **({"dtype": torch.float32} | options))


def kept_by_definition(p, sampling):
    """Set of token ids that top_k, top_p and min_p all keep; p is a float64 distribution [V]."""
    order = sorted(range(len(p)), key=lambda v: -p[v])
    kept, mass = set(), 0.0
    for rank, v in enumerate(order):
        inside = not sampling.top_k or rank < sampling.top_k
        inside &= sampling.top_p == 1 or mass < sampling.top_p
        if inside and p[v] >= sampling.min_p * p[order[0]]:
            kept.add(v)
        mass += p[v]
    return kept


@torch.no_grad()
def teacher_forced(model, prompt, sample, sampling):
    """[t, V] float64 probabilities of the distribution that each token should be sampled from."""
    logits = model(torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1]
    p = (logits.double() / (sampling.temperature or 1.0)).softmax(-1)
    for row in p:
        kept = kept_by_definition(row.tolist(), sampling)
        row[[v for v in range(VOCAB) if v not in kept]] = 0
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["llama", "llama_gqa", "qwen3", "gpt2"])
def test_greedy_is_that_of_generate(kind):
    model = causal_lm(kind)
    sampling = Sampling(max_tokens=20, temperature=0)
    groups = engine_of(model).generate([Request(p, sampling) for p in PROMPTS])
    for prompt, [sample] in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        assert sample.token_ids == expected[0, len(prompt) :].tolist()
        p = teacher_forced(model, prompt, sample, sampling)
        logp = p.log().gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(sample.logprobs), logp.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "llama_gqa", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "truncation",
    [{}, {"temperature": 0.7, "min_p": 0.05}, {"top_k": 5}, {"temperature": 1.5, "top_p": 0.8}],
    ids=str,
)
def test_logprobs_are_those_of_the_model(kind, truncation):
    model = causal_lm(kind)
    sampling = Sampling(n=6, max_tokens=12, stop_token_ids=(4, 9, 21, 33), seed=3, **truncation)
    groups = engine_of(model).generate([Request(p, sampling) for p in PROMPTS])
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 6
        for sample in group:
            p = teacher_forced(model, prompt, sample, sampling)
            logp = p.log().gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1)
            assert torch.tensor(sample.logprobs).sub(logp).abs().max() < 1e-5  # -inf fails too


def test_samples_do_not_depend_on_the_rest_of_the_batch():
    model = causal_lm()
    stops = tuple(range(0, VOCAB, 9))  # lengths differ much: finished rows are dropped on the way
    requests = [
        Request(prompt, Sampling(n=n, max_tokens=30, stop_token_ids=stops, seed=100 + i))
        for i, (prompt, n) in enumerate(zip(PROMPTS, [5, 1, 3, 4, 2], strict=True))
    ]
    together = engine_of(model).generate(requests)
    lengths = [len(s.token_ids) for group in together for s in group]
    assert min(lengths) < 4 and max(lengths) > 12
    alone = [engine_of(model).generate([r])[0] for r in requests]
    split = engine_of(model, max_rows=6).generate(requests)
    backwards = engine_of(model).generate(requests[::-1])[::-1]
    fewer = [Request(r.prompt_ids, Sampling(**(vars(r.sampling) | {"n": 1}))) for r in requests]
    fewer = engine_of(model).generate(fewer)
    for others in (alone, split, backwards, fewer):
        for group, same in zip(together, others, strict=True):
            for a, b in zip(group, same, strict=others is not fewer):
                assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
                torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    assert len({tuple(s.token_ids) for s in together[0]}) == 5  # rows have their own numbers


def test_stop_tokens_and_finish_reasons():
    stops = (4, 9, 21, 33, 50)
    sampling = Sampling(n=8, max_tokens=9, stop_token_ids=stops)
    groups = engine_of(causal_lm()).generate([Request(p, sampling) for p in PROMPTS])
    samples = [sample for group in groups for sample in group]
    for sample in samples:
        assert len(sample.logprobs) == len(sample.token_ids)
        assert not set(sample.token_ids[:-1]) & set(stops)
        stopped = sample.token_ids[-1] in stops
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.token_ids) == 9
    assert {s.finish_reason for s in samples} == {"stop", "length"}


@pytest.mark.parametrize(
    "truncation", [{}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 7, "temperature": 1.3}], ids=str
)
def test_frequencies(truncation):
    model, prompt, n = causal_lm(), PROMPTS[0], 20_000
    sampling = Sampling(n=n, max_tokens=1, seed=11, **truncation)
    [samples] = engine_of(model).generate([Request(prompt, sampling)])
    p = teacher_forced(model, prompt, samples[0], sampling)[0]
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=VOCAB)
    assert (counts[p == 0] == 0).all()
    often = n * p >= 5
    expected = torch.cat([n * p[often], n * p[~often].sum()[None]])
    found = torch.cat([counts[often], counts[~often].sum()[None]])
    degrees = int(often.sum())
    chi2 = ((found - expected).square() / expected.clamp_min(1e-9)).sum()
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def test_truncation_by_hand():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for options, kept in [
        ({"top_k": 3}, 3),
        ({"top_p": 0.69}, 2),
        ({"top_p": 0.71}, 3),
        ({"top_p": 1e-9}, 1),
        ({"min_p": 0.49}, 3),
        ({"min_p": 0.51}, 2),
        ({"min_p": 0.999}, 1),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.6}, 2),
        ({"top_k": 99}, 4),
        ({}, 4),
    ]:
        p = truncate_distribution(logits, Sampling(**options)).exp()[0]
        expected = logits.exp()[0, :kept] / logits.exp()[0, :kept].sum()
        torch.testing.assert_close(p[:kept], expected)
        assert (p[kept:] == 0).all()


def test_new_weights_and_versions():
    old, new = causal_lm(seed=0), causal_lm(seed=1)
    request = Request(PROMPTS[0], Sampling(n=3, max_tokens=10))
    engine = engine_of(old)
    [before] = engine.generate([request])
    engine.update_weights(new.named_parameters(), version=7)
    [after] = engine.generate([request])
    [expected] = engine_of(new).generate([request])
    assert [s.version for s in before + after] == [0] * 3 + [7] * 3
    assert [s.token_ids for s in after] == [s.token_ids for s in expected]
    assert [s.logprobs for s in after] == [s.logprobs for s in expected]
    assert after != before
    engine.update_weights(old.state_dict().items(), version=8)  # names the tied weight twice
    assert [s.logprobs for s in engine.generate([request])[0]] == [s.logprobs for s in before]
    assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight


def test_weights_that_do_not_fit_are_refused():
    """One at a time, so that merged or gathered ones need no memory together: up to the bad one."""
    engine = engine_of(causal_lm())
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    for bad, tensor in (("no.such.weight", torch.zeros(3)), ("model.norm.weight", torch.zeros(3))):
        with pytest.raises(ValueError, match=bad):
            engine.update_weights([(bad, tensor), *before.items()], version=1)
        assert engine.version == 0
        assert all(torch.equal(p, before[n]) for n, p in engine.model.named_parameters())


def test_the_copy_is_a_copy():
    model = causal_lm()
    request = Request(PROMPTS[2], Sampling(n=4, max_tokens=8))
    engine = engine_of(model)
    before = engine.generate([request])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert engine.generate([request]) == before
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    model(torch.tensor([[1, 2]])).logits.sum().backward()


def mismatch(engine, model, prompts, max_tokens=24):
    """Mean |d logp| over samples of the engine."""
    sampling, gaps = Sampling(n=8, max_tokens=max_tokens, seed=5), []
    groups = engine.generate([Request(p, sampling) for p in prompts])
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            p = teacher_forced(model, prompt, sample, sampling)
            logp = p.log().gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1)
            gaps.append((torch.tensor(sample.logprobs) - logp).abs().mean())
    return float(torch.stack(gaps).mean())


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_lower_precision_is_a_small_mismatch(kind):
    model = causal_lm(kind)
    exact = mismatch(engine_of(model), model, PROMPTS)
    bf16 = mismatch(engine_of(model, dtype=torch.bfloat16), model, PROMPTS)
    int8 = mismatch(engine_of(model, quantize_bits=8), model, PROMPTS)
    int4 = mismatch(engine_of(model, quantize_bits=4), model, PROMPTS)
    assert exact < 1e-5 < 1e-4 < min(bf16, int8) < max(bf16, int8) < int4 / 3 < 1


def test_rotary_frequencies_are_not_rounded():
    # in bf16 they would turn positions beyond a thousand by whole radians, which no engine does
    model = causal_lm(rope_parameters={"rope_type": "default", "rope_theta": 30.0})
    copied = engine_of(model, dtype=torch.bfloat16).model
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    for a, b in zip(model.buffers(), copied.buffers(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_quantized_weights_lie_on_their_grid(kind, bits):
    # widths 32 and 48 are below one group of 64; groups of 20 leave a part of a group
    for group in (64, 20):
        model, plain = causal_lm(kind), causal_lm(kind)
        quantize_weights_(model, bits, group)
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            block = "layers" in name or ".h." in name
            if not block or p.ndim == 1:
                assert torch.equal(p, q), name
                continue
            inputs_last = (lambda x: x.T) if kind == "gpt2" else (lambda x: x)
            for a, b in zip(
                inputs_last(p).split(group, 1), inputs_last(q).split(group, 1), strict=True
            ):
                scale = a.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                steps = b / scale
                torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
                assert ((b - a).abs() <= 0.5001 * scale).all(), name
        again = {n: p.clone() for n, p in model.named_parameters()}
        quantize_weights_(model, bits, group)
        torch.testing.assert_close(dict(model.named_parameters()), again)
    with pytest.raises(ValueError, match="4 or 8"):
        quantize_weights_(model, 3)


def test_new_weights_are_quantized_too():
    old, new = causal_lm(seed=0), causal_lm(seed=1)
    engine = engine_of(old, quantize_bits=4)
    engine.update_weights(new.named_parameters(), version=1)
    expected = engine_of(new, quantize_bits=4)
    for a, b in zip(engine.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "n": [0, -1],
        "max_tokens": [0],
        "temperature": [-0.1, math.nan],
        "top_p": [0.0, 1.1, math.nan],
        "top_k": [-1],
        "min_p": [-0.1, 1.0, math.nan],
    }.items(),
)
def test_sampling_is_checked(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}: expected"):
            Sampling(**{field: value})


def test_requests_are_checked():
    engine = engine_of(causal_lm())
    assert engine.generate([]) == []
    with pytest.raises(ValueError, match=r"requests\[1\].*at least one token"):
        engine.generate([Request([1], Sampling()), Request([], Sampling())])
    with pytest.raises(ValueError, match=r"requests\[1\].*whether greedy may differ"):
        engine.generate([Request([1], Sampling()), Request([1], Sampling(top_k=3))])
    with pytest.raises(ValueError, match="max_rows"):
        engine_of(causal_lm(), max_rows=0)
    with pytest.raises(ValueError, match="4 or 8"):
        engine_of(causal_lm(), quantize_bits=5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
    ids=["rope", "layers"],
)
def test_refused_models(changes, reason):
    with pytest.raises(ValueError, match=reason):
        engine_of(causal_lm(**changes))


def test_refused_architectures():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match="sliding window of 8"):
        engine_of(MistralForCausalLM(MistralConfig(**sizes, sliding_window=8)))
    full = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    assert engine_of(full).generate([Request([1], Sampling(max_tokens=2))])
    with pytest.raises(ValueError, match="attention registry"):  # ALiBi, its own attention
        engine_of(BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4)))
    for name in ("softcap", "s_aux"):  # other attention functions heed these
        with pytest.raises(ValueError, match=name):
            engine_of(full).model(torch.tensor([[1, 2]]), **{name: 4})


# Edits to rl/rollout.py that must turn this file red:
#   lengths = len(prompt_ids) - 1 (of _generate)    ->  len(prompt_ids)
#   parameter.data = parameter.data.to(dtype)       ->  self.model.to(dtype) after the loop
#   torch.rand(sampling.n, max_tokens)              ->  torch.rand(max_tokens, sampling.n).T
#   self.padding[kept_groups]                       ->  self.padding (of compact)
#   alive & ~torch.isin(last, stops)                ->  alive
#   inside = cumsum - ordered < top_p               ->  cumsum < top_p
#   copy.deepcopy(model)                            ->  copy.copy(model)
