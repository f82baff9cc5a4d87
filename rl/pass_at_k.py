"""Figures of K answers to each problem: pass@k, majority vote, and their standard errors.

An answer succeeds when its reward is above 0.5. Answers whose reward was lost count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

SUCCESS = 0.5  # a reward above it is a success


class Estimate(NamedTuple):
    """A mean over problems.

    Args:
        value: the mean; None without a problem.
        standard_error: of the mean, problems as the sample; None with fewer than two.
        problems: that it is over.
    """

    value: float | None
    standard_error: float | None
    problems: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k answers, drawn without repetition from n, is one of c successes.

    Args:
        n: answers, >= k.
        c: successes among them, in [0, n].
        k: answers drawn, >= 1.

    Returns:
        1 - C(n - c, k) / C(n, k), the unbiased estimator.

    Raises:
        ValueError: a count outside its range.

    Source:
        arXiv 2107.03374, equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"expected 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers: Sequence[Hashable | None], successes: Sequence[bool]) -> float:
    """Whether the most frequent answer is right.

    Args:
        answers: final answer of each rollout; None does not vote.
        successes: whether each rollout succeeded.

    Returns:
        Share of successes among the rollouts with the most frequent answer; where several are
        equally frequent, the mean over these answers (as if one were drawn); 0 without any vote.
    """
    votes: dict[Hashable, list[bool]] = {}
    for answer, success in zip(answers, successes, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(success)
    most = max(map(len, votes.values()), default=0)
    winners = [sum(found) / most for found in votes.values() if len(found) == most]
    return sum(winners) / len(winners) if winners else 0.0


def mean_over_problems(values: Sequence[float]) -> Estimate:
    """Mean of one value a problem, with its standard error.

    Args:
        values: of the problems.

    Returns:
        An Estimate; its error is the sample's standard deviation over the root of the count.
    """
    count = len(values)
    if not count:
        return Estimate(None, None, 0)
    mean = sum(values) / count
    if count < 2:
        return Estimate(mean, None, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)
