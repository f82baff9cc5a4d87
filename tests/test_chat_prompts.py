"""Prompts of messages: one template, one tokenisation, and rewards in TRL's conversational form."""

import json

import pytest
import tiny_run
from loop_cases import Letters, config_of, train
from transformers import AutoTokenizer

from trimtab.rl import JsonLinesTask, Problem
from trimtab.rl.collect import prompt_ids
from trimtab.rl.recording import prompt_text

MESSAGES = [{"role": "system", "content": "12"}, {"role": "user", "content": "3a"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}f{% endif %}"
)


@pytest.fixture
def policy_folder(tmp_path):
    tiny_run.make_policy(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_template_makes_the_text_and_its_special_tokens(policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    ids = prompt_ids(tokenizer, Problem("0", MESSAGES))
    assert ids == tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert ids == tokenizer.encode("12;3a;f"), "one beginning-of-sequence token"
    assert prompt_text(MESSAGES) == "system: 12\nuser: 3a" and prompt_text("12") == "12"


def test_without_a_template_messages_are_refused(tmp_path):
    tiny_run.make_policy(tmp_path)
    with pytest.raises(ValueError, match=r"prompt: expected a text, since .* no chat template"):
        prompt_ids(AutoTokenizer.from_pretrained(tmp_path), Problem("0", MESSAGES))


def share_of_digits(prompts, completions, completion_ids):
    """In the form of TRL's conversational rewards; anything else raises."""
    rewards = []
    for prompt, completion, _ in zip(prompts, completions, completion_ids, strict=True):
        assert prompt[-1]["role"] == "user"
        [message] = completion
        assert message["role"] == "assistant"
        text = message["content"]
        rewards.append(sum(c.isdigit() for c in text) / max(len(text), 1))
    return rewards


class Chat(Letters):
    def problem(self, split, index):
        content = "abcdef"[index % 6] + str(index % 10)
        return Problem(f"{split}/{index}", [{"role": "user", "content": content}], {})


def test_a_run_on_messages(policy_folder):
    module, rows = train(config_of(Chat(share_of_digits), policy_folder), policy_folder)
    assert all(row["rollouts"] == 12 and row["reward_errors"] == 0 for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    for group in module.last_groups:
        assert tokenizer.decode(group.prompt_ids).endswith(";f")


def test_a_file_of_messages(tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": MESSAGES, "n": i}) for i in range(10)))
    task = JsonLinesTask(str(path), "reward_functions:digits_written")
    assert task.problem("train", 1).prompt == MESSAGES
    assert task.problem("train", 1).columns == {"n": 1}


# Edits that must turn this file red:
# - rl/collect.py: encode the template's text with special tokens; completions as texts
# - rl/tasks.py: messages refused
