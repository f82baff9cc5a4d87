import math

import pytest
import torch
from tiny_models import KINDS, VOCAB, causal_lm
from transformers import LogitsProcessor, MinPLogitsWarper

from trimtab.integrations.transformers import VocabularyPruningLogitsProcessor, pruned_generation
from trimtab.stability import DEFAULT_RHO, response_statistics
from trimtab.triton_kernels.token_stats import token_stats

PROMPTS = torch.tensor([[3, 14, 15, 9], [2, 7, 18, 28], [1, 4, 1, 4]])
LENGTH = 12
# Settings that a checkpoint or a user may leave in the generation config; each changes the set.
LEFTOVERS = dict(
    top_k=3,
    top_p=0.3,
    min_p=0.9,
    top_h=0.2,
    typical_p=0.4,
    epsilon_cutoff=0.1,
    eta_cutoff=0.2,
    repetition_penalty=1.7,
    encoder_repetition_penalty=1.6,
    no_repeat_ngram_size=1,
    num_beams=2,
)


def generate(model, **kwargs):
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": LENGTH, "output_scores": True} | kwargs
    return model.generate(PROMPTS, return_dict_in_generate=True, **kwargs)


def trainer_statistics(model, sequences, **options):
    """response_statistics [B, T] of the generated part, by one forward pass over everything."""
    start = PROMPTS.shape[1]
    with torch.no_grad():
        logits = model(sequences).logits[:, start - 1 : -1]
    tokens = sequences[:, start:]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return response_statistics(logits, tokens, mask, **options), logits


def kept(scores):
    return scores > -math.inf


@pytest.mark.parametrize("rho", [DEFAULT_RHO, 1e-3, 0.2], ids=lambda rho: f"rho{rho:.0e}")
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_generate_samples_what_the_trainer_computes(kind, temperature, rho):
    model = causal_lm(kind)
    output = generate(model, **pruned_generation(rho, temperature=temperature))
    stats, logits = trainer_statistics(model, output.sequences, temperature=temperature, prune=rho)
    assert stats.in_safe_set.all()
    scores = torch.stack(output.scores, 1)
    assert torch.equal(kept(scores).sum(-1), stats.safe_count)
    x = logits / temperature
    assert torch.equal(kept(scores), x >= x.amax(-1, keepdim=True) + math.log(rho))
    logp = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    torch.testing.assert_close(logp, stats.logp, rtol=0, atol=1e-5)
    assert rho < 1e-4 or (stats.safe_count < VOCAB).any()  # else it shows nothing


@pytest.mark.parametrize("kind", KINDS)
def test_leftovers_of_the_generation_config_do_not_act(kind):
    model = causal_lm(kind)
    model.generation_config.update(**LEFTOVERS)
    output = generate(model, **pruned_generation(0.01, temperature=0.7))
    stats, _ = trainer_statistics(model, output.sequences, temperature=0.7, prune=0.01)
    assert torch.equal(kept(torch.stack(output.scores, 1)).sum(-1), stats.safe_count)
    logp = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    torch.testing.assert_close(logp, stats.logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LEFTOVERS if "encoder" not in name])
def test_each_leftover_would_act(name):
    model = causal_lm("llama")
    settings = pruned_generation(0.01) | {name: LEFTOVERS[name]}
    output = generate(model, **settings)
    plain = generate(model, **pruned_generation(0.01))
    same = torch.equal(plain.sequences, output.sequences)
    same = same and all(torch.equal(a, b) for a, b in zip(plain.scores, output.scores))
    assert not same


def test_the_default_generation_config_keeps_fifty_tokens():
    processors = [VocabularyPruningLogitsProcessor(1e-300)]
    output = generate(causal_lm("llama"), do_sample=True, logits_processor=processors)
    assert (kept(torch.stack(output.scores)).sum(-1) == 50).all()
    output = generate(causal_lm("llama"), **pruned_generation(1e-300))
    assert kept(torch.stack(output.scores)).all()


def test_processors_come_before_the_temperature():
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    settings = pruned_generation(0.01, temperature=0.5)
    settings["logits_processor"] = [Spy(), *settings["logits_processor"]]
    output = generate(causal_lm("llama"), output_logits=True, **settings)
    for raw, before, after in zip(output.logits, seen, output.scores):
        assert torch.equal(raw, before)
        assert torch.equal(after[kept(after)], (before / 0.5)[kept(after)])


def test_rows_that_end_early():
    model = causal_lm("llama")
    first = generate(model, **pruned_generation(0.01)).sequences[:, PROMPTS.shape[1] :]
    end = int(first[0, 3])
    settings = pruned_generation(0.01) | {"eos_token_id": end, "pad_token_id": end}
    output = generate(model, **settings)
    tokens = output.sequences[:, PROMPTS.shape[1] :]
    mask = (tokens == end).cumsum(1) - (tokens == end).int() == 0  # to the first end, included
    assert not mask.all()
    stats, _ = trainer_statistics(model, output.sequences, prune=0.01)
    logp = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    torch.testing.assert_close(logp[mask], stats.logp[mask], rtol=0, atol=1e-5)
    assert stats.in_safe_set[mask].all()


def test_greedy_decoding_does_not_change():
    model = causal_lm("llama_gqa")
    plain = generate(model, do_sample=False).sequences
    pruned = generate(
        model, do_sample=False, logits_processor=[VocabularyPruningLogitsProcessor(0.9)]
    ).sequences
    assert torch.equal(plain, pruned)


def test_beam_search_sees_log_probs_and_finds_the_same_set():
    z = 3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    prune = VocabularyPruningLogitsProcessor(0.01, temperature=0.7)
    assert torch.equal(kept(prune(None, z)), kept(prune(None, z.log_softmax(-1))))
    model = causal_lm("llama")
    output = generate(model, num_beams=3, do_sample=False, logits_processor=[prune])
    assert output.sequences_scores.isfinite().all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_set_is_that_of_token_stats_in_every_dtype(dtype, temperature):
    # bf16 has 8 bits, so many scores tie and many lie next to the threshold
    z = (4 * torch.randn(24, 300, generator=torch.Generator().manual_seed(1))).to(dtype)
    for rho in (DEFAULT_RHO, 1e-3, 0.1, 0.9):
        scores = VocabularyPruningLogitsProcessor(rho, temperature=temperature)(None, z)
        assert scores.dtype == dtype and scores.shape == z.shape
        assert torch.equal(scores[kept(scores)], z[kept(scores)])
        stats = token_stats(z, z.float().argmax(-1), temperature=temperature, prune=rho)
        assert torch.equal(kept(scores).sum(-1), stats.safe_count)


def test_a_score_at_the_threshold_is_kept():
    at = torch.tensor(math.log(0.1))
    z = torch.stack([torch.tensor(0.0), at, torch.nextafter(at, torch.tensor(-9.0))])[None]
    assert kept(VocabularyPruningLogitsProcessor(0.1)(None, z)).tolist() == [[True, True, False]]
    scores = VocabularyPruningLogitsProcessor(0.1, temperature=2.0)(None, 2 * z)
    assert kept(scores).tolist() == [[True, True, False]]


def test_masked_scores_stay_masked_and_empty_rows_stay_empty():
    inf = math.inf
    z = torch.tensor([[5.0, 1.0, 0.5, -3.0], [-inf, 1.0, 0.5, -3.0], [-inf] * 4])
    scores = VocabularyPruningLogitsProcessor(0.1)(None, z)
    assert scores.tolist() == [[5.0, -inf, -inf, -inf], [-inf, 1.0, 0.5, -inf], [-inf] * 4]
    assert z[0, 1] == 1.0  # the input is not written to
    assert VocabularyPruningLogitsProcessor(0.1)(None, z[:0]).shape == (0, 4)
    nan = VocabularyPruningLogitsProcessor(0.1)(None, torch.tensor([[math.nan, 0.0]]))
    assert nan[0, 0].isnan()


def test_a_tiny_rho_keeps_everything():
    z = 30 * torch.randn(8, 100, generator=torch.Generator().manual_seed(2))
    assert torch.equal(VocabularyPruningLogitsProcessor(1e-300)(None, z), z)


def test_min_p_of_transformers_is_the_same_rule():
    z = 4 * torch.randn(64, 300, generator=torch.Generator().manual_seed(3))
    for rho in (DEFAULT_RHO, 0.01, 0.3):
        ours = VocabularyPruningLogitsProcessor(rho, temperature=0.7)(None, z)
        theirs = MinPLogitsWarper(rho)(None, z / 0.7)
        assert torch.equal(kept(ours), kept(theirs))


@pytest.mark.parametrize("make", [VocabularyPruningLogitsProcessor, pruned_generation])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.0}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(make, arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .* found"):
        make(**arguments)


@pytest.mark.parametrize(
    "scores", [torch.zeros(4), torch.zeros(1, 2, 3), torch.zeros(2, 3, dtype=torch.long)]
)
def test_other_scores_are_refused(scores):
    with pytest.raises(ValueError, match=r"^scores: expected .* found"):
        VocabularyPruningLogitsProcessor()(None, scores)


def test_an_integer_temperature_will_do():
    output = generate(causal_lm("llama"), **pruned_generation(0.01, temperature=2))
    assert kept(torch.stack(output.scores)).any(-1).all()


# Edits to integrations/transformers.py that must turn this file red:
#   / self.temperature          ->  removed
#   x < x.amax                  ->  x <= x.amax
#   math.log(self.rho)          ->  self.rho
#   "top_k": 0                  ->  removed
#   "repetition_penalty": 1.0   ->  removed
