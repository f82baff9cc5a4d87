"""Sums with a calculator: `chain_sum` where a rollout may call a tool in the middle of its answer.

The policy writes `<`, an expression and `>`; the tool replies its value; the policy goes on:

    direct    #21
    called    <12+9>21#21          (21 behind > is the tool's)

Larger numbers than a small model adds by itself, so that calling pays, which RL finds out.
"""

from __future__ import annotations

from typing import Any

from .chain_sum import CHARACTERS, Styles, draw_style, question_text, worked_steps
from .tasks import Problem, ReasoningGymTask, Split
from .tools import ToolUse

STREAMS = ("train", "heldout", "documents")
EXAMPLES_SEED = 2_000


class CalculatorTask(ReasoningGymTask):
    """Few-shot sums whose answers may call a calculator, scored by reasoning-gym.

    Args:
        min_terms: least number of terms of a sum.
        max_terms: greatest number of terms of a sum.
        max_digits: digits of a term.
        shots: examples before the question, replies included.
        called: share of the examples that call the tool, in [0, 1].
        max_calls: calls of a rollout.
        seed: of the training problems and of their examples.

    Raises:
        ValueError: reasoning-gym refuses the sizes, shots < 0, or called is no share.
    """

    def __init__(
        self,
        min_terms: int = 2,
        max_terms: int = 3,
        max_digits: int = 2,
        shots: int = 6,
        called: float = 0.2,
        max_calls: int = 4,
        seed: int = 0,
    ) -> None:
        if shots < 0:
            raise ValueError(f"shots: expected a count >= 0, got {shots}")
        params = {"min_terms": min_terms, "max_terms": max_terms, "min_digits": 1}
        params["max_digits"] = max_digits
        tool = ToolUse(start="<", end=">", max_calls=max_calls, max_reply_tokens=6)
        super().__init__("chain_sum", params, answer_after="#", stop="\n", seed=seed, tool=tool)
        self.shots, self.called = shots, Styles(worked=called, checked=0.0)
        self._examples = {
            stream: ReasoningGymTask("chain_sum", params, seed=seed + EXAMPLES_SEED * (i + 1))
            for i, stream in enumerate(STREAMS)
        }

    def problem(self, split: Split, index: int) -> Problem:
        """Examples, with their calls and replies, then the open question."""
        entry = self.entry(split, index)
        shots = self._shots(split, index, self.shots, self.called)
        prompt = "".join(text for pair in shots for text in pair) + question_text(entry)
        return Problem(f"{split}/{index}", prompt, {"entry": entry})

    def document(self, index: int, styles: Styles) -> list[tuple[str, str]]:
        """(not learned, learned) texts of one supervised document; replies are not learned."""
        return self._shots("documents", index, self.shots + 1, styles)

    def characters(self) -> str:
        """Every character a document can hold, for the tokenizer."""
        return CHARACTERS

    def label(self, completion: str) -> str:
        """`called` for an answer that called the tool, else `direct`."""
        return "called" if "<" in completion else "direct"

    def _shots(self, stream: str, index: int, count: int, styles: Styles) -> list[tuple[str, str]]:
        drawn = draw_style(f"{self.seed}/{stream}/{index}", styles)
        first = index * (self.shots + 1)
        pairs: list[tuple[str, str]] = []
        for i in range(count):
            entry = self._examples[stream].entry("train", first + i)
            pairs += _answered(entry, called=next(drawn) != "direct")
        return pairs


def _answered(entry: dict[str, Any], *, called: bool) -> list[tuple[str, str]]:
    """The question and its answer, cut where the tool speaks."""
    answer = f"#{entry['answer']}\n"
    if not called:
        return [(question_text(entry), answer)]
    pairs, told = [], question_text(entry)
    for expression, value in worked_steps(entry):
        pairs.append((told, f"<{expression}>"))
        told = str(value)
    return [*pairs, (told, answer)]
