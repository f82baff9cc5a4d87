"""`trimtab-rl eval RUN`: a run's policy on K answers to each problem, as the run samples them.

With `--server URL` a server's model answers instead (`evaluate_server.py`).

Reports pass@k, the majority vote, the mean reward and length, and pass@1 by difficulty, each with
its standard error over problems, and writes RUN/eval-*.json. A success is a reward above 0.5;
answers whose reward was lost are counted and left out. How answers are compared for the vote stands
in `answer_figures.py`.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from .answer_figures import evaluation_result
from .cli import make_parser, parse
from .collect import Collector, ScoredGroup
from .config import PolicyConfig, RLConfig
from .engines import make_engine
from .evaluate_server import ServerEvaluation, ServerOptions
from .evaluation_output import store_evaluation
from .health import Stopped
from .lora import add_adapters, base_view, fingerprint, is_adapter, refuse_other_base
from .machine import fastest_threads
from .pass_at_k import SUCCESS
from .recording import RunFolder
from .run import load_policy, updates_of
from .seeds import stable_seed
from .sharding import full_parameters
from .vllm_engine import refuse_missing_vllm


@dataclass(frozen=True)
class Options:
    """What is asked of the evaluation.

    Args:
        run: the run's folder; None where a server answers the problems of a recipe.
        problems: problems of the split, from its first; null takes the run's own number.
        samples: answers to each.
        k: of pass@k, `1,4,16`; null takes powers of four up to `samples`.
        checkpoint: a checkpoint of the run; null takes the finished policy, or the newest one.
        split: `heldout` or `train`.
        seed: of the sampling; null takes the run's, whose first answers are those of its own
            evaluation.

    Raises:
        ValueError: a value outside its range; names the option.
    """

    run: str | None
    problems: int | None = None
    samples: int = 16
    k: str | None = None
    checkpoint: str | None = None
    split: str = "heldout"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("problems", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: expected a count >= 1, got {value}")
        if self.split not in ("heldout", "train"):
            raise ValueError(f"--split: expected heldout or train, got {self.split!r}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"--seed: expected a number >= 0, got {self.seed}")
        self.ks()

    def ks(self) -> list[int]:
        """The k of pass@k, in order."""
        if self.k is None:
            return [4**i for i in range(20) if 4**i <= self.samples]
        texts = self.k.strip("[] ").split(",")
        good = all(re.fullmatch(r"\s*\d+\s*", text) for text in texts)
        if not good or not all(1 <= int(text) <= self.samples for text in texts):
            raise ValueError(
                f"--k: expected counts from 1 to --samples {self.samples}, as in 1,4,16, "
                f"got {self.k!r}"
            )
        return sorted({int(text) for text in texts})


def prepared(arguments: list[str]) -> RunEvaluation | ServerEvaluation:
    """The evaluation that these arguments ask for, checked, its policy loaded.

    Args:
        arguments: of the command line, after `eval`.

    Returns:
        An evaluation whose `run` is next.

    Raises:
        ValueError, ArgumentError: an argument is wrong, the run has no policy yet, or the server
            does not serve the model.
        ConnectionError: the server does not answer.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="trimtab-rl eval",
        description="Samples a run's policy, or a server's model on the run's task: pass@k, "
        "majority vote, reward and length, by difficulty; writes RUN/eval-*.json (without a RUN "
        "./eval-*.json).",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("run", nargs="?", type=str | None, help="the run's folder")
    parser.add_class_arguments(Options, None, skip={"run"})
    parser.add_class_arguments(ServerOptions, None, skip={"chat"})
    text = "asks /v1/chat/completions, each text as a user's message; else /v1/completions"
    parser.add_argument("--chat", action="store_true", help=text)
    parsed = vars(parser.parse_args(arguments))
    asked = ServerOptions(**{f.name: parsed.pop(f.name) for f in fields(ServerOptions)})
    if asked.server is not None:
        return ServerEvaluation(Options(**parsed), asked)
    if parsed["run"] is None:
        raise ValueError("eval: expected a run folder, got none")
    options = Options(**parsed)
    RunFolder.existing(options.run)  # before the directory changes
    checkpoint = None if options.checkpoint is None else str(Path(options.checkpoint).resolve())
    config, trainer, folder, _ = parse(make_parser(), ["--resume", options.run])
    return RunEvaluation(options, config, RunFolder(Path(folder)), checkpoint, trainer)


class RunEvaluation:
    """A run's policy, ready to be sampled.

    Args:
        options: what is asked.
        config: of the run.
        folder: of the run.
        checkpoint: to take the weights from, or None.
        trainer: options of the run's trainer, which say whether it was kept on the CPU.

    Raises:
        ValueError: the run has no policy yet, or the checkpoint is not the run's.
    """

    def __init__(
        self,
        options: Options,
        config: RLConfig,
        folder: RunFolder,
        checkpoint: str | None,
        trainer: dict[str, Any],
    ) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.options, self.config, self.folder = options, config, folder
        if config.rollout.engine == "vllm":
            refuse_missing_vllm()
        self.problems = options.problems or config.evaluation.problems or 128
        torch.set_num_threads(config.threads or fastest_threads(torch.get_num_threads()))
        self.source, self.update, self.policy, tokenizer = _policy(config, folder, checkpoint)
        if torch.cuda.is_available() and trainer.get("accelerator") != "cpu":
            self.policy.to("cuda")
        self.collector = Collector(config, config.task, tokenizer)

    def run(self) -> None:
        """Samples, prints the figures, and writes them into the run's folder.

        Raises:
            SystemExit: 3, after a line that says why, where the engine failed.
        """
        options = self.options
        print(
            f"{self.source}: {options.samples} answers to each of {self.problems} "
            f"{options.split} problems",
            flush=True,
        )
        started = time.time()
        try:
            groups = self._groups()
        except Stopped as why:
            print(f"trimtab-rl: stopped: {why}", file=sys.stderr, flush=True)
            raise SystemExit(3) from None
        finally:
            self.collector.close()
        stored = {
            "policy": self.source,
            "update": self.update,
            "split": options.split,
            "options": asdict(options) | {"problems": self.problems, "k": options.ks()},
            "seconds": round(time.time() - started, 2),
            "success": f"reward > {SUCCESS}",
            **evaluation_result(groups, options.ks(), self.config.task),
        }
        store_evaluation(stored, self.folder.path)

    def _groups(self) -> list[ScoredGroup]:
        seed = self.config.seed if self.options.seed is None else self.options.seed
        engine = make_engine(self.config.rollout, base_view(self.policy), self.folder.path)
        groups: list[ScoredGroup] = []
        chunk = max(1, self.config.rollout.max_rows // self.options.samples)
        told = time.monotonic()
        try:
            engine.update_weights(full_parameters(self.policy), self.update)
            for first in range(0, self.problems, chunk):
                numbers = range(first, min(first + chunk, self.problems))
                groups += self.collector.collect(
                    engine,
                    self.options.split,
                    numbers,
                    lambda number: stable_seed(seed, self.options.split, number),
                    n=self.options.samples,
                    tree=None,  # answers that share segments are not independent
                ).groups
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    print(f"{len(groups)}/{self.problems} problems", flush=True)
        finally:
            engine.close()
        return groups


def _policy(
    config: RLConfig, folder: RunFolder, checkpoint: str | None
) -> tuple[str, int, Any, Any]:
    """Where the policy comes from, its update, the model, the tokenizer."""
    finished = checkpoint is None and folder.finished(config.updates)
    if finished and folder.policy.is_dir():
        model, tokenizer = load_policy(PolicyConfig(path=str(folder.policy)), config.task)
        return str(folder.policy), config.updates, model, tokenizer
    path = folder.newest_checkpoint() if checkpoint is None else Path(checkpoint)
    if path is None:
        raise ValueError(
            f"eval: expected a run with a policy or a checkpoint, {folder.path} has none"
        )
    if not path.is_file():
        raise ValueError(f"--checkpoint: expected a checkpoint's file, {path} is none")
    try:
        update = updates_of(path)
    except ValueError:
        raise
    except Exception as broken:  # whatever unpickling another file may raise
        raise ValueError(
            f"--checkpoint: expected a checkpoint of the run, cannot read {path}: "
            f"{type(broken).__name__}"
        ) from broken
    model, tokenizer = load_policy(config.policy, config.task)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    stored = checkpoint["state_dict"]
    weights = {n.removeprefix("policy."): t for n, t in stored.items() if n.startswith("policy.")}
    if config.policy.lora is not None:
        base = checkpoint["trimtab"].get("base")
        if base is not None:
            refuse_other_base(base, fingerprint(model), config.policy.path)
        add_adapters(model, config.policy.lora, 0)
        frozen = {n: t for n, t in model.state_dict().items() if not is_adapter(n)}
        weights = frozen | weights
    own = model.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(f"--checkpoint: {path} does not fit the run's policy: {wrong[0]}")
    model.load_state_dict(weights)
    return str(path), update, model, tokenizer
