"""Environments of the `verifiers` library as tasks: single turns, games, tools, their own rubrics.

`verifiers` plays each rollout as it would against a server; what would be the server is the policy,
so tokens and log-probs are the engine's own and a rollout stays one sequence of tokens. It lives
in a process of its own, under another interpreter if need be: its requirements (datasets < 4.7) and
those of TRL (>= 4.7) exclude each other.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rollout import Request, Sample
from .tasks import Problem, Split, Task, chat_text
from .turns import Generate, RolloutSoFar, begin
from .verifiers_process import EnvironmentDied, VerifiersProcess

logger = logging.getLogger(__name__)

PLACE = "trimtab-the-policy-said-this"


class VerifiersTask(Task):
    """Problems, turns and rewards of an environment of verifiers 0.1.

    The environment's rubric scores each group, and a greedy rollout alone; rollouts that end by an
    error of the environment, or of one of its reward functions, are lost. Held out are its
    `eval_dataset`, or every tenth row where it has none. Sampling is the run's. Tool calls are read
    in Hermes' form (`<tool_call>{...}</tool_call>`, as Qwen and SmolLM2 write them). A conversation
    that the environment rewrites, or begins with another prompt than its dataset's, is not what the
    policy has read: those rollouts are lost, which the log says.

    Args:
        env_id: name of the environment's module, as `verifiers.load_environment` takes it; found
            where the run is started, too.
        env_args: arguments of its `load_environment`.
        python: interpreter of the environment that has `verifiers`; null: the trainer's own.
        timeout: seconds that the environment may take between two turns, and for each group to
            score all of them; rollouts that take longer are lost.
        stop: text of the token that ends a turn; empty relies on the end-of-sequence token. That
            of the tokenizer's chat template must be one of them.

    Raises:
        ValueError: timeout is not positive; and at the first problem: the interpreter does not
            start or has no verifiers 0.1, or the environment does not load.

    Source:
        https://github.com/PrimeIntellect-ai/verifiers, tested with 0.1.14.
    """

    def __init__(
        self,
        env_id: str,
        env_args: dict[str, Any] | None = None,
        python: str | None = None,
        timeout: float = 60.0,
        stop: str = "",
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds > 0, got {timeout}")
        self.stop = stop
        self.process = VerifiersProcess(env_id, dict(env_args or {}), python, timeout)
        self._row = functools.lru_cache(maxsize=4096)(self.process.row)

    @property
    def in_turns(self) -> bool:
        """True: which environments have one turn only shows as they play."""
        return True

    def turns(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
    ) -> VerifiersTurns:
        """The environment, playing."""
        return VerifiersTurns(self, tokenizer, stop_token_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a process of its own."""
        process = self.process
        options = (process.env_id, process.env_args, process.asked_python, process.timeout)
        return VerifiersTask, (*options, self.stop)

    def problem(self, split: Split, index: int) -> Problem:
        """Row `index` of a split, starting over at its end."""
        index %= self.process.start()[split]
        row = self._row(split, index)
        return Problem(f"{split}/{index}", row["prompt"], row["columns"], row["tools"])

    def reward_function(self) -> None:
        """None: the environment scores its rollouts."""


class VerifiersTurns:
    """Rollouts that an environment plays with the policy.

    Args:
        task: the environment.
        tokenizer: of the policy; its chat template makes text of the environment's messages.
        stop_token_ids: that end a turn.

    Raises:
        ValueError: the chat template ends the assistant's turns with another token.
    """

    def __init__(
        self,
        task: VerifiersTask,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.task, self.process, self.tokenizer = task, task.process, tokenizer
        self._complained = False
        refuse_unended_turns(tokenizer, stop_token_ids)

    @property
    def compares_groups(self) -> bool:
        """Whether the environment's rubric has reward functions of groups."""
        self.process.start()
        return self.process.compares_groups

    def generate(self, policy: Generate, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request with their rewards, in order.

        Args:
            policy: makes the policy's turns: `generate` of a rollout engine.
            requests: of the first turn; `meta` has the problem's `split` and `number`.

        Returns:
            For each request its `n` samples; those with a reply have a `mask`; those that were
            lost have no `reward`.
        """
        groups, first = begin(requests, policy(requests))
        for rollout, sample in first:
            rollout.add_turn(sample)
        rollouts = [rollout for rollout, _ in first]
        rewards: list[float | None] = [None] * len(rollouts)
        try:
            rewards = self._played(policy, groups)
        except EnvironmentDied as died:
            self._complain(str(died))
        rest = iter(rewards)
        return [[rollout.as_sample(next(rest)) for rollout in members] for members in groups]

    def close(self) -> None:
        """Ends the environment, and its process."""
        self.process.end()

    def _played(
        self, policy: Generate, groups: Sequence[Sequence[RolloutSoFar]]
    ) -> list[float | None]:
        """Plays rollouts that have had their first turn, to their ends; their rewards."""
        sizes = self.process.start()
        asked, talks = [], []
        for members in groups:
            split, number = (members[0].request.meta[key] for key in ("split", "number"))
            problem = self.task.problem(split, number)
            told = {"prompt": problem.prompt, "tools": problem.tools}
            index = number % sizes[split]
            asked.append({"split": split, "index": index, "n": len(members)} | told)
            talks += [Conversation(rollout, problem, self.tokenizer) for rollout in members]
        with self.process.play(asked) as game:
            answer = game.start()
            while "turns" in answer:
                answer = game.reply(self._replies(policy, talks, answer["turns"]))
        for ended in answer["rollouts"]:
            if ended["error"] is not None:
                self._complain(ended["error"])
        return [ended["reward"] for ended in answer["rollouts"]]

    def _replies(
        self, policy: Generate, talks: Sequence[Conversation], turns: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The policy's turns; the first ones are there already."""
        talking = [(turn["rollout"], talks[turn["rollout"]]) for turn in turns]
        asking = [
            talk
            for turn, (_, talk) in zip(turns, talking, strict=True)
            if turn["messages"] and talk.hear(turn["messages"])
        ]
        if asking:
            found = policy([talk.rollout.next_request() for talk in asking])
            for talk, [sample] in zip(asking, found, strict=True):
                talk.rollout.add_turn(sample)
        return [{"rollout": i} | talk.said() for i, talk in talking]

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("a reward is lost and its rollout excluded (said once): %s", why)


class Conversation:
    """The messages of one rollout, beside its tokens.

    Args:
        rollout: with its first turn.
        problem: its prompt is a text, or messages.
        tokenizer: of the policy.
    """

    def __init__(
        self, rollout: RolloutSoFar, problem: Problem, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.rollout, self.tokenizer, self.tools = rollout, tokenizer, problem.tools
        self.messages = None if isinstance(problem.prompt, str) else list(problem.prompt)
        self.ended = False

    def hear(self, replies: list[dict[str, Any]]) -> bool:
        """Takes over the environment's messages; False if no room is left after them."""
        text = self._text_of(replies)
        # half of an emoji, which a policy may write as an argument in JSON, cannot be tokenised
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.ended = not self.rollout.add_reply(ids)
        return not self.ended

    def said(self) -> dict[str, Any]:
        """The policy's last turn; `text` is None where it had no room for one."""
        if self.ended:
            return {"text": None}
        said, rollout = self.rollout.said, self.rollout
        return {
            "text": self._last_text(),
            "finish_reason": rollout.reason,
            "prompt_tokens": len(rollout.request.prompt_ids) + len(rollout.token_ids) - len(said),
            "completion_tokens": len(said),
        }

    def _last_text(self) -> str:
        said = self.rollout.said
        return self.tokenizer.decode(said[:-1] if self.rollout.reason == "stop" else said)

    def _text_of(self, replies: list[dict[str, Any]]) -> str:
        """What stands between the policy's last token and its next one.

        That is what the chat template writes behind the policy's text, whatever that text is: a
        placeholder stands for it. The token that ended the turn is there already.

        Raises:
            ValueError: the template has no place for the policy's text, or several.
        """
        if self.messages is None:
            return "".join(reply["content"] for reply in replies)
        place = {"role": "assistant", "content": PLACE}
        text = chat_text(self.tokenizer, [*self.messages, place, *replies], self.tools)
        if text.count(PLACE) != 1:
            raise ValueError(
                "task: expected a chat template that writes the assistant's text once, it is there "
                f"{text.count(PLACE)} times"
            )
        self.messages += [{"role": "assistant", "content": self._last_text()}, *replies]
        after = text.partition(PLACE)[2]
        if self.rollout.reason != "stop":
            return after
        end = self.tokenizer.decode(self.rollout.said[-1:])
        for found in (after, after.lstrip()):  # some write a space before it, the policy did not
            if found.startswith(end):
                return found.removeprefix(end)
        return after


def refuse_unended_turns(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
    """Raises if nothing ends a turn where the chat template does: the policy would write on.

    Args:
        tokenizer: of the policy.
        stop_token_ids: that end a turn.

    Raises:
        ValueError: the template ends the assistant's turns with another special token.
    """
    if tokenizer.chat_template is None:  # enough for prompts that are texts
        return
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACE}]
    text = chat_text(tokenizer, talk, answer=False)
    ids = tokenizer.encode(text.partition(PLACE)[2].strip(), add_special_tokens=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if ids and ids[0] in special.difference(stop_token_ids):
        end = tokenizer.decode(ids[:1])
        raise ValueError(
            f"task.stop: the policy's chat template ends a turn with {end!r}, at which nothing "
            f"stops; expected stop: {end!r}"
        )
