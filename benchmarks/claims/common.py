"""What the claims share: how an outcome is recorded, and the demo's warmed-up policy.

    OMP_NUM_THREADS=1 python benchmarks/claims/NAME.py            # prints; writes results/claims
    OMP_NUM_THREADS=1 python benchmarks/claims/NAME.py --quick    # smaller; writes nothing

Runs of RL are those of the packaged recipe `chain_sum_cpu`, all from the base policy of its seed 0,
which is warmed up once (a minute or two) and kept in .cache/trimtab.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from transformers import logging as transformers_logging

from trimtab.rl import Request, RLModule, RolloutBatch, Sampling, TransformersEngine, collate
from trimtab.rl.cli import make_parser, parse
from trimtab.rl.config import RLConfig
from trimtab.rl.data import ProblemData
from trimtab.rl.evaluation import evaluate
from trimtab.rl.run import load_policy
from trimtab.rl.seeds import stable_seed

# a script finds its own folder only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measure import ROOT, commit, device_name, versions

RESULTS = ROOT / "benchmarks" / "results" / "claims"
Rows = list[dict[str, Any]]


def run_claim(
    doc: str, claim: str, experiment: Callable[[argparse.Namespace], tuple[Rows, str]], **seeds: int
) -> None:
    """Runs an experiment as a script: prints table, claim and outcome, and records them.

    Args:
        doc: the script's docstring, for --help.
        claim: of the paper, in a sentence.
        experiment: given the arguments (`quick`, and `seeds`), returns rows and the outcome:
            `holds`, `does not hold` or `in part`, then why.
        seeds: `full` and `quick` numbers of seeds.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller; writes no results")
    parser.add_argument("--seeds", type=int, default=None, help="how many, from 0")
    arguments = parser.parse_args()
    if arguments.seeds is None:
        arguments.seeds = seeds.get("quick", 1) if arguments.quick else seeds.get("full", 1)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    started = time.time()
    rows, outcome = experiment(arguments)
    seconds = time.time() - started
    print_rows(rows)
    print(f"claim: {claim}\noutcome: {outcome}\n{seconds:.0f} s")
    if arguments.quick:
        return
    name = Path(sys.argv[0]).stem
    record = {
        "claim": claim,
        "outcome": outcome,
        "command": " ".join(["python", f"benchmarks/claims/{name}.py", *sys.argv[1:]]),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(("trimtab", "torch", "transformers")),
        "commit": commit("optim", "stability", "rl", "triton_kernels"),
        "rows": _plain(rows),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def print_rows(rows: Rows) -> None:
    """Rows with the same keys as one table; other keys start another one. Lists are not shown."""
    columns: list[str] = []
    for row in rows:
        shown = [name for name, value in row.items() if not isinstance(value, list | dict)]
        if shown != columns:
            columns = shown
            print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        print("| " + " | ".join(_text(row[name]) for name in columns) + " |")
    print()


def _plain(value: Any) -> Any:
    """NaN as null, which JSON has."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    x = torch.tensor(list(values), dtype=torch.float64)
    error = x.std() / len(x) ** 0.5 if len(x) > 1 else torch.tensor(torch.nan)
    return float(x.mean()), float(error)


def demo_config(*arguments: str) -> RLConfig:
    """The recipe `chain_sum_cpu` with some fields changed, as `trimtab-rl` reads them."""
    own = ["--config", "chain_sum_cpu", "--policy.warmup.cache_dir", str(ROOT / ".cache/trimtab")]
    return parse(make_parser(), [*own, "--threads", "1", *arguments])[0]


def base_policy() -> tuple[Any, Any]:
    """The demo's warmed-up policy, fp32, and its tokenizer."""
    config = demo_config()
    return load_policy(config.policy, config.task)


def train(
    *arguments: str, seed: int, module_class: type[RLModule] = RLModule
) -> tuple[RLModule, dict[str, Any]]:
    """A run of RL from the base policy, with problems and rollouts of its own seed.

    Args:
        arguments: changes of the recipe.
        seed: of the run.
        module_class: may override parts of the loop.

    Returns:
        The module after its last update, and `accuracy` (held-out, sampled by an engine without
        mismatch), `length`, and `metrics`, the list of what each update logged.
    """
    seeds = ["--seed", str(seed), "--task.init_args.seed", str(seed)]
    config = demo_config(*seeds, *arguments)
    module = module_class(config, *base_policy(), config.task)
    recorder = _Recorder()
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    ).fit(module, ProblemData(config))
    return module, recorder.found


class _Recorder(pl.Callback):
    def __init__(self) -> None:
        self.found: dict[str, Any] = {"metrics": []}

    def on_train_batch_end(self, trainer: Any, module: RLModule, *_: Any) -> None:
        self.found["metrics"].append(module.last_metrics)

    def on_train_end(self, trainer: Any, module: RLModule) -> None:
        if module.config.evaluation.problems:
            exact = TransformersEngine(module.policy, dtype=torch.float32)
            result = evaluate(module, exact, module.updates_done)
            self.found |= {"accuracy": result.sampled, "length": result.length}


def rollouts(
    policy: Any, tokenizer: Any, config: RLConfig, numbers: Sequence[int], n: int, **engine: Any
) -> RolloutBatch:
    """n scored rollouts of each of these training problems, in order; `engine`: its options."""
    reward, stop = config.task.reward_function(), tokenizer.encode("\n", add_special_tokens=False)
    problems = [config.task.problem("train", number) for number in numbers]
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    pruning = config.update.pruning
    sampling = Sampling(
        n=n,
        max_tokens=config.rollout.max_tokens,
        min_p=0.0 if pruning is None else pruning.rho,
        stop_token_ids=(tokenizer.eos_token_id, *stop),
    )
    groups = TransformersEngine(policy, **engine).generate(
        [
            Request(prompt, replace(sampling, seed=stable_seed("claims", number)))
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
    )
    rewards = []
    for problem, group in zip(problems, groups, strict=True):
        texts = [
            tokenizer.decode(s.token_ids[: -1 if s.finish_reason == "stop" else None])
            for s in group
        ]
        columns = {name: [value] * n for name, value in problem.columns.items()}
        rewards.append(
            reward(
                prompts=[problem.prompt] * n,
                completions=texts,
                completion_ids=[s.token_ids for s in group],
                **columns,
            )
        )
    return collate(prompts, list(numbers), groups, rewards)
