"""The process in which a `verifiers` environment lives, seen from the trainer."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("verifiers_worker.py")
END_SECONDS = 30.0
START_SECONDS = 300.0  # an environment may download its data as it loads


class EnvironmentDied(RuntimeError):
    """The environment's process is gone, or gave no answer in time and was ended."""


class VerifiersProcess:
    """Loads an environment in a process of its own and asks it, one question at a time.

    Args:
        env_id: name of the environment's module, as `verifiers.load_environment` takes it.
        env_args: arguments of its `load_environment`.
        python: interpreter of the environment that has `verifiers`; None: this one.
        timeout: seconds that the environment may take between two turns, and for each group
            to score all of them.
    """

    def __init__(
        self, env_id: str, env_args: dict[str, Any], python: str | None, timeout: float
    ) -> None:
        self.env_id, self.env_args, self.timeout = env_id, env_args, timeout
        self.asked_python, self.python = python, python or sys.executable
        self.sizes: dict[str, int] = {}
        self.compares_groups = False
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()

    def start(self) -> dict[str, int]:
        """Starts the process, unless it runs, and loads the environment.

        Returns:
            Number of problems of each split.

        Raises:
            ValueError: the interpreter does not start, has no verifiers of the right interface, or
                the environment does not load.
        """
        with self._lock:
            if self._process is not None:
                if self._process.poll() is None:
                    return self.sizes
                self.close()  # it died between two games
            try:
                self._process = subprocess.Popen(
                    [self.python, str(SCRIPT)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"} | os.environ,
                    start_new_session=True,  # Ctrl-C is for the trainer, which ends this
                )
            except OSError as error:
                raise ValueError(f"task.python: {self.python} does not start: {error}") from error
            try:
                loaded = self._exchange(
                    {"do": "load", "id": self.env_id, "args": self.env_args}, START_SECONDS
                )
            except EnvironmentDied as died:
                raise ValueError(f"task: environment {self.env_id!r}: {died}") from died
            if "error" in loaded:
                self.close()
                raise ValueError(f"task: environment {self.env_id!r}: {loaded['error']}")
            self.sizes = {split: loaded[split] for split in ("train", "heldout")}
            self.compares_groups = loaded["compares_groups"]
            return self.sizes

    def row(self, split: str, index: int) -> dict[str, Any]:
        """Prompt, tools and columns of a problem.

        Args:
            split: `train` or `heldout`.
            index: of its row.

        Raises:
            ValueError: the row cannot be a prompt.
            EnvironmentDied: it did, twice.
        """
        asked = {"do": "row", "split": split, "index": index}
        with self._lock:
            self.start()
            try:
                answer = self._exchange(asked, self.timeout)
            except EnvironmentDied:  # perhaps long ago, between two games
                self.start()
                answer = self._exchange(asked, self.timeout)
        if "error" in answer:
            raise ValueError(f"task: environment {self.env_id!r}: {answer['error']}")
        return answer

    def play(self, groups: list[dict[str, Any]]) -> Game:
        """Begins rollouts; nothing else may be asked until their game has ended.

        Args:
            groups: `split`, `index` and `n` of each, and the `prompt` and `tools` that the policy
                has read.
        """
        self._lock.acquire()
        return Game(self, groups)

    def end(self) -> None:
        """Lets an environment that is in no game give back what it holds; ends the process."""
        if self._lock.acquire(blocking=False):
            try:
                if self._process is not None:
                    with contextlib.suppress(EnvironmentDied):
                        self._exchange({"do": "end"}, END_SECONDS)
            finally:
                self._lock.release()
        self.close()

    def close(self) -> None:
        """Ends the process and all that it has started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()

    def _exchange(self, asked: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        why = "it died; why, it has printed"
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            answers = select.poll()  # select has no room for file numbers above 1023
            answers.register(process.stdout, select.POLLIN)
            line, deadline = b"", time.monotonic() + seconds
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not answers.poll(math.ceil(left * 1000)):
                    why = f"no answer within {seconds:g} s"
                    break
                part = os.read(process.stdout.fileno(), 1 << 20)
                if not part:
                    break
                line += part
            else:
                return json.loads(line)
        except OSError:
            pass
        except BaseException:  # Ctrl-C: an answer that comes later would be taken for another's
            self.close()
            raise
        self.close()
        raise EnvironmentDied(why)


class Game:
    """Rollouts that an environment plays.

    Args:
        process: locked until the end.
        groups: as `play` takes them.
    """

    GRACE = 30.0  # beyond its own time limit, for one that blocks its process

    def __init__(self, process: VerifiersProcess, groups: list[dict[str, Any]]) -> None:
        self.process, self.groups = process, groups

    def __enter__(self) -> Game:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.process.close()  # it waits for turns that nobody will make
        self.process._lock.release()

    def start(self) -> dict[str, Any]:
        """Starts the process if it does not run, and asks for the first turns."""
        self.process.start()
        return self._ask({"do": "play", "groups": self.groups, "timeout": self.process.timeout})

    def reply(self, replies: list[dict[str, Any]]) -> dict[str, Any]:
        """What follows the policy's turns: `turns`, or `rollouts` at the end."""
        return self._ask({"replies": replies})

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        # at the end it scores all groups, which has this many times as long
        seconds = self.process.timeout * (1 + len(self.groups)) + self.GRACE
        answer = self.process._exchange(asked, seconds)
        if "error" in answer:
            self.process.close()
            raise EnvironmentDied(answer["error"])
        return answer
