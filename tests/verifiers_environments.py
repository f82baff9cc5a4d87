"""Environments of the real verifiers library, loaded by its own interpreter for its tests."""

import asyncio
import importlib.util
import os
import pathlib
import subprocess
import sys
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


class Holding(vf.SingleTurnEnv):
    """Holds a file until it is told that it is over."""

    def __init__(self, held):
        super().__init__(dataset=rows(12), rubric=vf.Rubric(funcs=[digits]))
        self.held = pathlib.Path(held)
        self.held.touch()

    @vf.teardown
    async def give_back(self):
        self.held.unlink()


class Choosy(vf.SingleTurnEnv):
    """Wants turns to be sampled in its own way."""

    async def get_model_response(self, state, prompt, **options):
        options |= {"sampling_args": {"stop": ["b"]}}
        return await super().get_model_response(state, prompt, **options)


class Board(vf.SingleTurnEnv):
    """Makes up its prompt as it begins."""

    async def setup_state(self, state):
        state["prompt"] = [vf.UserMessage(content="board")]


class Reading(Echo):
    """Replies how many bytes a program of its own has found on its standard input."""

    async def env_response(self, messages, state, **_):
        program = [sys.executable, "-c", "import sys; print(len(sys.stdin.read()))"]
        started = await asyncio.create_subprocess_exec(*program, stdout=subprocess.PIPE)
        return [vf.UserMessage(content="f" + (await started.communicate())[0].decode().strip())]


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


def judged(completion, **_):
    """A judge that is not there for answers with an x."""
    if "x" in completion[0]["content"]:
        raise ConnectionError("no judge")
    return 10.0


def judged_group(completions, **_) -> list[float]:
    """As `judged`, of all."""
    return [judged(completion) for completion in completions]


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
    if kind == "group_in_group":
        return vf.EnvGroup([load_environment("letters"), load_environment("group")])
    if kind == "echo":
        return Echo(**options)
    if kind == "judged":
        function = {"rollout": judged, "group": judged_group}[options["of"]]
        rubric = vf.Rubric(funcs=[digits, function], weights=[1.0, options["weight"]])
        return vf.SingleTurnEnv(dataset=rows(12), rubric=vf.RubricGroup([rubric, vf.Rubric()]))
    if kind == "mixed":
        rubric = vf.Rubric(funcs=[digits])
        plain = vf.SingleTurnEnv(dataset=rows(9), rubric=rubric)
        return vf.EnvGroup([plain, vf.ToolEnv(tools=[add], dataset=rows(9), rubric=rubric)])
    if kind == "holding":
        return vf.EnvGroup([Holding(**options)])
    if kind == "few":
        return vf.SingleTurnEnv(dataset=rows(4), rubric=vf.Rubric(funcs=[digits]))
    if kind == "choosy":
        own = {"temperature": 0.5}
        return Choosy(dataset=rows(12), rubric=vf.Rubric(funcs=[digits]), sampling_args=own)
    if kind == "shuffled":  # otherwise each time it is loaded
        table = Dataset.from_list([{"question": str(i), "answer": str(i)} for i in range(20)])
        right = lambda completion, answer, **_: float(completion[-1]["content"] == answer)
        return vf.SingleTurnEnv(dataset=table.shuffle(), rubric=vf.Rubric(funcs=[right]))
    if kind == "board":
        return Board(dataset=rows(12), rubric=vf.Rubric(funcs=[digits]))
    if kind == "empty":
        return vf.SingleTurnEnv(dataset=rows(0), rubric=vf.Rubric(funcs=[digits]))
    if kind == "reading":
        return Reading(**options)
    if kind == "imports":
        found = importlib.util.find_spec(options["name"])
        raise ValueError(f"found {found and found.origin}")
    if kind == "faulty":
        return Faulty(**options)
    if kind == "tools":
        rubric = vf.Rubric(funcs=[lambda completion, **_: float("42" in completion[-1]["content"])])
        return vf.ToolEnv(tools=[add], dataset=rows(12), rubric=rubric, **options)
    if kind == "gym":
        return vf.ReasoningGymEnv("chain_sum", num_train_examples=20, num_eval_examples=10)
    raise ValueError(f"no environment {kind!r}")
