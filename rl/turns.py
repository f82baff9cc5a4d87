"""Rollouts in turns: the policy writes, something replies, the policy goes on.

A rollout is one sequence of token ids with a mask of what the policy sampled. A reply is tokenised
once, where it comes in, and nothing is ever decoded to be tokenised again; `max_tokens` bounds all
of it, replies included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from transformers import PreTrainedTokenizerBase

from .rollout import FinishReason, Request, Sample
from .seeds import stable_seed
from .tools import ToolRunner, ToolUse

Generate = Callable[[Sequence[Request]], list[list[Sample]]]


class Turns(Protocol):
    """Makes whole rollouts of the policy's turns and of what comes between them."""

    @property
    def compares_groups(self) -> bool:
        """Whether the reward of a rollout depends on the others of its request."""
        ...

    def generate(self, policy: Generate, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order; `policy` makes the policy's turns."""
        ...

    def close(self) -> None:
        """Ends the processes behind it."""
        ...


@dataclass
class RolloutSoFar:
    """One rollout between its turns.

    Args:
        request: that asked for it.
        place: among the rollouts of its request.
    """

    request: Request
    place: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    said: list[int] = field(default_factory=list)  # by the policy since the last reply
    version: int = 0
    turns: int = 0
    reason: FinishReason = "length"

    def add_turn(self, sample: Sample) -> None:
        """Takes over what the policy said."""
        if not self.turns:
            self.version = sample.version
        self.token_ids += sample.token_ids
        self.logprobs += sample.logprobs
        self.mask += [True] * len(sample.token_ids)
        self.said, self.reason = sample.token_ids, sample.finish_reason
        self.turns += 1

    def add_reply(self, ids: list[int]) -> bool:
        """Appends what the policy did not write; False, and nothing is, if no room is left after.

        Nothing that the policy says could follow then: the rollout ends as one that was cut.
        """
        if self.request.sampling.max_tokens - len(self.token_ids) - len(ids) < 1:
            self.reason = "length"
            return False
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.mask += [False] * len(ids)
        return True

    def next_request(self) -> Request:
        """Asks for the policy's next turn."""
        sampling = self.request.sampling
        sampling = replace(
            sampling,
            n=1,
            max_tokens=sampling.max_tokens - len(self.token_ids),
            seed=stable_seed(sampling.seed, "turn", self.place, self.turns),
        )
        prompt = [*self.request.prompt_ids, *self.token_ids]
        return replace(self.request, prompt_ids=prompt, sampling=sampling)

    def as_sample(self, reward: float | None = None) -> Sample:
        """The rollout, ended."""
        mask = () if all(self.mask) else tuple(self.mask)
        return Sample(
            self.token_ids, self.logprobs, self.reason, self.version, mask=mask, reward=reward
        )


def begin(
    requests: Sequence[Request], found: Sequence[Sequence[Sample]]
) -> tuple[list[list[RolloutSoFar]], list[tuple[RolloutSoFar, Sample]]]:
    """Rollouts that have said nothing yet.

    Args:
        requests: that ask for them.
        found: their first turns.

    Returns:
        Those of each request; and each with its first turn.
    """
    groups = [
        [RolloutSoFar(request, place) for place in range(len(samples))]
        for request, samples in zip(requests, found, strict=True)
    ]
    turn = [
        (rollout, sample)
        for rollouts, samples in zip(groups, found, strict=True)
        for rollout, sample in zip(rollouts, samples, strict=True)
    ]
    return groups, turn


class ToolTurns:
    """Lets the policy write, and runs the tool whenever a rollout calls it.

    Args:
        use: how calls are written, and their budgets.
        tokenizer: of the policy; makes text of calls and ids of replies.
        stop_token_ids: that end a rollout.

    Raises:
        ValueError: the text that ends a call is not one token, or one that ends a rollout.
    """

    compares_groups: ClassVar[bool] = False

    def __init__(
        self,
        use: ToolUse,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.use, self.tokenizer = use, tokenizer
        end = tokenizer.encode(use.end, add_special_tokens=False)
        if len(end) != 1:
            raise ValueError(f"tool.end: expected one token, {use.end!r} is {end}")
        self.end_id = int(end[0])
        if self.end_id in stop_token_ids:
            raise ValueError(
                f"tool.end: expected another token than those that end a rollout, got {use.end!r}"
            )
        self.runner = ToolRunner(use)

    def generate(self, policy: Generate, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order.

        Args:
            policy: makes the policy's turns: `generate` of a rollout engine.
            requests: of the first turn; their stop tokens end a rollout.

        Returns:
            For each request its `n` samples; those with a reply have a `mask`.
        """
        groups, turn = begin(requests, policy([self._with_end(request) for request in requests]))
        while turn:
            calling = [rollout for rollout, sample in turn if self._calls(rollout, sample)]
            replies = self.runner.replies(
                [self.use.call_in(self.tokenizer.decode(rollout.said)) for rollout in calling]
            )
            going_on = [
                rollout
                for rollout, reply in zip(calling, replies, strict=True)
                if rollout.add_reply(self._reply_ids(reply))
            ]
            if not going_on:
                break
            found = policy([self._with_end(rollout.next_request()) for rollout in going_on])
            turn = [(r, sample) for r, [sample] in zip(going_on, found, strict=True)]
        return [[rollout.as_sample() for rollout in rollouts] for rollouts in groups]

    def close(self) -> None:
        """Ends the tool's process."""
        self.runner.close()

    def _with_end(self, request: Request) -> Request:
        stops = tuple(dict.fromkeys((*request.sampling.stop_token_ids, self.end_id)))
        return replace(request, sampling=replace(request.sampling, stop_token_ids=stops))

    def _calls(self, rollout: RolloutSoFar, sample: Sample) -> bool:
        """Takes over what the policy said; whether it calls the tool, and may."""
        rollout.add_turn(sample)
        calls = sample.finish_reason == "stop" and sample.token_ids[-1] == self.end_id
        if not calls or self.end_id in rollout.request.sampling.stop_token_ids:
            return False
        if rollout.turns > self.use.max_calls:  # cut by its budget of calls
            rollout.reason = "length"
            return False
        return True

    def _reply_ids(self, reply: str) -> list[int]:
        text = self.use.reply.replace("{reply}", reply)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids[: self.use.max_reply_tokens]
