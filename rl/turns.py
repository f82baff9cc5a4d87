"""Rollouts in turns: the policy writes, a tool replies, the policy goes on.

A rollout is one sequence of token ids with a mask of what the policy sampled. A reply is tokenised
once, where it comes in, and nothing is ever decoded to be tokenised again; `max_tokens` bounds all
of it, replies included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from .rollout import FinishReason, Request, Sample
from .seeds import stable_seed
from .tools import ToolRunner, ToolUse

Generate = Callable[[Sequence[Request]], list[list[Sample]]]


@dataclass
class _Rollout:
    """One rollout so far."""

    request: Request
    place: int
    token_ids: list[int]
    logprobs: list[float]
    mask: list[bool]
    said: list[int]  # by the policy since the last reply
    version: int = 0
    calls: int = 0
    reason: FinishReason | None = None


class ToolTurns:
    """Lets the policy write, and runs the tool whenever a rollout calls it.

    Args:
        use: how calls are written, and their budgets.
        tokenizer: of the policy; makes text of calls and ids of replies.

    Raises:
        ValueError: the text that ends a call is not one token.
    """

    def __init__(self, use: ToolUse, tokenizer: PreTrainedTokenizerBase) -> None:
        self.use, self.tokenizer = use, tokenizer
        end = tokenizer.encode(use.end, add_special_tokens=False)
        if len(end) != 1:
            raise ValueError(f"tool.end: expected one token, {use.end!r} is {end}")
        self.end_id = int(end[0])
        self.runner = ToolRunner(use)

    def generate(self, policy: Generate, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order.

        Args:
            policy: makes the policy's turns: `generate` of a rollout engine.
            requests: of the first turn; their stop tokens end a rollout.

        Returns:
            For each request its `n` samples; those with a reply have a `mask`.
        """
        found = policy([self._with_end(request) for request in requests])
        groups = [
            [
                _Rollout(request, place, [], [], [], [], sample.version)
                for place, sample in enumerate(samples)
            ]
            for request, samples in zip(requests, found, strict=True)
        ]
        turn = [
            (rollout, sample)
            for rollouts, samples in zip(groups, found, strict=True)
            for rollout, sample in zip(rollouts, samples, strict=True)
        ]
        while turn:
            calling = [rollout for rollout, sample in turn if self._add_turn(rollout, sample)]
            replies = self.runner.replies(
                [self.use.call_in(self.tokenizer.decode(rollout.said)) for rollout in calling]
            )
            going_on = [
                rollout
                for rollout, reply in zip(calling, replies, strict=True)
                if self._add_reply(rollout, reply)
            ]
            if not going_on:
                break
            found = policy([self._next_turn(rollout) for rollout in going_on])
            turn = [(r, sample) for r, [sample] in zip(going_on, found, strict=True)]
        return [[_sample(rollout) for rollout in rollouts] for rollouts in groups]

    def close(self) -> None:
        """Ends the tool's process."""
        self.runner.close()

    def _with_end(self, request: Request) -> Request:
        stops = tuple(dict.fromkeys((*request.sampling.stop_token_ids, self.end_id)))
        return replace(request, sampling=replace(request.sampling, stop_token_ids=stops))

    def _add_turn(self, rollout: _Rollout, sample: Sample) -> bool:
        """Takes over what the policy said; whether it calls the tool, and may."""
        rollout.token_ids += sample.token_ids
        rollout.logprobs += sample.logprobs
        rollout.mask += [True] * len(sample.token_ids)
        rollout.said = sample.token_ids
        calls = sample.finish_reason == "stop" and sample.token_ids[-1] == self.end_id
        if calls and self.end_id not in rollout.request.sampling.stop_token_ids:
            rollout.calls += 1
            if rollout.calls <= self.use.max_calls:
                return True
            rollout.reason = "length"  # cut by its budget of calls
        else:
            rollout.reason = sample.finish_reason
        return False

    def _add_reply(self, rollout: _Rollout, reply: str) -> bool:
        """Appends a reply; whether the policy has room to go on."""
        text = self.use.reply.replace("{reply}", reply)
        ids = self.tokenizer.encode(text, add_special_tokens=False)[: self.use.max_reply_tokens]
        left = rollout.request.sampling.max_tokens - len(rollout.token_ids) - len(ids)
        if left < 1:  # nothing that the policy says could follow: the rollout ends with its call
            rollout.reason = "length"
            return False
        rollout.token_ids += ids
        rollout.logprobs += [0.0] * len(ids)
        rollout.mask += [False] * len(ids)
        return True

    def _next_turn(self, rollout: _Rollout) -> Request:
        sampling = rollout.request.sampling
        sampling = replace(
            sampling,
            n=1,
            max_tokens=sampling.max_tokens - len(rollout.token_ids),
            seed=stable_seed(sampling.seed, "turn", rollout.place, rollout.calls),
        )
        prompt = [*rollout.request.prompt_ids, *rollout.token_ids]
        return self._with_end(replace(rollout.request, prompt_ids=prompt, sampling=sampling))


def _sample(rollout: _Rollout) -> Sample:
    assert rollout.reason is not None
    mask = () if all(rollout.mask) else tuple(rollout.mask)
    return Sample(rollout.token_ids, rollout.logprobs, rollout.reason, rollout.version, mask=mask)
