"""Figures of scored answers to problems: pass@k, the majority vote, and by what makes them hard.

Answers are compared for the vote as texts: what follows the task's `answer_after`, or the whole
completion, without the space around it; an answer without that text does not vote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .collect import ScoredGroup
from .pass_at_k import SUCCESS, majority_vote, mean_over_problems, pass_at_k
from .tasks import Problem

DIFFERENT = 8  # values of a difficulty that are told apart; more are cut into ranges
RANGES = 4


def evaluation_result(
    groups: Sequence[ScoredGroup] | Sequence[TextGroup], ks: Sequence[int], task: Any
) -> dict[str, Any]:
    """Figures of scored answers.

    Args:
        groups: one per problem.
        ks: of pass@k.
        task: gives the text before an answer, as `answer_after`.

    Returns:
        `results` (title -> value, standard error, problems), `by_difficulty`, `lost`, and
        `per_problem`.
    """
    problems = [_problem(group, task) for group in groups]
    scored = [problem for problem in problems if problem["answers"]]
    results = {}
    for k in ks:
        enough = [p for p in scored if p["answers"] >= k]
        values = [pass_at_k(p["answers"], p["successes"], k) for p in enough]
        results[f"pass@{k}"] = mean_over_problems(values)
    results["majority vote"] = mean_over_problems([p["majority"] for p in scored])
    results["mean reward"] = mean_over_problems([p["reward"] for p in scored])
    lengths = [p["length"] for p in scored if p["length"] is not None]
    results["mean length (tokens)"] = mean_over_problems(lengths)
    return {
        "lost": sum(problem["lost"] for problem in problems),
        "results": {title: found._asdict() for title, found in results.items()},
        "by_difficulty": by_difficulty([g.problem.columns for g in groups], problems),
        "per_problem": problems,
    }


@dataclass(frozen=True)
class TextGroup:
    """Answers to a problem of which nobody knows the token ids.

    Args:
        problem: what was asked.
        completions: their texts without the stop text.
        rewards: one per answer; None where it was lost.
        mean_tokens: of all the answers; None: unknown.
    """

    problem: Problem
    completions: list[str]
    rewards: list[float | None]
    mean_tokens: float | None


def _problem(group: ScoredGroup | TextGroup, task: Any) -> dict[str, Any]:
    kept = [i for i, reward in enumerate(group.rewards) if reward is not None]
    rewards = [group.rewards[i] for i in kept]
    successes = [reward > SUCCESS for reward in rewards]
    answers = [final_answer(group.completions[i], task) for i in kept]
    count = len(kept)
    length = None
    if isinstance(group, TextGroup):
        length = group.mean_tokens
    elif count:
        length = sum(len(group.samples[i].token_ids) for i in kept) / count
    return {
        "id": group.problem.id,
        "answers": count,
        "successes": sum(successes),
        "lost": len(group.rewards) - count,
        "different_answers": len({answer for answer in answers if answer is not None}),
        "majority": majority_vote(answers, successes) if count else None,
        "reward": sum(rewards) / count if count else None,
        "length": length,
    }


def final_answer(completion: str, task: Any) -> str | None:
    """What of a completion votes.

    Args:
        completion: its text.
        task: with `answer_after`, the answer is what follows the last occurrence of that text;
            else it is the whole completion.

    Returns:
        The answer without the space around it; None where there is none.
    """
    marker = getattr(task, "answer_after", "")
    if marker and marker not in completion:
        return None
    answer = completion.rpartition(marker)[2] if marker else completion
    return answer.strip() or None


def by_difficulty(
    columns: Sequence[dict[str, Any]], problems: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Pass@1 by what makes problems hard.

    Args:
        columns: of each problem: `entry.metadata.difficulty` as reasoning-gym has it, whose names
            are looked up in the metadata for this problem's own value; or a `difficulty` or `level`
            of its own.
        problems: figures of each.

    Returns:
        name -> value -> pass@1 with its error; numbers of many values are cut into ranges at their
        quartiles; what is the same for all problems is left out.
    """
    found: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for own, problem in zip(columns, problems, strict=True):
        if problem["answers"]:
            for name, value in difficulties(own).items():
                found.setdefault(name, []).append((value, problem))
    made = {}
    for name, pairs in found.items():
        labels = _labels([value for value, _ in pairs])
        groups: dict[str, list[float]] = {label: [] for label in sorted(set(labels), key=_order)}
        for label, (_, p) in zip(labels, pairs, strict=True):
            groups[label].append(p["successes"] / p["answers"])
        if len(groups) > 1:
            made[name] = {g: mean_over_problems(v)._asdict() for g, v in groups.items()}
    return made


def difficulties(columns: dict[str, Any]) -> dict[str, Any]:
    """Plain values by which a problem is harder or easier.

    Args:
        columns: of the problem.

    Returns:
        name -> number or text.
    """
    entry = columns.get("entry")
    metadata = entry.get("metadata") if isinstance(entry, dict) else None
    stated = metadata.get("difficulty") if isinstance(metadata, dict) else None
    if isinstance(stated, dict):  # the generator's ranges; the problem's own value has their name
        stated = {name: metadata.get(name, value) for name, value in stated.items()}
    elif stated is not None:
        stated = {"difficulty": stated}
    else:
        stated = {n: columns[n] for n in ("difficulty", "level") if n in columns}
    return {n: v for n, v in stated.items() if isinstance(v, int | float | str)}


def _labels(values: list[Any]) -> list[str]:
    """A text for each value; ranges where there are many numbers."""
    numbers = [v for v in values if isinstance(v, int | float)]
    different = sorted(set(numbers))
    if len(numbers) < len(values) or len(different) <= DIFFERENT:
        return [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    ordered = sorted(numbers)
    edges = sorted({ordered[len(ordered) * i // RANGES] for i in range(1, RANGES)})
    bins = [
        [v for v in different if sum(v >= e for e in edges) == i] for i in range(len(edges) + 1)
    ]
    texts = [f"{b[0]:g} to {b[-1]:g}" if b else "" for b in bins]
    return [texts[sum(v >= e for e in edges)] for v in values]


def _order(label: str) -> tuple[int, float, str]:
    number = re.match(r"-?\d+(\.\d+)?(e[+-]?\d+)?", label)
    return (0, float(number[0]), label) if number else (1, 0.0, label)
