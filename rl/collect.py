"""From problem numbers to scored rollouts: what training and evaluation have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .budget import with_greedy_extras
from .config import RLConfig
from .health import generate_again
from .rewards import RewardWorker, Scored
from .rollout import Request, RolloutEngine, Sample, Sampling, Tree
from .tasks import Problem, Prompt, Split, Task, chat_text


@dataclass(frozen=True)
class ScoredGroup:
    """One prompt, its rollouts and their rewards.

    Args:
        number: of the problem in its split.
        problem: what was asked.
        prompt_ids: token ids of the prompt.
        samples: the rollouts.
        completions: their texts without the stop token, for reward functions and people only.
        rewards: one per rollout; None where it was lost.
        greedy: the greedy rollout beside them, in no loss and no mean; None: not asked for.
        greedy_reward: its reward; None where it was lost.
    """

    number: int
    problem: Problem
    prompt_ids: list[int]
    samples: list[Sample]
    completions: list[str]
    rewards: list[float | None]
    greedy: Sample | None = None
    greedy_reward: float | None = None

    def all_rewards(self) -> list[float | None]:
        """Those of the rollouts, and of the greedy one where it was asked for."""
        return self.rewards + ([] if self.greedy is None else [self.greedy_reward])


class Collected(NamedTuple):
    """Scored rollouts of some problems.

    Args:
        groups: one per problem, in order.
        errors: rewards lost to an error.
        timeouts: rewards lost to the time limit.
        rollout_seconds: wall time of the engine.
        reward_seconds: wall time of the rewards.
    """

    groups: list[ScoredGroup]
    errors: int
    timeouts: int
    rollout_seconds: float
    reward_seconds: float


class Collector:
    """Rolls out problems and scores what comes back.

    Args:
        config: the run's sampling.
        task: gives problems, reward function and stop text.
        tokenizer: turns each prompt into ids once.

    Raises:
        ValueError: nothing could end a rollout, or the reward function cannot be sent to a process.
    """

    def __init__(self, config: RLConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.task, self.tokenizer = config, task, tokenizer
        self.stop_token_ids = stop_token_ids(tokenizer, task)
        self.turns = task.turns(tokenizer, self.stop_token_ids)
        self.worker: RewardWorker | None = None
        if (function := task.reward_function()) is not None:
            rollout = config.rollout
            self.worker = RewardWorker(function, rollout.reward_timeout, rollout.reward_memory_mb)

    def collect(
        self,
        engine: RolloutEngine,
        split: Split,
        numbers: Sequence[int],
        seed_of: Callable[[int], int],
        *,
        counts: Sequence[int] | None = None,
        greedy: bool = False,
        **changes: Any,
    ) -> Collected:
        """Rollouts of some problems, scored.

        Args:
            engine: already has the weights to sample from.
            split: of the task.
            numbers: of the problems.
            seed_of: number of a problem -> seed of its request.
            counts: rollouts of each problem; None: the run's group_size of each.
            greedy: one greedy rollout beside each group, scored too (ReMax).
            **changes: fields of the run's Sampling to change.

        Returns:
            Collected, one group per number, in order.
        """
        problems = [self.task.problem(split, number) for number in numbers]
        prompts = [prompt_ids(self.tokenizer, problem) for problem in problems]
        started = time.perf_counter()
        requests = [
            Request(
                prompt,
                self.sampling(seed=seed_of(number), **changes),
                meta={"split": split, "number": number},
            )
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
        if counts is not None:
            requests = [
                replace(request, sampling=replace(request.sampling, n=count))
                for request, count in zip(requests, counts, strict=True)
            ]
        requests = with_greedy_extras(requests) if greedy else requests
        generate = partial(generate_again, engine)
        if self.turns is None:
            samples = generate(requests)
        else:
            samples = self.turns.generate(generate, requests)
        sampled = time.perf_counter()
        extras: list[Sample] = []
        if greedy:
            extras = [sample for [sample] in samples[1::2]]
            samples = samples[::2]
        texts = [[self.completion(sample) for sample in group] for group in samples]
        rows = [(p, s, t) for p, g in enumerate(samples) for s, t in zip(g, texts[p], strict=True)]
        rows += [(p, sample, self.completion(sample)) for p, sample in enumerate(extras)]
        scored = self._scored(problems, rows)
        rest = iter(scored.rewards)
        rewards = [[next(rest) for _ in group] for group in samples]
        greedy_rewards = list(rest) or [None] * len(problems)
        groups = [
            ScoredGroup(*parts)
            for parts in zip(
                numbers,
                problems,
                prompts,
                samples,
                texts,
                rewards,
                extras or [None] * len(problems),
                greedy_rewards,
                strict=True,
            )
        ]
        seconds = (sampled - started, time.perf_counter() - sampled)
        return Collected(groups, scored.errors, scored.timeouts, *seconds)

    def _scored(
        self, problems: Sequence[Problem], rows: Sequence[tuple[int, Sample, str]]
    ) -> Scored:
        """Rewards of (number of its problem, rollout, its text)."""
        if self.worker is None:
            rewards = [sample.reward for _, sample, _ in rows]
            return Scored(rewards, rewards.count(None), 0)
        return self.worker.score(
            [problems[p].prompt for p, _, _ in rows],
            [as_prompt(problems[p].prompt, text) for p, _, text in rows],
            [sample.token_ids for _, sample, _ in rows],
            [problems[p].columns for p, _, _ in rows],
        )

    def state_of(self, collected: Collected) -> dict[str, Any]:
        """Collected rollouts as plain values, for a checkpoint.

        Args:
            collected: from `collect`.

        Returns:
            What `restored` takes.
        """
        groups = [
            {
                "number": group.number,
                "samples": [dataclasses.astuple(sample) for sample in group.samples],
                "rewards": group.rewards,
                "greedy": None if group.greedy is None else dataclasses.astuple(group.greedy),
                "greedy_reward": group.greedy_reward,
            }
            for group in collected.groups
        ]
        return collected._asdict() | {"groups": groups}

    def restored(self, state: dict[str, Any], split: Split) -> Collected:
        """What `state_of` was made of; problems and texts are made again.

        Args:
            state: from `state_of`.
            split: of the task.

        Returns:
            Collected.
        """
        groups = []
        for group in state["groups"]:
            problem = self.task.problem(split, group["number"])
            samples = [Sample(*fields) for fields in group["samples"]]
            groups.append(
                ScoredGroup(
                    group["number"],
                    problem,
                    prompt_ids(self.tokenizer, problem),
                    samples,
                    [self.completion(sample) for sample in samples],
                    group["rewards"],
                    None if group["greedy"] is None else Sample(*group["greedy"]),
                    group["greedy_reward"],
                )
            )
        return Collected(**state | {"groups": groups})

    def sampling(self, **changes: Any) -> Sampling:
        """The run's sampling, with some fields changed."""
        rollout, pruning = self.config.rollout, self.config.update.pruning
        options = {
            "n": rollout.group_size,
            "max_tokens": rollout.max_tokens,
            "temperature": rollout.temperature,
            "min_p": 0.0 if pruning is None else pruning.rho,
            "stop_token_ids": self.stop_token_ids,
            "tree": rollout.tree,
        }
        return Sampling(**(options | changes))

    def completion(self, sample: Sample) -> str:
        """The sample's text without the stop token."""
        ids = sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
        return self.tokenizer.decode(ids)

    def close(self) -> None:
        """Ends the reward process, and those of tools and environments."""
        if self.worker is not None:
            self.worker.close()
        if self.turns is not None:
            self.turns.close()


def decoded_fraction(groups: Sequence[ScoredGroup], tree: Tree) -> float:
    """Tokens that trees decoded, as a share of those of their rollouts.

    Args:
        groups: with at least one token.
        tree: their shape.

    Returns:
        In (0, 1]; 1 where nothing was shared.
    """
    decoded = told = 0
    for group in groups:
        nodes: dict[tuple[int, ...], int] = {}
        for sample in group.samples:
            told += len(sample.token_ids)
            for depth in range(len(sample.path)):
                rest = len(sample.token_ids) - depth * tree.segment
                nodes[sample.path[: depth + 1]] = min(tree.segment, rest)
        decoded += sum(nodes.values())
    return decoded / told


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """Token ids of a problem's prompt.

    Args:
        tokenizer: of the policy.
        problem: its prompt is a text, or messages for the chat template, whose answer is asked for.

    Returns:
        The ids, special tokens included.

    Raises:
        ValueError: messages, and the tokenizer has no chat template, or one that refuses them.
    """
    prompt = problem.prompt
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if tokenizer.chat_template is None:
        raise ValueError(
            "prompt: expected a text, since the policy's tokenizer has no chat template, got "
            f"messages: {prompt!r:.80}"
        )
    text = chat_text(tokenizer, prompt, problem.tools)
    return tokenizer.encode(text, add_special_tokens=False)  # the template has them


def as_prompt(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt, as TRL gives it to reward functions.

    Args:
        prompt: a text or messages.
        text: of the completion.

    Returns:
        The text, or the one message of an assistant.
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, task: Task) -> tuple[int, ...]:
    """Token ids that end a rollout: end-of-sequence, and the task's stop text.

    Args:
        tokenizer: of the policy.
        task: its `stop` may be empty.

    Returns:
        The ids, each once.

    Raises:
        ValueError: the stop text is not a single token, or nothing could end a rollout.
    """
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if task.stop:
        encoded = tokenizer.encode(task.stop, add_special_tokens=False)
        if len(encoded) != 1:
            raise ValueError(f"stop: expected one token, {task.stop!r} is {encoded}")
        ids += encoded
    if not ids:
        raise ValueError(
            "stop: the tokenizer has no end-of-sequence token and the task no stop text"
        )
    return tuple(dict.fromkeys(ids))
