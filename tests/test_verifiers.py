"""Environments of the real verifiers library: `make test-verifiers` installs it in a folder."""

import itertools
import logging
import os
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from loop_cases import config_of, train
from tiny_run import run_here, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.rl import Request, Sample, Sampling, TransformersEngine, VerifiersTask
from trimtab.rl.collect import Collector, prompt_ids
from trimtab.rl.verifiers_process import Game
from trimtab.rl.warmup import character_tokenizer

PYTHON = os.environ.get("TRIMTAB_VERIFIERS")  # of the environment that has verifiers
real = pytest.mark.skipif(PYTHON is None, reason="make test-verifiers sets TRIMTAB_VERIFIERS")
TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% set marks = {'system': '(', 'user': '<', 'assistant': '>', 'tool': '='} %}"
    "{% for m in messages %}{{ marks[m.role] }}{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
ASCII = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(autouse=True)
def environments_are_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(scope="module")
def tokenizer():
    made = character_tokenizer(ASCII, 128)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def task_of():
    made = []

    def make(kind, timeout=60.0, **options):
        args = {"kind": kind} | options
        made.append(VerifiersTask("verifiers-environments", args, PYTHON, timeout, stop=";"))
        return made[-1]

    yield make
    for task in made:
        task.process.close()


def played(task, tokenizer, says, indices, n=1, max_tokens=400, split="train"):
    """Samples of problems, where the policy's turns are `says(what it reads, its number)`."""
    stop = tokenizer.convert_tokens_to_ids(";")

    def policy(requests):
        found = []
        for request in requests:
            group = []
            for place in range(request.sampling.n):
                text = says(tokenizer.decode(request.prompt_ids), place)
                ids = tokenizer.encode(text + ";", add_special_tokens=False)
                cut = ids[: request.sampling.max_tokens]
                reason = "stop" if cut[-1] == stop else "length"
                group.append(Sample(cut, [-1.0] * len(cut), reason, version=7))
            found.append(group)
        return found

    turns = task.turns(tokenizer, (1, stop))
    sampling = Sampling(n=n, max_tokens=max_tokens, stop_token_ids=(1, stop))
    requests = [
        Request(
            prompt_ids(tokenizer, task.problem(split, index)),
            sampling,
            {"split": split, "number": index},
        )
        for index in indices
    ]
    return requests, turns.generate(policy, requests)


def parts(tokenizer, sample):
    """(written by the policy, text) of each stretch."""
    mask = sample.mask or (True,) * len(sample.token_ids)
    pairs = zip(mask, sample.token_ids, strict=True)
    return [
        (own, tokenizer.decode([token for _, token in stretch]))
        for own, stretch in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]


@real
def test_rows_are_problems_and_every_tenth_is_held_out(task_of, tokenizer):
    task = task_of("letters")
    problem = task.problem("train", 3)
    assert problem.prompt == [
        {"role": "system", "content": "bc"},
        {"role": "user", "content": "3a"},
    ]
    assert problem.columns["answer"] == "3" and problem.columns["info"] == {"digit": 3}
    assert tokenizer.decode(prompt_ids(tokenizer, problem)) == "<bos>(bc;<3a;>"
    held = [task.problem("heldout", i).columns["info"]["digit"] for i in range(2)]
    assert held == [9, 19]
    kept = [task.problem("train", i).columns["info"]["digit"] for i in range(24)]
    assert kept == [i for i in range(25) if i not in (9, 19)] + [0]


@real
def test_an_environments_own_evaluation_set_is_held_out(task_of):
    task = task_of("own_eval")
    assert task.problem("heldout", 4).prompt[-1]["content"] == "eval"
    assert task.problem("train", 4).prompt[-1]["content"] == "0a"


@real
def test_a_single_turn_is_scored_by_the_environments_rubric(task_of, tokenizer):
    _, groups = played(task_of("letters"), tokenizer, lambda _, n: "12345"[:n] + "ab", [0, 5], n=4)
    for group in groups:
        assert [sample.reward for sample in group] == [0, 1, 2, 3]
        assert [parts(tokenizer, s) for s in group][2] == [(True, "12ab;")]
        assert {(s.finish_reason, s.version, s.mask) for s in group} == {("stop", 7, ())}


@real
def test_a_rubric_of_groups_sees_each_group_alone(task_of, tokenizer):
    first = {0: "a", 1: "a", 2: "b"}
    _, groups = played(task_of("group"), tokenizer, lambda _, n: first[n] + "9", [0, 0, 4], n=3)
    for group in groups:
        assert [s.reward for s in group] == pytest.approx([1 + 10 / 3, 1 + 10 / 3, 1])


@real
def test_a_conversation_is_the_chat_templates_text_and_masks_what_it_did_not_write(
    task_of, tokenizer
):
    def says(read, place):
        return {"<2a;>": "ab1", "<fab;>": "c2d", "<fcd;>": "e"}[read[read.rindex("<") :]]

    [request], [[sample]] = played(task_of("echo", max_turns=3), tokenizer, says, [2])
    assert parts(tokenizer, sample) == [
        (True, "ab1;"),
        (False, "<fab;>"),
        (True, "c2d;"),
        (False, "<fcd;>"),
        (True, "e;"),
    ]
    assert sample.reward == 2 and sample.finish_reason == "stop"
    assert [lp for lp, own in zip(sample.logprobs, sample.mask) if not own] == [0.0] * 12
    messages = [
        {"role": "user", "content": "2a"},
        {"role": "assistant", "content": "ab1"},
        {"role": "user", "content": "fab"},
        {"role": "assistant", "content": "c2d"},
        {"role": "user", "content": "fcd"},
        {"role": "assistant", "content": "e"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode([*request.prompt_ids, *sample.token_ids]) == whole


@real
def test_a_stop_condition_of_the_environment_ends_a_rollout(task_of, tokenizer):
    says = lambda read, place: "x1" if place == 1 or read.count(">") == 3 else "a1"
    _, [group] = played(task_of("echo", max_turns=9), tokenizer, says, [0], n=2)
    assert [sum(own for own, _ in parts(tokenizer, s)) for s in group] == [2, 1]
    assert [s.reward for s in group] == [2, 1]


@real
def test_a_rollout_without_room_for_a_turn_ends_as_cut_and_is_scored(task_of, tokenizer):
    # a turn has 4 tokens and a reply 6: 4 + 6 + 4 fit into 15, another reply does not
    _, [[sample]] = played(
        task_of("echo", max_turns=9), tokenizer, lambda *_: "ab1", [0], max_tokens=15
    )
    assert parts(tokenizer, sample) == [(True, "ab1;"), (False, "<fab;>"), (True, "ab1;")]
    assert sample.finish_reason == "length" and sample.reward == 2


@real
def test_tools_are_offered_called_and_answered(task_of, tokenizer):
    call = '<tool_call>{"name": "add", "arguments": {"a": 40, "b": 2}}</tool_call>'

    def says(read, place):
        return "it is 42" if "=42" in read else call

    task = task_of("tools")
    [schema] = task.problem("train", 0).tools
    assert schema["function"]["name"] == "add" and set(
        schema["function"]["parameters"]["properties"]
    ) == {"a", "b"}
    [request], [[sample]] = played(task, tokenizer, says, [0])
    assert tokenizer.decode(request.prompt_ids) == "<bos>[add]<0a;>"
    assert parts(tokenizer, sample) == [
        (True, call + ";"),
        (False, "=42;>"),
        (True, "it is 42;"),
    ]
    assert sample.reward == 1


@real
def test_what_is_no_call_ends_the_rollout(task_of, tokenizer):
    broken = '<tool_call>{"name": "add", </tool_call>'
    _, [[sample]] = played(task_of("tools"), tokenizer, lambda *_: broken, [0])
    assert parts(tokenizer, sample) == [(True, broken + ";")] and sample.reward == 0


@real
def test_verifiers_own_reasoning_gym_scores_right_answers(task_of, tokenizer):
    import reasoning_gym

    task = task_of("gym")
    questions = reasoning_gym.create_dataset("chain_sum", size=30, seed=0)
    assert questions[4]["question"] in task.problem("train", 4).prompt[-1]["content"]
    assert questions[23]["question"] in task.problem("heldout", 3).prompt[-1]["content"]
    right = questions[4]["answer"]
    says = lambda _, n: f"<answer>{int(right) + n}</answer>"
    _, [group] = played(task, tokenizer, says, [4], n=2)
    assert group[0].reward == 1 and group[1].reward < 0.1


@real
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hang", "TimeoutError: no answer within 3 s"),
        ("raise", "KeyError: 'no such drawer'"),
        ("error", "SandboxError: the sandbox is gone"),
        ("rewrite", "expected a conversation that only grows"),
        ("speak", "speaks as the assistant"),
    ],
)
def test_what_goes_wrong_in_one_rollout_loses_that_one(task_of, tokenizer, caplog, how, said):
    task = task_of("faulty", timeout=3.0, how=how)
    with caplog.at_level(logging.WARNING, "trimtab"):
        _, groups = played(task, tokenizer, lambda *_: "a1", [0, 1, 2])
    assert [group[0].reward for group in groups] == [2, None, 2]
    assert said in caplog.text
    assert groups[1][0].token_ids, "a lost rollout has its tokens"


@real
def test_rewards_that_are_no_numbers_are_lost(task_of, tokenizer, caplog):
    _, groups = played(task_of("faulty", how="reward"), tokenizer, lambda *_: "a1", [0, 1])
    assert [group[0].reward for group in groups] == [None, None]
    assert "expected a finite reward, got nan" in caplog.text


@real
def test_an_environment_may_stop_waiting_for_the_policy(task_of, tokenizer, caplog):
    def says(read, place):
        if "<f" in read:
            time.sleep(2)
        return "a1"

    task = task_of("echo", max_turns=3, timeout_seconds=0.5)
    _, [[sample]] = played(task, tokenizer, says, [0])
    assert sample.reward is None and "own time limit" in caplog.text
    _, [[sample]] = played(task, tokenizer, lambda *_: "x1", [1])
    assert sample.reward == 1, "the process is not the same any more"


@real
@pytest.mark.parametrize("how", ["block", "exit"])
def test_a_dead_process_loses_its_rollouts_and_the_next_ones_get_a_new_one(
    task_of, tokenizer, caplog, monkeypatch, how
):
    monkeypatch.setattr(Game, "GRACE", 1.0)
    task = task_of("faulty", timeout=2.0, how=how)
    with caplog.at_level(logging.WARNING, "trimtab"):
        _, groups = played(task, tokenizer, lambda *_: "a1", [0, 1])
    assert [group[0].reward for group in groups] == [None, None]
    assert ("no answer within" if how == "block" else "it died") in caplog.text
    _, groups = played(task, tokenizer, lambda *_: "a1", [2, 3])
    assert [group[0].reward for group in groups] == [2, 2]


@real
def test_the_processes_end_with_the_trainer(task_of):
    task = task_of("letters")
    task.problem("train", 0)
    process = task.process._process
    task.process._process = None  # as if it had never been closed
    process.stdin.close()
    process.wait(20)
    task.process.close()


@real
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"env_id": "no-such-environment"}, "no-such-environment.*Could not import"),
        ({"env_args": {"kind": "none"}}, "no environment 'none'"),
        ({"python": "/no/such/python"}, "task.python: /no/such/python does not start"),
    ],
)
def test_what_does_not_load_says_why(changes, said):
    options = {"env_id": "verifiers-environments", "env_args": {"kind": "echo"}, "python": PYTHON}
    task = VerifiersTask(**options | changes)
    with pytest.raises(ValueError, match=said):
        task.problem("train", 0)


def test_an_interpreter_without_verifiers_says_so():
    import importlib.util

    if importlib.util.find_spec("verifiers") is not None:
        pytest.skip("verifiers is installed beside these tests")
    task = VerifiersTask("echo", python=sys.executable)
    with pytest.raises(ValueError, match=r"environment 'echo': ModuleNotFoundError.*verifiers"):
        task.problem("train", 0)
    assert task.process._process is None
    with pytest.raises(ValueError, match="timeout: expected seconds > 0, got 0"):
        VerifiersTask("echo", timeout=0)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_run.make_policy(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@real
def test_the_loop_trains_on_conversations_as_the_policy_sampled_them(task_of, policy_folder):
    task = task_of("echo", max_turns=3)
    _, rows = train(config_of(task, policy_folder, {"max_tokens": 40}), policy_folder)
    assert rows
    for row in rows:
        assert row["mismatch/abs_dlogp_mean"] < 1e-5, "tokens or their context differ"
        assert row["reward"] > 0
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    collector = Collector(config_of(task, policy_folder, {"max_tokens": 40}), task, tokenizer)
    engine = TransformersEngine(model, dtype=torch.float32)
    found = collector.collect(engine, "train", [0, 1], lambda number: number)
    masks = [sample.mask for group in found.groups for sample in group.samples]
    assert any(masks) and found.errors == 0
    for group in found.groups:
        for sample, reward in zip(group.samples, group.rewards, strict=True):
            own = [t for t, m in zip(sample.token_ids, sample.mask or itertools.repeat(True)) if m]
            assert reward == sum(c.isdigit() for c in tokenizer.decode(own))
    again = collector.restored(collector.state_of(found), "train")
    assert again == found


@real
def test_a_run_trains_and_resumes_from_the_command_line(tmp_path):
    changes = {
        "task": {
            "class_path": "trimtab.rl.VerifiersTask",
            "init_args": {
                "env_id": "verifiers-environments",
                "env_args": {"kind": "echo", "max_turns": 2},
                "python": PYTHON,
                "stop": ";",
            },
        },
        "updates": 4,
        "record.checkpoint_every": 2,
    }
    recipe = write_recipe(tmp_path, changes)
    folder = tmp_path / "tiny-policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    tokenizer.save_pretrained(folder)
    run_here(["--config", recipe, "--run_dir", "whole"], tmp_path)
    run_here(["--config", recipe, "--run_dir", "cut", "--trainer.max_steps=2"], tmp_path)
    run_here(["--resume", "cut"], tmp_path)
    metrics = [tiny_run.metrics_of(tmp_path / name) for name in ("whole", "cut")]
    for one, other in zip(*metrics, strict=True):
        assert one["reward"] == other["reward"] and one["loss"] == other["loss"]


# Edits that must turn this file red, each in trimtab/rl/:
# * verifiers_task.py: `removeprefix(end)` -> nothing (the token that ends a turn comes twice)
# * verifiers_task.py: `if turn["messages"] and talk.hear(...)` without `talk.hear` (no reply)
# * verifiers_worker.py: score all rollouts as one group
# * verifiers_worker.py: `self.rewards[i]` also for states with an error
# * verifiers_worker.py: `refuse_rewritten` returns at once
# * verifiers_worker.py: the reader thread returns at the end of stdin
# * turns.py: `[False] * len(ids)` -> True (replies are trained)
# * verifiers_process.py: `_exchange` does not close a process that gave no answer
