"""Environments of the real verifiers library, loaded by its own interpreter for its tests."""

import os
import time

import verifiers as vf
from datasets import Dataset


def rows(count, **columns):
    return Dataset.from_list(
        [
            {"question": f"{i % 10}a", "answer": str(i % 10), "info": {"digit": i}} | columns
            for i in range(count)
        ]
    )


def digits(completion, **_):
    """Digits that the policy wrote in all its turns."""
    said = [m["content"] for m in completion if m["role"] == "assistant"]
    return float(sum(character.isdigit() for text in said for character in text))


class Echo(vf.MultiTurnEnv):
    """Replies the letters of each turn; over after `turns`, or where the policy wrote an x."""

    def __init__(self, **options):
        super().__init__(dataset=rows(12), rubric=vf.Rubric(funcs=[digits]), **options)

    @vf.stop
    async def wrote_x(self, state):
        return any("x" in step["completion"][-1].content for step in state["trajectory"])

    async def env_response(self, messages, state, **_):
        letters = "".join(c for c in messages[-1].content if c.isalpha())
        return [vf.UserMessage(content="f" + letters)]


class Faulty(Echo):
    """Goes wrong in one way with the row whose answer is 1."""

    def __init__(self, how):
        self.how = how
        super().__init__(max_turns=2)
        if how == "reward":
            self.rubric = vf.Rubric(funcs=[lambda completion, **_: float("nan")])

    async def env_response(self, messages, state, **options):
        if state["answer"] == "1":
            if self.how == "hang":
                await __import__("asyncio").sleep(1000)
            if self.how == "block":
                time.sleep(1000)
            if self.how == "exit":
                os._exit(3)
            if self.how == "raise":
                raise KeyError("no such drawer")
            if self.how == "error":
                raise vf.SandboxError("the sandbox is gone")
            if self.how == "speak":
                return [vf.AssistantMessage(content="1"), vf.UserMessage(content="f")]
        return await super().env_response(messages, state, **options)

    async def get_prompt_messages(self, state):
        messages = await super().get_prompt_messages(state)
        if self.how == "rewrite" and state["answer"] == "1" and len(state["trajectory"]) == 1:
            return [*messages[:-2], messages[-1]]  # forgets what the policy said
        return messages


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def shared_first_letter(completions, **_) -> list[float]:
    """Of a group: the share of the others that begin alike."""
    firsts = [messages[0]["content"][:1] for messages in completions]
    return [(firsts.count(first) - 1) / len(firsts) for first in firsts]


def load_environment(kind, **options):
    """One of the environments here."""
    if kind == "letters":
        rubric = vf.Rubric(funcs=[digits])
        return vf.SingleTurnEnv(dataset=rows(25), rubric=rubric, system_prompt="bc")
    if kind == "own_eval":
        own = dict(dataset=rows(4), eval_dataset=rows(3, question="eval"))
        return vf.SingleTurnEnv(**own, rubric=vf.Rubric(funcs=[digits]))
    if kind == "group":
        rubric = vf.Rubric(funcs=[digits, shared_first_letter], weights=[1.0, 10.0])
        return vf.SingleTurnEnv(dataset=rows(12), rubric=rubric)
    if kind == "echo":
        return Echo(**options)
    if kind == "faulty":
        return Faulty(**options)
    if kind == "tools":
        rubric = vf.Rubric(funcs=[lambda completion, **_: float("42" in completion[-1]["content"])])
        return vf.ToolEnv(tools=[add], dataset=rows(12), rubric=rubric, **options)
    if kind == "gym":
        return vf.ReasoningGymEnv("chain_sum", num_train_examples=20, num_eval_examples=10)
    raise ValueError(f"no environment {kind!r}")
