"""`trimtab-rl eval --server URL`: a server's model on the problems of a run, or of a recipe.

    trimtab-rl eval RUN --server http://host:8000/v1 --model NAME
    trimtab-rl eval --config RECIPE --server https://host/v1 --model NAME --api_key_env VAR --chat

Problems, rewards and figures are those of `trimtab-rl eval RUN`; the answers are the server's, by
its own tokenizer, and end at the task's stop text or where the server ends them. It samples from
its plain distribution, whatever pruning the run trains with. Reward functions get None for
`completion_ids`: one that reads them loses its rewards, which is counted and said.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answer_figures import TextGroup, evaluation_result
from .cli import make_parser, parse
from .collect import as_prompt
from .evaluation_output import store_evaluation
from .pass_at_k import SUCCESS
from .recording import RunFolder
from .rewards import RewardWorker
from .seeds import stable_seed
from .server_client import ServerFailed, by_threads
from .tasks import Prompt, Task
from .text_server import Answers, ServerRefused, TextServer

if TYPE_CHECKING:
    from .evaluate_run import Options


@dataclass(frozen=True)
class ServerOptions:
    """A server that answers instead of a run's policy.

    Args:
        server: address of an OpenAI-compatible API, `http://host:port/v1`; null: none.
        model: a name that the server knows; null takes the only one that it serves.
        api_key_env: environment variable that holds the key; null sends none.
        chat: asks /v1/chat/completions, a prompt's messages, or its text as a user's one; else
            /v1/completions, which takes texts only.
        config: a recipe, instead of a run, that gives task and sampling.
        max_tokens: most tokens of an answer; null takes the run's.
        temperature: of sampling; null takes the run's.
        timeout: seconds for an answer.
        retries: times that a request is asked again after HTTP 429 or 5xx or a lost connection.
        parallel: requests at a time.

    Raises:
        ValueError: a value outside its range, or an option without a server; names the option.
    """

    server: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    chat: bool = False
    config: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    timeout: float = 120.0
    retries: int = 5
    parallel: int = 8

    def __post_init__(self) -> None:
        if self.server is None:
            for field in fields(self):
                if getattr(self, field.name) != field.default:
                    raise ValueError(f"--{field.name}: expected with --server only")
        for name, holds, expected in (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "a count >= 1"),
            ("temperature", self.temperature is None or self.temperature >= 0, "a number >= 0"),
            ("timeout", self.timeout > 0, "seconds > 0"),
            ("retries", self.retries >= 0, "a count >= 0"),
            ("parallel", self.parallel >= 1, "a count >= 1"),
        ):
            if not holds:
                raise ValueError(f"--{name}: expected {expected}, got {getattr(self, name)}")

    def key(self) -> str:
        """The key, or nothing; never the name in an error, in whose place a key may stand."""
        if self.api_key_env is None:
            return ""
        known = re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env)
        if not known or not os.environ.get(self.api_key_env):
            raise ValueError(
                "--api_key_env: expected the name of an environment variable that holds the key, "
                "got one that is not set (it is not shown: it may be the key itself)"
            )
        return os.environ[self.api_key_env].strip()


class ServerEvaluation:
    """A server that is there, and the problems it will be asked.

    Args:
        options: what is asked of the evaluation.
        server: who answers.

    Raises:
        ConnectionError: the server does not answer.
        ValueError: an option is wrong, the task's rollouts go in turns, or the server refuses.
    """

    def __init__(self, options: Options, server: ServerOptions) -> None:
        given = [name for name in (options.run, server.config) if name is not None]
        if len(given) != 1:
            raise ValueError(
                f"eval: expected a run folder or --config RECIPE with --server, got "
                f"{'both' if given else 'neither'}"
            )
        if options.checkpoint is not None:
            raise ValueError("--checkpoint: expected none with --server, whose weights are its own")
        self.options, self.asked = options, server
        self.client = TextServer(
            server.server or "",
            key=server.key(),
            chat=server.chat,
            timeout=server.timeout,
            retries=server.retries,
        )
        self.folder = Path.cwd()
        if options.run is not None:
            self.folder = RunFolder.existing(options.run).path.resolve()
        source = ["--resume", options.run] if options.run else ["--config", server.config or ""]
        self.config, *_ = parse(make_parser(), source)
        task = self.config.task
        if not isinstance(task, Task):
            raise ValueError(f"task: expected a Task, got {type(task).__name__}")
        if task.in_turns:
            raise ValueError("eval: expected a task without tool or environment with --server")
        rollout = self.config.rollout
        given_temperature = server.temperature
        self.sampling: dict[str, Any] = {
            "max_tokens": server.max_tokens or rollout.max_tokens,
            "temperature": (
                rollout.temperature if given_temperature is None else given_temperature
            ),
            "stop": task.stop,
        }
        self.problems = options.problems or self.config.evaluation.problems or 128
        self.client.choose(server.model)

    def run(self) -> None:
        """Asks, prints the figures, and writes them into the run's folder, or this one.

        Raises:
            SystemExit: 3, after a line that says why, where the server failed.
        """
        options, name = self.options, f"{self.client.model} at {self.client.url}"
        print(
            f"{name}: {options.samples} answers to each of {self.problems} "
            f"{options.split} problems",
            flush=True,
        )
        started = time.time()
        rollout = self.config.rollout
        function = self.config.task.reward_function()
        assert function is not None  # only of tasks whose rollouts go in turns
        worker = RewardWorker(function, rollout.reward_timeout, rollout.reward_memory_mb)
        try:
            groups, cut = self._groups(worker)
        except (ConnectionError, ServerFailed, ServerRefused) as error:
            line = " ".join(f"{error}".split())
            print(f"trimtab-rl: stopped: {line}", file=sys.stderr, flush=True)
            raise SystemExit(3) from None
        finally:
            worker.close()
        asked = asdict(self.asked)
        asked |= {"server": self.client.url, "model": self.client.model} | self.sampling
        stored = {
            "policy": name,
            "update": None,
            "split": options.split,
            "options": asdict(options) | {"problems": self.problems, "k": options.ks()},
            "server": asked,
            "cut": cut,
            "seconds": round(time.time() - started, 2),
            "success": f"reward > {SUCCESS}",
            **evaluation_result(groups, options.ks(), self.config.task),
        }
        store_evaluation(stored, self.folder)

    def _groups(self, worker: RewardWorker) -> tuple[list[TextGroup], int]:
        """Scored answers to each problem, and how many were cut at the limit of tokens."""
        groups: list[TextGroup] = []
        cut = 0
        told = time.monotonic()
        chunk = max(32, 4 * self.asked.parallel)
        for first in range(0, self.problems, chunk):
            numbers = range(first, min(first + chunk, self.problems))
            problems = [self.config.task.problem(self.options.split, n) for n in numbers]
            jobs = [(p.prompt, number) for p, number in zip(problems, numbers, strict=True)]
            found = by_threads(self._answers, jobs, min(self.asked.parallel, len(jobs)))
            rows = [(p, text) for p, a in zip(problems, found, strict=True) for text in a.texts]
            scored = worker.score(
                [problem.prompt for problem, _ in rows],
                [as_prompt(problem.prompt, text) for problem, text in rows],
                [None] * len(rows),
                [problem.columns for problem, _ in rows],
            )
            rest = iter(scored.rewards)
            for problem, answers in zip(problems, found, strict=True):
                count = len(answers.texts)
                mean = None if answers.tokens is None else answers.tokens / count
                rewards = [next(rest) for _ in range(count)]
                groups.append(TextGroup(problem, answers.texts, rewards, mean))
                cut += answers.cut
            if time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"{len(groups)}/{self.problems} problems", flush=True)
        return groups, cut

    def _answers(self, prompt: Prompt, number: int) -> Answers:
        seed = self.config.seed if self.options.seed is None else self.options.seed
        return self.client.answers(
            prompt,
            n=self.options.samples,
            seed=stable_seed(seed, self.options.split, number),
            **self.sampling,
        )
