"""The protocol of rollout engines: prompts of token ids in; token ids and log-probs out.

Text never crosses it, so nothing is ever re-tokenised. `rl/engine.py` has the engine that needs
nothing else installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Tree:
    """How the rollouts of a prompt share segments (TreePO).

    All paths decode a segment; then, while rollouts are missing, each path that goes on gives
    birth to others that share what it has. When every path has ended, missing rollouts start at an
    earlier boundary of one that has. So long paths have more offspring: a tree's rollouts are no
    samples of the policy, and their mean reward and length are the tree's, not the policy's.

    Args:
        segment: tokens of a segment, >= 1.
        branches: most ways in which a path goes on at a boundary, and from the prompt, >= 2.
        repeats: a path ends, as one that was cut, when its last segment has come this many times
            in a row, >= 2; 0: never.

    Raises:
        ValueError: a number is out of range.

    Source:
        TreePO, arXiv 2508.17445.
    """

    segment: int = 16
    branches: int = 2
    repeats: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("segment", self.segment >= 1, "a count >= 1"),
            ("branches", self.branches >= 2, "a count >= 2"),
            ("repeats", self.repeats == 0 or self.repeats >= 2, "0 or a count >= 2"),
        ):
            if not holds:
                raise ValueError(f"tree.{name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Sampling:
    """How to sample one request.

    Args:
        n: rollouts of the prompt, >= 1.
        max_tokens: most tokens of a rollout, >= 1.
        temperature: divides the logits, >= 0; 0 is greedy.
        top_p: keep the most probable tokens up to this mass, in (0, 1]; 1 keeps all.
        top_k: keep this many tokens, >= 0; 0 keeps all.
        min_p: keep tokens with p >= min_p * max p, in [0, 1); 0 keeps all.
        stop_token_ids: a rollout ends with the first of these, which belongs to it.
        seed: of this request's random numbers.
        tree: rollouts that share segments; None: independent ones.

    Raises:
        ValueError: a value outside its range.
    """

    n: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    tree: Tree | None = None

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("n", self.n >= 1, "a count >= 1"),
            ("max_tokens", self.max_tokens >= 1, "a count >= 1"),
            ("temperature", self.temperature >= 0, "a number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "a mass in (0, 1]"),
            ("top_k", self.top_k >= 0, "a count >= 0"),
            ("min_p", 0 <= self.min_p < 1, "a ratio in [0, 1)"),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Args:
        prompt_ids: token ids of the prompt, at least one.
        sampling: how to sample it.
        meta: carried along untouched.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One rollout.

    Args:
        token_ids: the sampled tokens, a stop token included.
        logprobs: log-probability of each under the distribution it was sampled from, nats (after
            temperature and truncation; for greedy decoding, under the untruncated distribution).
        finish_reason: `stop` (a stop token ends it) or `length` (cut at max_tokens).
        version: weight version that sampled it.
        mask: where the policy sampled the token; False at a tool's, whose log-prob is 0. Empty:
            everywhere.
        path: of a rollout in a tree: for each of its segments the number of the rollout, among
            those of its request, that decoded it.
        reward: of an environment that scores its rollouts itself; None: not scored, or lost.

    Raises:
        ValueError: not one log-probability per token.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    version: int = 0
    path: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    reward: float | None = None

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError(
                f"logprobs: expected {len(self.token_ids)}, one per token, got {len(self.logprobs)}"
            )
        if self.mask and len(self.mask) != len(self.token_ids):
            raise ValueError(
                f"mask: expected {len(self.token_ids)}, one per token, got {len(self.mask)}"
            )


class Capabilities(NamedTuple):
    """What an engine can do; the loop refuses a recipe that needs more.

    Args:
        processed_logprobs: log-probs are of the distribution sampled, after temperature and min_p.
        min_p: it can truncate by min_p.
        tree: it can sample rollouts that share segments.
    """

    processed_logprobs: bool
    min_p: bool
    tree: bool = False


class RolloutEngine(Protocol):
    """Tokens in, tokens out. Weight names are checkpoint names."""

    capabilities: Capabilities

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes over new weights; samples drawn from now on carry `version`."""
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


def refuse_engine(
    capabilities: Capabilities, *, processed: bool, min_p: bool, tree: bool = False
) -> None:
    """Raises if a recipe needs what an engine cannot do.

    Args:
        capabilities: of the engine.
        processed: the recipe samples from another distribution than the plain softmax.
        min_p: it truncates by min_p (vocabulary pruning).
        tree: its rollouts share segments.

    Raises:
        ValueError: the engine reports raw log-probs, has no min_p, or grows no trees.
    """
    if processed and not capabilities.processed_logprobs:
        raise ValueError(
            "engine: expected log-probs after temperature and min_p, this one reports raw ones; "
            "set temperature 1 and no pruning"
        )
    if min_p and not capabilities.min_p:
        raise ValueError("engine: expected min_p for vocabulary pruning, this one has none")
    if tree and not capabilities.tree:
        raise ValueError("engine: expected one that grows trees (rollout.tree), this one does not")


def truncate_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of the distribution to sample from.

    Args:
        logits: [N, V] float.
        sampling: temperature > 0, then top_k, top_p and min_p, each on what the others see as the
            full distribution; the most probable token always stays.

    Returns:
        [N, V] fp32 log-probabilities in nats, -inf outside the kept set.
    """
    logp = (logits.float() / sampling.temperature).log_softmax(-1)
    keep = None
    if sampling.min_p > 0:
        keep = logp >= logp.amax(-1, keepdim=True) + math.log(sampling.min_p)
    if 0 < sampling.top_k < logp.shape[-1]:
        top = logp >= logp.topk(sampling.top_k).values[:, -1:]
        keep = top if keep is None else keep & top
    if sampling.top_p < 1:
        ordered, order = logp.exp().sort(-1, descending=True)
        inside = ordered.cumsum(-1) - ordered < sampling.top_p
        top = torch.zeros_like(inside).scatter(-1, order, inside)
        keep = top if keep is None else keep & top
    if keep is None:
        return logp
    return logp.masked_fill(~keep, -torch.inf).log_softmax(-1)
