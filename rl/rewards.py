"""Reward functions, called in a process of their own so that one bad answer costs one rollout.

A function that raises, hangs or kills its process loses that rollout only: its reward is None,
which the loop counts, logs and excludes. This module imports neither torch nor the host libraries,
so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

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
    """Calls a reward function in one child process, rollout by rollout, each within a time limit.

    Args:
        function: picklable; called with lists of length one:
            `function(prompts=[...], completions=[...], completion_ids=[...], **columns)`.
        timeout: seconds one rollout may take before its worker is replaced, > 0.

    Raises:
        ValueError: timeout is not positive, or the function cannot be sent to another process.
    """

    def __init__(self, function: RewardFunction, timeout: float = 10.0) -> None:
        if not timeout > 0:
            raise ValueError(f"reward_timeout: expected seconds > 0, got {timeout}")
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"reward: {function!r} cannot reach its process: {error}") from error
        self.function, self.timeout = function, timeout
        # spawn: a fork would copy the trainer's threads and locks
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None
        self._complained = False

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Sequence[dict[str, Any]],
    ) -> Scored:
        """Rewards of a batch, in order.

        Args:
            prompts: prompt texts, one per rollout.
            completions: completion texts.
            completion_ids: completion token ids.
            columns: the problem's columns, one dict per rollout.

        Returns:
            Scored: a finite float or None for each rollout, and how many failed and timed out.
        """
        rewards: list[float | None] = []
        errors = timeouts = 0
        for prompt, text, ids, extra in zip(
            prompts, completions, completion_ids, columns, strict=True
        ):
            call = dict(prompts=[prompt], completions=[text], completion_ids=[list(ids)])
            call.update({key: [value] for key, value in extra.items()})
            kind, value = self._call(call)
            errors += kind == "error"
            timeouts += kind == "timeout"
            if kind in ("error", "timeout") and not self._complained:
                self._complained = True
                logger.warning("a reward is lost and its rollout excluded (said once): %s", value)
            rewards.append(value if kind == "reward" else None)
        return Scored(rewards, errors, timeouts)

    def close(self) -> None:
        """Ends the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _call(self, call: dict[str, Any]) -> tuple[str, Any]:
        if self._process is None:
            self._start()
        try:
            self._pipe.send(call)
            if self._pipe.poll(self.timeout):
                return self._pipe.recv()
        except (EOFError, OSError) as died:
            self.close()
            return "error", f"the reward process died ({died or 'EOF'})"
        self.close()
        return "timeout", f"no answer within {self.timeout:g} s"

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(self.function, theirs), name="trimtab-reward", daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._pipe.poll(60):  # importing the user's module is not the first rollout's fault
            self.close()
            raise RuntimeError("the reward process did not start within 60 s")
        try:
            self._pipe.recv()
        except EOFError:
            self.close()
            raise RuntimeError(
                "the reward process died as it started; why, it has printed"
            ) from None


def _serve(function: RewardFunction, pipe: Any) -> None:
    # Ctrl-C is for the trainer, which ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send("ready")
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        try:
            result = function(**call)
            if inspect.isawaitable(result):
                raise TypeError("asynchronous reward functions are not supported")
            if isinstance(result, str | bytes) or not isinstance(result, Iterable):
                raise TypeError(f"expected a list of one number or None, got {result!r:.60}")
            (reward,) = result
            if reward is None:
                answer = ("none", None)
            elif math.isfinite(value := float(reward)):
                answer = ("reward", value)
            else:
                answer = ("error", f"the reward is {reward}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename}:{where.lineno}"
            answer = ("error", f"{place}: {type(error).__name__}: {str(error)[:500]}")
        pipe.send(answer)
