"""Where problems come from and how a completion is scored.

A task turns an index into a `Problem` (the same index always gives the same problem, so a resumed
run needs no data state) and names the reward function that a `RewardWorker` calls in its process.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .rewards import RewardFunction, import_function, reasoning_gym_reward
from .tools import ToolUse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .turns import Turns

logger = logging.getLogger(__name__)

Split = Literal["train", "heldout"]
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    Args:
        id: stable name of the problem, unique within its split.
        prompt: the text the policy continues, or messages (`role` and `content`), which the
            tokenizer's chat template makes a text of; tokenised once, never re-tokenised.
        columns: whatever the reward function needs besides the completion (JSON-like values).
        tools: functions that a prompt of messages offers, as JSON schemas for the chat template.
    """

    id: str
    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None


class Task(ABC):
    """What the loop asks of a task.

    `stop` is the text whose single token ends an answer, beside the tokenizer's end-of-sequence
    token; empty means that token alone. `tool` is what a rollout may call; None: nothing. A task
    may also have `label(completion) -> str`: the evaluation then reports each label's share and
    accuracy.
    """

    stop: str = ""
    tool: ToolUse | None = None

    @property
    def in_turns(self) -> bool:
        """Whether rollouts may hold what the policy did not write."""
        return self.tool is not None

    def turns(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
    ) -> Turns | None:
        """What makes the task's rollouts of the policy's turns; None: a rollout is one turn.

        Args:
            tokenizer: of the policy.
            stop_token_ids: that end a rollout.
        """
        from .turns import ToolTurns  # it imports transformers, which not all users of tasks need

        return None if self.tool is None else ToolTurns(self.tool, tokenizer, stop_token_ids)

    @abstractmethod
    def problem(self, split: Split, index: int) -> Problem:
        """Problem number `index` >= 0 of a split; a pure function of its arguments."""

    @abstractmethod
    def reward_function(self) -> RewardFunction | None:
        """A picklable function `(prompts, completions, completion_ids, **columns) -> rewards`.

        None: what `turns` makes comes with its reward.
        """


class ReasoningGymTask(Task):
    """Problems and scores of one reasoning-gym generator.

    Args:
        name: the generator's name, e.g. `chain_sum` (`reasoning_gym.factory.DATASETS` lists them).
        params: its own parameters, e.g. `{min_terms: 2, max_terms: 5}`.
        template: prompt text; `{question}` is replaced by the generator's question.
        answer_after: the answer is what follows the last occurrence of this text in the completion;
            empty takes the whole completion. A completion without it scores 0.
        threshold: scores of at least this are 1, others 0 (some generators console with a little);
            null keeps the generator's score in [0, 1].
        stop: text of the token that ends an answer; empty relies on the end-of-sequence token.
        seed: of the training problems; held-out problems come from another seed.
        tool: what rollouts may call, and how; null: nothing. The answer is looked for in what the
            policy wrote and what it got in reply.
        shots: solved examples before each question, drawn anew for each problem.
        shot: text of one, with `{question}` and `{answer}`; they stand before the template's text.

    Raises:
        ValueError: no such generator (with the nearest names), or it refuses a parameter; or texts
            without what they must hold.
    """

    def __init__(
        self,
        name: str,
        params: dict[str, Any] | None = None,
        template: str = "{question}\n",
        answer_after: str = "",
        threshold: float | None = 0.99,
        stop: str = "",
        seed: int = 0,
        tool: ToolUse | None = None,
        shots: int = 0,
        shot: str = "{question}\n{answer}\n",
    ) -> None:
        if "{question}" not in template:
            raise ValueError(f"template: expected a text with {{question}}, got {template!r}")
        if shots < 0:
            raise ValueError(f"shots: expected a count >= 0, got {shots}")
        if "{question}" not in shot or "{answer}" not in shot:
            raise ValueError(
                f"shot: expected a text with {{question}} and {{answer}}, got {shot!r}"
            )
        self.name, self.params, self.template = name, dict(params or {}), template
        self.answer_after, self.threshold = answer_after, threshold
        self.stop, self.seed, self.tool = stop, seed, tool
        self.shots, self.shot = shots, shot
        self._sets = {
            stream: _reasoning_gym_set(name, self.params, seed * SEED_STRIDE + offset)
            for stream, offset in STREAMS.items()
            if shots or not stream.endswith("shots")
        }

    def entry(self, split: Split, index: int) -> dict[str, Any]:
        """The generator's own entry number `index` (question, answer, metadata)."""
        return self._entry(split, index)

    def _entry(self, stream: str, index: int) -> dict[str, Any]:
        entries = self._sets[stream]
        index %= len(entries)
        state = random.getstate()
        random.seed(f"{self.seed}/{stream}/{index}")  # list_functions draws from the global one
        try:
            return entries[index]
        finally:
            random.setstate(state)

    def problem(self, split: Split, index: int) -> Problem:
        """Problem number `index` >= 0 of `train` or `heldout`."""
        entry = self.entry(split, index)
        prompt = self.template.replace("{question}", entry["question"])
        examples = "".join(self._examples_of(split, index, entry))
        return Problem(f"{split}/{index}", examples + prompt, {"entry": entry})

    def _examples_of(self, split: Split, index: int, entry: dict[str, Any]) -> list[str]:
        """Solved examples before an entry, none of which asks the same."""
        candidates = 2 * self.shots  # where a generator knows few questions, some are the same
        drawn = [self._entry(f"{split} shots", index * candidates + i) for i in range(candidates)]
        others = [example for example in drawn if example["question"] != entry["question"]]
        return [
            self.shot.replace("{question}", e["question"]).replace("{answer}", str(e["answer"]))
            for e in others[: self.shots]
        ]

    def reward_function(self) -> RewardFunction:
        """The generator's own `score_answer`, thresholded."""
        return reasoning_gym_reward(self.name, self.params, self.answer_after, self.threshold)


# reasoning-gym makes entry i from seed + i: neighbouring seeds would share all entries but one.
SEED_STRIDE = 4_000_037
HELDOUT_OFFSET = SEED_STRIDE // 2
STREAMS = {
    "train": 0,
    "heldout": HELDOUT_OFFSET,
    "train shots": SEED_STRIDE // 4,
    "heldout shots": HELDOUT_OFFSET + SEED_STRIDE // 4,
}
ENDLESS = 2**31 - 1  # reasoning-gym makes entry i from (seed, i) on demand, so a set has no cost,
# but for these, which prepare all their entries at once: they start over after so many.
PREPARED = dict.fromkeys(("acre", "gsm_symbolic", "list_functions", "word_ladder"), 2_000)


def _reasoning_gym_set(name: str, params: dict[str, Any], seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as missing:
        raise ValueError(
            "task: reasoning-gym is not installed; pip install 'trimtab[rl]'"
        ) from missing
    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(name, DATASETS, n=3)) or "none"
        raise ValueError(f"name: expected a reasoning-gym generator, got {name!r}; nearest: {near}")
    try:
        return reasoning_gym.create_dataset(
            name, seed=seed, size=PREPARED.get(name, ENDLESS), **params
        )
    except (TypeError, AssertionError, ValueError) as refused:
        raise ValueError(f"params: {name} refuses {params}: {refused}") from refused


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    answer: bool = True,
) -> str:
    """Messages as the policy reads them.

    Args:
        tokenizer: has a chat template.
        messages: of the conversation.
        tools: that it offers, or None.
        answer: go on to where the policy answers.

    Raises:
        ValueError: the template refuses them, as those do that know no system message or tool.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=answer
        )
    except TemplateError as refused:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"prompt: the policy's chat template refuses messages of {roles}: {refused}"
        ) from refused


class JsonLinesTask(Task):
    """Prompts from a JSON-lines file and a reward function named as `package.module:function`.

    Each line is an object with a `prompt`, a string or a list of messages (`role`, `content`) for
    the tokenizer's chat template; its other keys reach the reward function as columns. The function
    has TRL's form: `(prompts, completions, completion_ids, **columns)`, lists in, a list of float
    or None out (None excludes the rollout); to a prompt of messages belongs a completion of one.

    Args:
        path: the training file.
        reward: `package.module:function`, importable from where the run is started.
        heldout_path: file of held-out prompts; null holds out every tenth line of `path`.
        stop: text of the token that ends an answer; empty relies on the end-of-sequence token.
        tool: what rollouts may call, and how; null: nothing.

    Raises:
        ValueError: a file is missing, empty or malformed (with file and line), or the reward
            function cannot be imported.
    """

    def __init__(
        self,
        path: str,
        reward: str,
        heldout_path: str | None = None,
        stop: str = "",
        tool: ToolUse | None = None,
    ) -> None:
        self.stop, self.tool = stop, tool
        self._reward = import_function(reward)
        rows = read_json_lines(Path(path))
        if heldout_path is not None:
            heldout = read_json_lines(Path(heldout_path))
        else:
            heldout = rows[9::10]
            rows = [row for i, row in enumerate(rows) if i % 10 != 9]
            if not heldout:
                heldout = rows
                logger.warning(
                    "%s has fewer than ten lines: the held-out problems are the training ones", path
                )
        self._rows = {"train": rows, "heldout": heldout}

    def problem(self, split: Split, index: int) -> Problem:
        """Row `index` of a split, starting over at its end."""
        rows = self._rows[split]
        row = rows[index % len(rows)]
        columns = {key: value for key, value in row.items() if key != "prompt"}
        return Problem(f"{split}/{index % len(rows)}", row["prompt"], columns)

    def reward_function(self) -> RewardFunction:
        """The function named in the configuration."""
        return self._reward


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file of prompts.

    Args:
        path: the file; empty lines are skipped.

    Returns:
        One dict per line, each with a non-empty string or list of messages under `prompt`.

    Raises:
        ValueError: the file is missing or holds no prompt; or a line is malformed (file:line, why).
    """
    if not path.is_file():
        raise ValueError(f"path: expected a JSON-lines file, {path} does not exist")
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}:{number}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {path} is not UTF-8 text: {error}") from error
    if not rows:
        raise ValueError(f"path: {path} holds no prompt")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; expected one object a line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    prompt = row.get("prompt")
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
    )
    if not prompt or not (isinstance(prompt, str) or messages):
        raise ValueError(
            f"{where}: expected a non-empty string or messages with role and content under "
            f"'prompt', got {prompt!r:.100}"
        )
    for key in ("completions", "completion_ids", "prompts"):
        if key in row:
            raise ValueError(f"{where}: the key {key!r} is reserved for the reward function")
    return row
