"""transformers' own continuous batching as a rollout engine."""

import logging

import pytest
import tiny_run
import torch
import vllm_cases as cases
from tiny_run import metrics_of, run_here, write_recipe
from transformers import AutoModelForCausalLM, GenerationConfig

from trimtab.rl import (
    ContinuousBatchingEngine,
    PagedCacheConfig,
    Request,
    RolloutConfig,
    Sampling,
    Tree,
)

CACHE = PagedCacheConfig(page_size=32)


@pytest.fixture
def policy(tmp_path):
    tiny_run.make_policy(tmp_path / "policy")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).eval()
    with torch.no_grad():  # else all tokens are about as probable, and min_p keeps each
        policy.lm_head.weight *= 20
    return policy


@pytest.fixture
def engine(policy):
    return ContinuousBatchingEngine(policy, cache=CACHE, dtype=torch.float32)


@pytest.mark.parametrize(("changes", "options"), cases.DISTRIBUTIONS)
def test_log_probs_are_the_trainers(engine, policy, changes, options):
    cases.check_log_probs_are_the_trainers(engine, policy, changes, options)


def test_min_p_leaves_out_what_it_should(engine, policy):
    cases.check_min_p_leaves_out_what_it_should(engine, policy)


def test_greedy_is_that_of_our_engine(engine, policy):
    cases.check_greedy_is_that_of_our_engine(engine, policy)


def test_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy):
    cases.check_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy)


def test_it_samples_the_distribution_it_reports(engine, policy):
    [group] = engine.generate([Request(cases.PROMPTS[0], Sampling(n=2000, max_tokens=1, seed=3))])
    logits = policy(torch.tensor([cases.PROMPTS[0]])).logits[0, -1]
    p = logits.double().softmax(-1).detach()
    found = torch.bincount(torch.tensor([s.token_ids[0] for s in group]), minlength=32) / 2000
    assert (found - p).abs().max() < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("max_rows", [3, 64])
def test_requests_that_differ_get_what_they_ask_for(policy, max_rows):
    engine = ContinuousBatchingEngine(policy, cache=CACHE, dtype=torch.float32, max_rows=max_rows)
    greedy = Sampling(max_tokens=6, temperature=0.0, stop_token_ids=cases.STOPS)
    asked = [
        Request(prompt, Sampling(n=n, max_tokens=most, seed=i, stop_token_ids=cases.STOPS))
        for i, (prompt, n, most) in enumerate(
            zip(cases.PROMPTS, (4, 2, 4, 1, 2), (3, 30, 12, 5, 1), strict=True)
        )
    ]
    asked.append(Request(cases.PROMPTS[3], greedy))
    groups = engine.generate(asked)
    for request, group in zip(asked, groups, strict=True):
        assert len(group) == request.sampling.n
        for sample in group:
            assert 1 <= len(sample.token_ids) <= request.sampling.max_tokens
            assert (sample.finish_reason == "stop") == (sample.token_ids[-1] in cases.STOPS)
            logp = cases.trainers(policy, request.prompt_ids, sample).logp[0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), logp, atol=1e-4, rtol=0)
            if sample.finish_reason == "length":
                assert len(sample.token_ids) == request.sampling.max_tokens
    assert len({tuple(sample.token_ids) for sample in groups[1]}) == 2
    [[alone]] = engine.generate(asked[-1:])
    assert groups[-1][0].token_ids == alone.token_ids


def test_a_rollout_without_stop_tokens_runs_to_its_limit(engine):
    [group] = engine.generate([Request([5, 6], Sampling(n=3, max_tokens=9))])
    assert {len(sample.token_ids) for sample in group} == {9}
    assert engine.generate([]) == []


def test_the_models_own_generation_config_changes_nothing(policy):
    plain = ContinuousBatchingEngine(policy, cache=CACHE, dtype=torch.float32)
    policy.generation_config = GenerationConfig(
        repetition_penalty=2.0, top_k=2, do_sample=True, eos_token_id=7, max_length=12
    )
    own = ContinuousBatchingEngine(policy, cache=CACHE, dtype=torch.float32)
    asked = cases.requests()
    assert own.generate(asked) == plain.generate(asked)


def test_others_draw_on_as_if_it_had_not_sampled(engine):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.generate(cases.requests())
    assert torch.equal(torch.rand(3), expected)


def test_only_the_word_about_min_p_is_left_out(engine, caplog):
    logger = logging.getLogger("ContinuousBatchingLogger")
    logger.addHandler(caplog.handler)  # it does not propagate
    try:
        with caplog.at_level(logging.WARNING, logger.name):
            generate_batch = engine.model.generate_batch

            def telling(*args, **options):
                logger.warning("something else")
                return generate_batch(*args, **options)

            engine.model.generate_batch = telling
            engine.generate(cases.requests(min_p=0.3))
    finally:
        logger.removeHandler(caplog.handler)
    assert "something else" in caplog.text and "MinP" not in caplog.text


def test_what_it_cannot_do_is_refused(engine):
    with pytest.raises(ValueError, match="requests: expected no tree"):
        engine.generate([Request([5], Sampling(n=2, tree=Tree(segment=3)))])
    with pytest.raises(ValueError, match=r"requests\[1\]: expected the sampling of the others"):
        engine.generate([Request([5], Sampling()), Request([5], Sampling(temperature=0.5))])
    with pytest.raises(ValueError, match=r"requests\[0\]: expected a prompt"):
        engine.generate([Request([], Sampling())])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"paged_cache": CACHE}, "rollout.paged_cache: expected null without continuous_batching"),
        (
            {"engine": "continuous_batching", "tree": Tree()},
            "rollout.tree: expected null with engine continuous_batching",
        ),
        (
            {"engine": "continuous_batching", "servers": ("http://a:1",)},
            r"rollout.servers: expected \[\] with rollout.engine continuous_batching",
        ),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(ValueError, match=said):
        RolloutConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory_fraction": 0}, "memory_fraction: expected a share in .0, 1., got 0"),
        ({"page_size": 3}, "page_size: expected a count >= 4, got 3"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: expected a count >= 1 or null, got 0"),
    ],
)
def test_a_cache_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=f"rollout.paged_cache.{said}"):
        PagedCacheConfig(**options)


@pytest.mark.parametrize("ahead", [False, True])
def test_trimtab_rl_trains_with_it_and_resumes(tmp_path, ahead):
    changes = {
        "updates": 4,
        "record.checkpoint_every": 2,
        "rollout.engine": "continuous_batching",
        "rollout.paged_cache": {"page_size": 16},
        "rollout.dtype": "float32",
        "rollout.asynchronous": ahead,
    }
    recipe = write_recipe(tmp_path, changes)
    run_here(["--config", recipe, "--run_dir", "whole"], tmp_path)
    run_here(["--config", recipe, "--run_dir", "cut", "--trainer.max_steps=2"], tmp_path)
    run_here(["--resume", "cut"], tmp_path)
    whole, cut = (metrics_of(tmp_path / name) for name in ("whole", "cut"))
    assert len(whole) == 4
    assert [row["loss"] for row in whole] == [row["loss"] for row in cut]
    first = whole[0]
    assert first["mismatch/abs_dlogp_mean"] < 1e-5, "trainer and engine compute two networks"


# Edits that must turn this file red, each in trimtab/rl/continuous_engine.py:
# * `min_p=...` not passed on
# * `output.generated_tokens[: request.sampling.max_tokens]` -> all of them
# * `seed=...` removed
# * without fork_rng
# * kinds without `is_greedy(request)`
# * `num_return_sequences=sampling.n` -> 1
