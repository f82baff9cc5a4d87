"""Rollouts with replies of a tool in them: what is sampled, masked, cut and trained."""

import dataclasses
import itertools

import pytest
import tiny_run
import torch
from loop_cases import KeepGradient, Letters, config_of, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.rl import (
    PrefixConfig,
    ReferenceConfig,
    ReplayConfig,
    Request,
    RevalConfig,
    Sample,
    Sampling,
    TokenBaselineConfig,
    ToolTurns,
    ToolUse,
    TransformersEngine,
    Tree,
    collate,
)
from trimtab.rl.calculator import CalculatorTask

# the random policy writes each of its 32 tokens about as often: 3 of 17 characters end a call
USE = ToolUse(start="a", end="b", function="reward_functions:reversed_digits", timeout=30.0)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_run.make_policy(folder)
    return folder


@pytest.fixture(scope="module")
def model(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(policy_folder):
    return AutoTokenizer.from_pretrained(policy_folder)


@pytest.fixture
def sampled(model, tokenizer):
    """Rollouts of two prompts with a tool, by some options."""
    made = []

    def sample(n=24, seeds=(0, 1), temperature=1.0, **options):
        use = dataclasses.replace(USE, **options)
        made.append(ToolTurns(use, tokenizer))
        stop = tokenizer.convert_tokens_to_ids(";")
        sampling = Sampling(n=n, max_tokens=40, stop_token_ids=(1, stop), temperature=temperature)
        requests = [
            Request(tokenizer.encode(prompt), dataclasses.replace(sampling, seed=seed))
            for prompt, seed in zip(("12a", "7c"), seeds, strict=True)
        ]
        engine = TransformersEngine(model, dtype=torch.float32)
        return requests, made[-1].generate(engine.generate, requests)

    yield sample
    for turns in made:
        turns.close()


def runs(sample):
    """(written by the policy, token ids) of each stretch of a rollout."""
    mask = sample.mask or (True,) * len(sample.token_ids)
    pairs = zip(mask, sample.token_ids, strict=True)
    return [
        (own, [token for _, token in part])
        for own, part in itertools.groupby(pairs, key=lambda p: p[0])
    ]


def test_a_reply_is_what_the_tool_says_to_the_call_before_it(sampled, tokenizer):
    _, groups = sampled()
    end = tokenizer.convert_tokens_to_ids("b")
    replies = 0
    for sample in itertools.chain(*groups):
        stretches = runs(sample)
        assert stretches[0][0] and stretches[-1][0], "the policy begins and ends"
        for (own, said), (_, reply) in itertools.pairwise(stretches):
            if own:
                call = USE.call_in(tokenizer.decode(said))
                expected = "".join(c for c in reversed(call) if c.isdigit()) or "0"
                assert said[-1] == end and tokenizer.decode(reply) == expected
                replies += 1
    assert replies > 10


def test_log_probs_are_those_of_the_model_on_the_whole_sequence(sampled, model):
    requests, groups = sampled(temperature=0.8)
    for request, group in zip(requests, groups, strict=True):
        for sample in group:
            ids = [*request.prompt_ids, *sample.token_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids[:-1]])).logits[0, len(request.prompt_ids) - 1 :]
            logp = (logits / 0.8).log_softmax(-1)
            logp = logp.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            mask = torch.tensor(sample.mask or [True] * len(sample.token_ids))
            found = torch.tensor(sample.logprobs)
            assert found[mask].allclose(logp[mask], atol=2e-5)
            assert not found[~mask].any()


def test_budgets_of_calls_and_tokens_cut_a_rollout(sampled, tokenizer):
    end = tokenizer.convert_tokens_to_ids("b")
    _, groups = sampled(max_calls=1, n=48)
    over = 0
    for sample in itertools.chain(*groups):
        stretches = runs(sample)
        assert len(sample.token_ids) <= 40 and len(stretches) <= 3
        if len(stretches) == 3 and sample.token_ids[-1] == end:
            assert sample.finish_reason == "length"
            over += 1
        elif sample.finish_reason == "stop":
            assert sample.token_ids[-1] != end
    assert over > 0
    _, groups = sampled(reply="0123456789012345678901234567890123456789{reply}", n=48)
    for sample in itertools.chain(*groups):
        if sample.token_ids[-1] == end:
            assert sample.finish_reason == "length" and not sample.mask, "no room for a reply"
    _, groups = sampled(reply="0123456789{reply}", max_reply_tokens=4, n=48)
    lengths = [len(ids) for s in itertools.chain(*groups) for own, ids in runs(s) if not own]
    assert set(lengths) == {4}


def test_a_rollout_depends_on_its_own_seed(sampled):
    _, groups = sampled()
    _, again = sampled()
    assert groups == again
    _, others = sampled(seeds=(0, 5))
    ids = [[[s.token_ids for s in group] for group in found] for found in (groups, others)]
    assert ids[0][0] == ids[1][0] and ids[0][1] != ids[1][1]


def test_the_end_of_a_call_must_be_one_token(tokenizer):
    with pytest.raises(ValueError, match=r"tool.end: expected one token, 'ab' is \["):
        ToolTurns(dataclasses.replace(USE, end="ab"), tokenizer)


def test_collate_marks_what_is_there_and_what_the_policy_wrote():
    plain = Sample([5, 6], [-1.0, -2.0], "stop")
    called = Sample([5, 9, 9, 7], [-1.0, 0.0, 0.0, -3.0], "stop", mask=(True, False, False, True))
    batch = collate([[1, 2]], [7], [[plain, called]], [[0.5, 1.0]])
    assert batch.mask.tolist() == [[True, True, False, False], [True, False, False, True]]
    assert batch.present.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.responses() == [[5, 6], [5, 9, 9, 7]]
    assert collate([[1, 2]], [7], [[plain]], [[0.5]]).present is None
    with pytest.raises(ValueError, match="mask: expected 2, one per token, got 1"):
        Sample([5, 6], [-1.0, -2.0], "stop", mask=(True,))


class ToolLetters(Letters):
    tool = USE


REVAL = {
    "loss": "reval",
    "reval": RevalConfig(beta=0.5),
    "reference": ReferenceConfig(),
    "replay": ReplayConfig(size=30),
}


def tool_config(folder, **update):
    return config_of(ToolLetters(), folder, {"max_tokens": 24, "group_size": 8}, **update)


@pytest.mark.parametrize("update", [{}, {"advantage": "grpo", "loss": "ppo_clip"}, REVAL])
def test_every_route_takes_the_gradient_of_the_policys_tokens_alone(policy_folder, update):
    found = {}
    for name, options in {
        "dense": {"route": "dense"},
        "packed": {"route": "packed"},
        "fused": {"route": "packed", "head": "fused"},
        "three_phase": {
            "route": "three_phase", "prefix": PrefixConfig(min_bound=0, wave_tokens=30)
        },
    }.items():  # fmt: skip
        config = tool_config(policy_folder, clip_norm=0.0, **update, **options)
        keep = KeepGradient()
        module, rows = train(dataclasses.replace(config, updates=2), policy_folder, [keep])
        found[name] = keep.grad, rows[0]["length"]
        groups = module.last_groups
        assert any(sample.mask for group in groups for sample in group.samples)
        own = [sum(s.mask) if s.mask else len(s.token_ids) for g in groups for s in g.samples]
        assert rows[-1]["length"] == pytest.approx(sum(own) / len(own))
    for name, (gradient, _) in found.items():
        error = (gradient - found["dense"][0]).norm() / found["dense"][0].norm()
        assert error < 5e-5, (name, error)


def test_what_the_tool_says_has_no_gradient(policy_folder, model):
    """The objective of a batch with replies is the sum over its own tokens, by hand."""
    from trimtab.rl.advantages import outcome_advantages
    from trimtab.rl.objective import Prepared, objective, policy_statistics, token_weights
    from trimtab.rl.update_config import UpdateConfig

    called = Sample([5, 9, 10, 7], [-1.0, 0.0, 0.0, -3.0], "stop", mask=(True, False, False, True))
    plain = Sample([5, 6, 8], [-2.0, -2.0, -1.0], "stop")
    batch = collate([[2, 4]], [7], [[plain, called]], [[0.0, 1.0]])
    config = UpdateConfig(loss="reinforce", advantage="dr_grpo", aggregation="seq_mean")
    outcome, _ = outcome_advantages(batch, config)
    weights = token_weights(batch, outcome, config, 9, None)
    found = policy_statistics(model, batch, config, 1.0)
    batch = dataclasses.replace(batch, rollout_logp=found.policy.logp.detach())
    part = Prepared(batch, outcome, weights, batch.rollout_logp)
    model.zero_grad()
    objective(found, part, config).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    truth = 0.0
    for sample, advantage, kept in ((plain, -0.5, [0, 1, 2]), (called, 0.5, [0, 3])):
        logits = model(torch.tensor([[2, 4, *sample.token_ids[:-1]]])).logits[0, 1:]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        truth = truth - advantage * logp[kept].mean() / 2
    model.zero_grad()
    truth.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_mixtures_with_a_tool_that_mean_nothing_are_refused(policy_folder):
    with pytest.raises(ValueError, match=r"token_baseline.alignment: expected model_token"):
        tool_config(policy_folder, token_baseline=TokenBaselineConfig("column"))
    with pytest.raises(ValueError, match=r"rollout.tree: expected null with a task whose"):
        config_of(ToolLetters(), policy_folder, {"tree": Tree()}, advantage="tree")


def test_a_tool_whose_calls_would_end_the_rollout_is_refused(policy_folder):
    class Ends(Letters):
        tool = dataclasses.replace(USE, end=";")

    with pytest.raises(ValueError, match=r"tool.end: expected another token than those that end"):
        train(config_of(Ends(), policy_folder), policy_folder)


def test_the_calculators_examples_are_right():
    task = CalculatorTask(called=0.5)
    for index in range(20):
        text = "".join(a + b for a, b in task.document(index, task.styles))
        for line in text.splitlines():
            if line.startswith("A:") and "<" in line:
                for call in line.split("<")[1:]:
                    expression, told = call.split(">")
                    assert told.split("#")[0] == str(eval(expression))
    prompt = task.problem("train", 0).prompt
    assert prompt.endswith("=\nA:") and prompt.count("Q:") == 7


# Edits that must turn this file red:
# - rl/turns.py: mask True at replies; the seed of the first turn again; calls not counted
# - rl/objective.py: without `sampled`; rl/batch.py: responses by `mask`
# - rl/advantages.py: the reward at mask.sum() - 1 (a reply's place)
