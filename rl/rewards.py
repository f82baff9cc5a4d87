"""Reward functions, called in a process of their own so that one bad answer costs one rollout.

A function that raises, hangs or kills its process loses that rollout only: its reward is None,
which the loop counts, logs and excludes. This module imports neither torch nor the host libraries,
so that a worker starts in a fraction of a second. What keeps the function in bounds is in
`reward_process.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .reward_process import START_SECONDS, serve

logger = logging.getLogger(__name__)

_AHEAD = 16  # calls on their way

RewardFunction = Callable[..., Sequence[float | None]]


class Scored(NamedTuple):
    """Rewards of a batch, and how many were lost.

    rewards: one per rollout, in order: a finite float, or None where there is none.
    errors: rollouts whose function raised, died, or returned no single number.
    timeouts: rollouts whose function gave no answer in time.
    """

    rewards: list[float | None]
    errors: int
    timeouts: int


def import_function(name: str) -> RewardFunction:
    """The function that `package.module:function` names.

    Args:
        name: importable from the current directory or from site-packages.

    Returns:
        The function.

    Raises:
        ValueError: the name has another form, or nothing callable is found under it.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"reward: expected package.module:function, got {name!r}")
    here = os.getcwd()  # a console script does not search the directory it is started in
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module is the user's: anything may go wrong in it
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"reward: cannot import {name!r}: {why}") from error
    if not callable(function):
        raise ValueError(f"reward: {name!r} is a {type(function).__name__}, not a function")
    return function


def reasoning_gym_reward(
    name: str, params: dict[str, Any], answer_after: str, threshold: float | None
) -> RewardFunction:
    """Reasoning-gym's `score_answer` as a reward function.

    Args:
        name: the generator.
        params: its parameters.
        answer_after: text before the answer; a completion without it scores 0.
        threshold: scores of at least this give 1, others 0; None keeps the score.

    Returns:
        A picklable function of the form described in `RewardFunction`.
    """
    return functools.partial(_score_entries, name, repr(params), params, answer_after, threshold)


_generators: dict[tuple[str, str], Any] = {}


def _generator(name: str, key: str, params: dict[str, Any]) -> Any:
    """The generator, made once; parameters may be lists, so their text is the key."""
    if (name, key) not in _generators:
        import reasoning_gym

        _generators[name, key] = reasoning_gym.create_dataset(name, seed=0, size=1, **params)
    return _generators[name, key]


def _score_entries(
    name: str,
    key: str,
    params: dict[str, Any],
    answer_after: str,
    threshold: float | None,
    *,
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    entry: list[dict[str, Any]],
) -> list[float]:
    rewards = []
    for completion, problem in zip(completions, entry, strict=True):
        found = answer_after in completion
        answer = (
            completion.rpartition(answer_after)[2].strip() if answer_after else completion.strip()
        )
        score = (
            _generator(name, key, params).score_answer(answer, problem) if found and answer else 0.0
        )
        rewards.append(float(score if threshold is None else score >= threshold))
    return rewards


class RewardWorker:
    """Calls a reward function in a child process, rollout by rollout, each within limits.

    Args:
        function: picklable; called with lists of length one:
            `function(prompts=[...], completions=[...], completion_ids=[...], **columns)`.
        timeout: seconds one rollout may take before its process is replaced, > 0.
        memory_mb: MiB of memory that the function's process may allocate, with what its imports
            take; None: any. An allocation beyond raises MemoryError there.

    Raises:
        ValueError: timeout or memory_mb is not positive, memory cannot be limited on this system,
            or the function cannot be sent to another process.
    """

    def __init__(
        self, function: RewardFunction, timeout: float = 10.0, memory_mb: int | None = None
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"reward_timeout: expected seconds > 0, got {timeout}")
        if memory_mb is not None and not memory_mb > 0:
            raise ValueError(f"reward_memory_mb: expected MiB > 0 or null, got {memory_mb}")
        if memory_mb is not None and sys.platform != "linux":
            raise ValueError(f"reward_memory_mb: expected null on {sys.platform}, got {memory_mb}")
        try:
            self._pickled = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"reward: {function!r} cannot reach its process: {error}") from error
        self.function, self.timeout, self.memory_mb = function, timeout, memory_mb
        # spawn: a fork would copy the trainer's threads and locks
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None
        self._complained = False

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int] | None],
        columns: Sequence[dict[str, Any]],
    ) -> Scored:
        """Rewards of a batch, in order.

        Args:
            prompts: one per rollout, texts or lists of messages.
            completions: likewise.
            completion_ids: completion token ids; None where nobody knows them.
            columns: the problem's columns, one dict per rollout.

        Returns:
            Scored: a finite float or None for each rollout, and how many failed and timed out.
        """
        calls = []
        for prompt, text, ids, extra in zip(
            prompts, completions, completion_ids, columns, strict=True
        ):
            known = None if ids is None else list(ids)
            call = dict(prompts=[prompt], completions=[text], completion_ids=[known])
            calls.append(call | {key: [value] for key, value in extra.items()})
        answers: list[tuple[str, Any]] = []
        try:
            while len(answers) < len(calls):
                answers += self._answers(calls[len(answers) :])
        except BaseException:
            self.close()  # or the answers that are due would be taken for those of other calls
            raise
        for kind, value in answers:
            if kind in ("error", "timeout") and not self._complained:
                self._complained = True
                logger.warning("a reward is lost and its rollout excluded (said once): %s", value)
        rewards = [value if kind == "reward" else None for kind, value in answers]
        kinds = [kind for kind, _ in answers]
        return Scored(rewards, kinds.count("error"), kinds.count("timeout"))

    def close(self) -> None:
        """Ends the child process, and all that it has started."""
        if self._process is None:
            return
        self._pipe.close()  # it ends when it sees that, after the processes below it
        self._process.join(10)
        self._process.kill()
        self._process.join()
        self._process = None

    def _answers(self, calls: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
        """(kind, value) of the calls; of the first ones only, if the supervisor dies."""
        answers: list[tuple[str, Any]] = []
        if self._process is None:
            self._start()
        sent = 0
        try:
            while len(answers) < len(calls):
                # some ahead, so that the supervisor need not wait for this process
                while sent < min(len(answers) + _AHEAD, len(calls)):
                    self._pipe.send(calls[sent])
                    sent += 1
                # it keeps the time itself; this is for one that was stopped or killed
                if not self._pipe.poll(self.timeout + START_SECONDS + 10):
                    raise OSError("no answer")
                kind, value = self._pipe.recv()
                if kind == "failed":
                    raise RuntimeError(f"the reward process {value}")
                answers.append((kind, value))
        except (EOFError, OSError) as died:
            with contextlib.suppress(EOFError, OSError):  # what it answered before
                while len(answers) < sent and self._pipe.poll(0):
                    answers.append(self._pipe.recv())
            self.close()
            answers.append(("error", f"the reward's supervisor died ({died or 'EOF'})"))
        return answers

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=serve,
            args=(self._pickled, self.timeout, self.memory_mb, theirs),
            name="trimtab-reward",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        # importing the user's module is not the first rollout's fault
        if not self._pipe.poll(2 * START_SECONDS):
            self.close()
            raise RuntimeError(f"the reward process did not start within {2 * START_SECONDS} s")
        try:
            kind, why = self._pipe.recv()
        except EOFError:
            kind, why = "failed", "died as it started; why, it has printed"
        if kind == "failed":
            self.close()
            raise RuntimeError(f"the reward process {why}")
