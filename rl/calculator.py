"""Sums with a calculator: `chain_sum` where a rollout may call a tool in the middle of its answer.

The policy writes `<`, an expression and `>`; the tool replies its value; the policy goes on:

    direct    #21
    called    <12+9>21#21          (21 behind > is the tool's)

Larger numbers than a small model adds by itself, so that calling pays, which RL finds out.
"""

from __future__ import annotations

from typing import Any

from .chain_sum import ChainSumTask, Styles, question_text, worked_steps
from .tools import ToolUse


class CalculatorTask(ChainSumTask):
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
        styles = Styles(worked=called, checked=0.0)
        super().__init__(min_terms, max_terms, shots, styles, seed, max_digits)
        self.tool = ToolUse(start="<", end=">", max_calls=max_calls, max_reply_tokens=6)

    def label(self, completion: str) -> str:
        """`called` for an answer that called the tool, else `direct`."""
        return "called" if "<" in completion else "direct"

    def _answered(self, entry: dict[str, Any], style: str) -> list[tuple[str, str]]:
        """The question and its answer, cut where the tool speaks: replies are not learned."""
        if style == "direct":
            return super()._answered(entry, style)
        pairs, told = [], question_text(entry)
        for expression, value in worked_steps(entry):
            pairs.append((told, f"<{expression}>"))
            told = str(value)
        return [*pairs, (told, f"#{entry['answer']}\n")]
