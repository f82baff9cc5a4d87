"""Environments of the real verifiers library: `make test-verifiers` installs it in a folder."""

import copy
import itertools
import logging
import os
import pickle
import re
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
from trimtab.rl.tasks import Problem
from trimtab.rl.turns import RolloutSoFar
from trimtab.rl.verifiers_process import Game
from trimtab.rl.verifiers_task import Conversation
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
def test_training_problems_that_are_held_out_too_are_told(task_of, capfd):
    task = task_of("few")
    assert task.problem("train", 3).prompt == task.problem("heldout", 3).prompt
    assert "the held-out problems are the training ones" in capfd.readouterr().err


@real
def test_the_end_of_a_run_tears_the_environment_down(task_of, tokenizer, tmp_path):
    task = task_of("holding", held=str(tmp_path / "held"))
    turns = task.turns(tokenizer, (1, tokenizer.convert_tokens_to_ids(";")))
    turns.close()  # nothing has been started
    task.problem("train", 0)
    assert (tmp_path / "held").exists()
    turns.close()
    assert not (tmp_path / "held").exists() and task.process._process is None


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
@pytest.mark.parametrize("kind", ["group", "group_in_group"])
def test_a_greedy_baseline_is_refused_where_groups_are_compared(task_of, policy_folder, kind):
    config = config_of(task_of(kind), policy_folder, advantage="remax")
    with pytest.raises(ValueError, match=r"update.advantage: expected another than remax"):
        train(config, policy_folder)


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
def test_half_an_emoji_that_a_tool_returns_is_replaced(task_of, tokenizer):
    call = '<tool_call>{"name": "add", "arguments": {"a": "\\ud83d", "b": "1"}}</tool_call>'
    says = lambda read, _: "42" if ";=" in read else call
    _, [[sample]] = played(task_of("tools"), tokenizer, says, [0])
    unknown = tokenizer.unk_token  # the tokenizer of these tests has no replacement character
    assert parts(tokenizer, sample)[1] == (False, f"={unknown}1;>") and sample.reward == 1


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
def test_members_of_a_group_of_environments_offer_their_own_tools(task_of, tokenizer):
    call = '<tool_call>{"name": "add", "arguments": {"a": 40, "b": 2}}</tool_call>'
    says = lambda read, _: call if "[add]" in read and "=42" not in read else "7"
    requests, groups = played(task_of("mixed"), tokenizer, says, [3, 12])
    assert [tokenizer.decode(r.prompt_ids) for r in requests] == ["<bos><3a;>", "<bos>[add]<4a;>"]
    assert [group[0].reward for group in groups] == [1, 1]
    assert parts(tokenizer, groups[1][0])[1] == (False, "=42;>")


@real
def test_a_prompt_that_the_policy_has_not_read_is_refused(task_of, tokenizer, caplog):
    _, [[sample]] = played(task_of("board"), tokenizer, lambda *_: "1", [0])
    assert sample.reward is None
    assert "expected a conversation that begins with the dataset's prompt" in caplog.text


@real
def test_an_environments_own_sampling_is_not_passed_over_in_silence(
    task_of, tokenizer, caplog, capfd
):
    _, [[sample]] = played(task_of("choosy"), tokenizer, lambda *_: "1", [0])
    assert "the environment's is not: {'temperature': 0.5}" in capfd.readouterr().err
    assert sample.reward is None and "trainer's sampling, got {'stop': ['b']}" in caplog.text


@real
@pytest.mark.parametrize(
    ("of", "weight", "rewards"),
    [
        ("rollout", 1.0, [12, None, 12]),
        ("rollout", 0.0, [2, 2, 2]),
        ("group", 1.0, [None, None, None]),
    ],
)
def test_the_error_of_a_reward_function_is_no_reward_of_zero(
    task_of, tokenizer, caplog, of, weight, rewards
):
    task = task_of("judged", of=of, weight=weight)
    _, [group] = played(task, tokenizer, lambda _, n: ["12", "12x", "12"][n], [0], n=3)
    assert [sample.reward for sample in group] == rewards
    assert ("ConnectionError: no judge" in caplog.text) == (None in rewards)


@real
def test_a_copy_has_a_process_of_its_own(task_of):
    task = task_of("own_eval")
    problem = task.problem("train", 1)
    for copied in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert copied.process._process is None and copied.stop == ";"
        assert copied.problem("train", 1) == problem
        copied.process.close()


@real
def test_what_an_environment_starts_does_not_read_the_trainers_answers(task_of, tokenizer):
    task = task_of("reading", timeout=20.0, max_turns=2)
    _, groups = played(task, tokenizer, lambda *_: "a1", [0, 1], n=2)
    for sample in itertools.chain(*groups):
        assert sample.reward == 2
        assert parts(tokenizer, sample)[1] == (False, "<f0;>")


@real
def test_modules_of_the_trainer_do_not_hide_those_of_the_environment(task_of):
    with pytest.raises(ValueError, match="found None"):  # trimtab/rl/ has a chain_sum.py
        task_of("imports", name="chain_sum").problem("train", 0)


@real
def test_a_process_that_died_between_two_games_is_started_again(task_of, tokenizer):
    task = task_of("echo", max_turns=2)
    task.problem("train", 0)
    task.process._process.kill()
    task.process._process.wait()
    _, [[sample]] = played(task, tokenizer, lambda *_: "a1", [0])  # whose row is known
    assert sample.reward == 2


@real
def test_rows_in_another_order_than_the_policy_read_are_not_scored(task_of, tokenizer, caplog):
    task = task_of("shuffled")
    says = lambda read, _: read[read.rindex("<") + 1 : -2]  # the answer
    _, groups = played(task, tokenizer, says, range(12))
    assert [group[0].reward for group in groups] == [1] * 12
    task.process.close()
    _, groups = played(task, tokenizer, says, range(12))
    assert {group[0].reward for group in groups} <= {1, None}, "by the answer of another row"
    assert "begins with the dataset's prompt" in caplog.text


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
        ({"env_args": {"kind": "empty"}}, "expected a dataset with rows"),
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


QWEN = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif -%}"
    "{%- for m in messages %}{% if m.role == 'tool' %}"
    "{%- if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{%- else %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
    "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
LINES = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
ROLES = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<s>", "</s>"]


def with_template(template):
    made = character_tokenizer(ASCII, 128)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "end", "role", "between"),
    [
        (QWEN, "<|im_end|>", "user", "\n<|im_start|>user\nfab<|im_end|>\n<|im_start|>assistant\n"),
        (
            QWEN,
            "<|im_end|>",
            "tool",
            "\n<|im_start|>user\n<tool_response>\nfab\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            LLAMA_3,
            "<|eot_id|>",
            "user",
            "<|start_header_id|>user<|end_header_id|>\n\nfab<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (LLAMA_2, "</s>", "user", "<s>[INST] fab [/INST]"),
        (LINES, "\n", "user", "fab\n"),
        # a turn that ends by another token than the template's keeps both
        (
            LLAMA_3,
            "<eos>",
            "user",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nfab"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        # of two templates that for tools, as for the prompt
        ({"default": "{{ 1 / 0 }}", "tool_use": LLAMA_2}, "</s>", "user", "<s>[INST] fab [/INST]"),
    ],
)
def test_a_reply_is_what_the_chat_template_writes_behind_the_turn(template, end, role, between):
    tokenizer = with_template(template)
    said = tokenizer.encode(f" a1 {end}", add_special_tokens=False)
    rollout = RolloutSoFar(Request([2], Sampling(max_tokens=200)), 0)
    rollout.add_turn(Sample(said, [-1.0] * len(said), "stop"))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    problem = Problem("train/0", [{"role": "user", "content": "q"}], tools=tools)
    talk = Conversation(rollout, problem, tokenizer)
    assert talk.hear([{"role": role, "content": "fab"}])
    assert tokenizer.decode(rollout.token_ids) == f" a1 {end}{between}"


def test_a_template_whose_turns_nothing_ends_is_refused():
    task = VerifiersTask("echo")
    for template, end in ((QWEN, "<|im_end|>"), (LLAMA_3, "<|eot_id|>"), (LLAMA_2, "</s>")):
        tokenizer = with_template(template)
        with pytest.raises(ValueError, match=f"task.stop: .* ends a turn with '{re.escape(end)}'"):
            task.turns(tokenizer, (1,))
        task.turns(tokenizer, (1, tokenizer.convert_tokens_to_ids(end)))
    task.turns(with_template(ROLES), (1,))
    task.turns(with_template(None), (1,))


def test_messages_that_the_template_refuses_are_an_error_that_says_so():
    problem = Problem("train/0", [{"role": "system", "content": "q"}])
    with pytest.raises(ValueError, match=r"template refuses messages of \['system'\]: no role sys"):
        prompt_ids(with_template(ROLES), problem)


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
def test_lost_rollouts_are_counted_as_errors(task_of, policy_folder):
    task = task_of("faulty", how="raise")
    config = config_of(task, policy_folder, {"max_tokens": 40})
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    collector = Collector(config, task, AutoTokenizer.from_pretrained(policy_folder))
    engine = TransformersEngine(model, dtype=torch.float32)
    found = collector.collect(engine, "train", [0, 1, 2], lambda number: number)
    assert [None in group.rewards for group in found.groups] == [False, True, False]
    assert found.groups[1].rewards == [None] * 4
    assert (found.errors, found.timeouts) == (4, 0)


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
# * verifiers_worker.py: `refuse_rewritten` returns at once, or `refuse_other_prompt`
# * verifiers_worker.py: `lose_failed_rewards` is not called
# * verifiers_worker.py: nothing is put in the place of standard input
# * verifiers_task.py: `chat_text` without `self.tools`; `after` without `lstrip`
# * verifiers_worker.py: the reader thread returns at the end of stdin
# * turns.py: `[False] * len(ids)` -> True (replies are trained)
# * verifiers_process.py: `_exchange` does not close a process that gave no answer
