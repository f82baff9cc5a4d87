"""The demo's task: reasoning-gym's `chain_sum` as few-shot documents for a small character model.

A document is worked examples `Q:7+5-3=\\nA:...\\n` followed by the question. Answers come in three
styles, so that a warmed-up policy can reason but rarely does, and rollouts differ in length:

    direct    #9
    worked    7+5=12;12-3=9#9
    checked   7+5=12;12-3=9;9+3=12;12-5=7#9       (worked, then undone back to the first term)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .tasks import Problem, ReasoningGymTask, Split

CHARACTERS = "0123456789+-=;#QA:\n <>"


@dataclass(frozen=True)
class Styles:
    """Shares of the answer styles in a document; what is left of 1 is direct.

    Args:
        worked: share of worked answers, in [0, 1].
        checked: share of worked and re-checked answers, in [0, 1].

    Raises:
        ValueError: a share is negative, or they sum to more than 1.
    """

    worked: float = 0.2
    checked: float = 0.1

    def __post_init__(self) -> None:
        if min(self.worked, self.checked) < 0 or self.worked + self.checked > 1:
            raise ValueError(
                f"styles: expected shares in [0, 1] with a sum of at most 1, got {self}"
            )


class ChainSumTask(ReasoningGymTask):
    """Few-shot sums of one-digit terms, scored by reasoning-gym.

    Args:
        min_terms: least number of terms of a sum.
        max_terms: greatest number of terms of a sum.
        shots: worked examples before the question; they are the long prefix a group shares.
        styles: answer styles of those examples.
        seed: of the training problems and of their examples.
        max_digits: digits of a term.

    Raises:
        ValueError: reasoning-gym refuses the sizes, shots < 0, or styles are no shares.
    """

    def __init__(
        self,
        min_terms: int = 2,
        max_terms: int = 5,
        shots: int = 8,
        styles: Styles = Styles(),
        seed: int = 0,
        max_digits: int = 1,
    ) -> None:
        if shots < 0:
            raise ValueError(f"shots: expected a count >= 0, got {shots}")
        params = {"min_terms": min_terms, "max_terms": max_terms, "min_digits": 1}
        params["max_digits"] = max_digits
        super().__init__("chain_sum", params, answer_after="#", stop="\n", seed=seed)
        self.shots, self.styles = shots, styles
        # streams of their own: no example repeats a problem that is asked, or a document
        self._examples = {
            stream: ReasoningGymTask("chain_sum", params, seed=seed + EXAMPLES_SEED * (i + 1))
            for i, stream in enumerate(("train", "heldout", "documents"))
        }

    def problem(self, split: Split, index: int) -> Problem:
        """Examples in mixed styles, then the open question."""
        entry = self.entry(split, index)
        shots = self._shots(split, index, self.shots, self.styles)
        prompt = "".join(question + answer for question, answer in shots) + question_text(entry)
        return Problem(f"{split}/{index}", prompt, {"entry": entry})

    def document(self, index: int, styles: Styles) -> list[tuple[str, str]]:
        """(not learned, learned) texts of one supervised document: `shots` + 1, all answered."""
        return self._shots("documents", index, self.shots + 1, styles)

    def characters(self) -> str:
        """Every character a document can hold, for the tokenizer."""
        return CHARACTERS

    def label(self, completion: str) -> str:
        """`worked` for an answer with calculation steps (checked or not), else `direct`."""
        return "worked" if "=" in completion else "direct"

    def _shots(self, stream: str, index: int, count: int, styles: Styles) -> list[tuple[str, str]]:
        drawn = draw_style(f"{self.seed}/{stream}/{index}", styles)
        first = index * (self.shots + 1)
        entries = [self._examples[stream].entry("train", first + i) for i in range(count)]
        return [pair for entry in entries for pair in self._answered(entry, next(drawn))]

    def _answered(self, entry: dict[str, Any], style: str) -> list[tuple[str, str]]:
        """(not learned, learned) texts of one example."""
        return [(question_text(entry), answer_text(entry, style))]


EXAMPLES_SEED = 1_000


def question_text(entry: dict[str, Any]) -> str:
    """`Q:7+5-3=\\nA:` of a chain_sum entry."""
    return f"Q:{entry['metadata']['expression'].replace(' ', '')}=\nA:"


def answer_text(entry: dict[str, Any], style: str) -> str:
    """The entry's answer in a style, ending in a newline.

    Args:
        entry: a chain_sum entry.
        style: `direct`, `worked` or `checked`.

    Returns:
        The text, e.g. `7+5=12;12-3=9#9\\n`.
    """
    if style == "direct":
        return f"#{entry['answer']}\n"
    steps = worked_steps(entry)
    if style == "checked":
        terms = terms_of(entry)
        undone = sum(terms)
        for term in reversed(terms[1:]):
            steps.append((_sum(undone, -term), undone - term))
            undone -= term
    return ";".join(f"{sum_}={value}" for sum_, value in steps) + f"#{entry['answer']}\n"


def terms_of(entry: dict[str, Any]) -> list[int]:
    """The terms of a chain_sum entry, with their signs."""
    expression = entry["metadata"]["expression"].replace(" ", "")
    return [int(term) for term in re.findall(r"[+-]?\d+", expression)]


def worked_steps(entry: dict[str, Any]) -> list[tuple[str, int]]:
    """The entry's calculation, (`7+5`, 12), (`12-3`, 9), .., term by term."""
    first, *rest = terms_of(entry)
    steps, total = [], first
    for term in rest:
        steps.append((_sum(total, term), total + term))
        total += term
    return steps


def _sum(total: int, term: int) -> str:
    return f"{total}{'+' if term >= 0 else '-'}{abs(term)}"


def draw_style(seed: str, styles: Styles) -> Iterator[str]:
    """Styles of the answers of one document, one after the other; a function of the arguments."""
    chooser = random.Random(seed)
    while True:
        u = chooser.random()
        if u < styles.worked:
            yield "worked"
        else:
            yield "checked" if u < styles.worked + styles.checked else "direct"
