"""GRPO on the demo's task: trimtab-rl's loop against TRL's GRPOTrainer, same model, task and rule.

    python benchmarks/grpo_against_trl.py --seeds 0 1 2

Both train the demo's base policy (0.43 M parameters, fp32) on the same prompts in the same order:
8 prompts x 16 rollouts of at most 64 tokens, GRPO with PPO's clip, mean over each response, AdamW,
one step a batch. Each run is a process of its own, the two providers in turn. Measured: wall time
until the mean reward of five updates in a row reaches the target, seconds and tokens of rollouts
and updates, resident memory at its peak, and how much of it came after the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from demo_seeds import cpu_name

RESULT = Path(__file__).parent / "results" / "grpo_against_trl.json"
TARGET, WINDOW = 0.8, 5
TASK = {"min_terms": 2, "max_terms": 5, "shots": 8}


def main() -> None:
    """Entry point; with --provider the worker of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--provider", choices=("trimtab", "trl"))
    parser.add_argument("--base")
    arguments = parser.parse_args()
    if arguments.provider is not None:
        run = with_trimtab if arguments.provider == "trimtab" else with_trl
        print("RESULT " + json.dumps(run(arguments)))
        return
    base = base_policy()
    rows = []
    for seed in arguments.seeds:
        for provider in ("trimtab", "trl"):
            rows.append(worker(provider, base, seed, arguments))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "rewards"}), flush=True)
    record = {
        "command": " ".join(["python", "benchmarks/grpo_against_trl.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores, {cpu_name()}",
        "versions": {n: version(n) for n in ("trimtab", "torch", "transformers", "trl")},
        "target": TARGET,
        "rows": rows,
        "trimtab_over_trl": ratios(rows),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["trimtab_over_trl"], indent=1))


def base_policy() -> str:
    """The demo's base, made once."""
    from trimtab.rl import ChainSumTask, Styles, WarmupConfig, warm_up

    styles = Styles(worked=0.2, checked=0.1)
    task = ChainSumTask(**TASK, styles=styles)
    warmup = WarmupConfig(reasoning_steps=800, mixture_steps=120)
    return str(warm_up(task, warmup, []).resolve())


def worker(provider: str, base: str, seed: int, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--provider", provider, "--base", base]
    command += ["--seeds", str(seed), "--updates", str(arguments.updates)]
    command += ["--threads", str(arguments.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"{provider}, seed {seed}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return {"provider": provider, "seed": seed, **json.loads(found[-1].removeprefix("RESULT "))}


def result(
    started: float, loaded_mb: float, ends: list[float], rewards: list[float], **times: list[float]
) -> dict:
    """What a run gives, from the time and the mean reward at the end of each update."""
    reached = None
    for i in range(WINDOW, len(rewards) + 1):
        if sum(rewards[i - WINDOW : i]) / WINDOW >= TARGET:
            reached = ends[i - 1] - started
            break
    peak = peak_mb()
    return {
        "seconds_to_target": reached,
        "seconds": ends[-1] - started,
        "seconds_per_update": median(b - a for a, b in zip(ends, ends[1:], strict=False)),
        "peak_mb": peak,
        "peak_above_loaded_mb": peak - loaded_mb,
        "reward_last_5": sum(rewards[-5:]) / 5,
        **{name: sum(values) for name, values in times.items()},
        "rewards": [round(reward, 4) for reward in rewards],
    }


def ratios(rows: list[dict]) -> dict[str, float | None]:
    """Medians over the seeds of ours over theirs."""
    found: dict[str, float | None] = {}
    for name in (
        "seconds_to_target", "seconds_per_update", "peak_mb", "peak_above_loaded_mb",
        "seconds_per_rollout_token", "seconds_per_update_token",
    ):  # fmt: skip
        pairs = {}
        for row in rows:
            value = row.get(name)
            if name == "seconds_per_rollout_token":
                value = row["rollout_seconds"] / row["tokens"]
            elif name == "seconds_per_update_token":
                value = row["update_seconds"] / row["tokens"]
            pairs.setdefault(row["seed"], {})[row["provider"]] = value
        both = [p["trimtab"] / p["trl"] for p in pairs.values() if None not in p.values()]
        found[name] = median(both) if both else None
    return found


def peak_mb() -> float:
    """Most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def with_trimtab(arguments: argparse.Namespace) -> dict:
    import pytorch_lightning as pl

    from trimtab.rl.cli import make_parser, parse
    from trimtab.rl.run import Run

    ends: list[float] = []
    rows: list[dict] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            ends.append(time.perf_counter())
            rows.append(dict(module.last_metrics))

    with tempfile.TemporaryDirectory() as folder:
        config, options, resume, text = parse(
            make_parser(),
            [
                *("--config", "grpo", "--run_dir", f"{folder}/run", "--updates"),
                *(str(arguments.updates), "--threads", str(arguments.threads)),
                *("--seed", str(arguments.seeds[0]), "--evaluation.problems", "0"),
                *("--policy.warmup", "null", "--policy.path", arguments.base),
                *("--rollout.dtype", "float32", "--update.optimizer", "adamw"),
                *("--trainer.enable_progress_bar", "false"),
            ],
        )
        options["callbacks"] = [Clock()]
        run = Run(config, options, resume, text)
        run.prepare()
        loaded = peak_mb()
        started = time.perf_counter()
        run.train()
        return result(
            started,
            loaded,
            ends,
            [row["reward"] for row in rows],
            rollout_seconds=[row["time/rollout"] for row in rows],
            update_seconds=[row["time/update"] for row in rows],
            tokens=[row["rollouts"] * row["length"] for row in rows],
        )


def with_trl(arguments: argparse.Namespace) -> dict:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trimtab.rl import ChainSumTask, Styles

    torch.set_num_threads(arguments.threads)
    task = ChainSumTask(**TASK, styles=Styles(worked=0.2, checked=0.1))
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    tokenizer.eos_token = task.stop  # what ends an answer
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    score = task.reward_function()
    problems = [task.problem("train", i) for i in range(8 * arguments.updates)]
    rewards, ends, tokens, generating = [], [], [], []

    def reward(prompts, completions, completion_ids, entry, **_):
        texts = [text.removesuffix(task.stop) for text in completions]
        found = score(
            prompts=prompts,
            completions=texts,
            completion_ids=completion_ids,
            entry=[json.loads(e) for e in entry],
        )
        rewards.append(sum(found) / len(found))
        tokens.append(sum(map(len, completion_ids)))
        return found

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *inputs, **options):
            started = time.perf_counter()
            found = super()._generate_single_turn(*inputs, **options)
            generating.append(time.perf_counter() - started)
            return found

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model,
            reward,
            args=GRPOConfig(
                folder,
                max_steps=arguments.updates,
                per_device_train_batch_size=128,
                num_generations=16,
                max_completion_length=64,
                temperature=1.0,
                learning_rate=2e-4,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                adam_beta1=0.9,
                adam_beta2=0.95,
                weight_decay=0.0,
                max_grad_norm=1.0,
                beta=0.0,
                epsilon=0.2,
                loss_type="grpo",
                scale_rewards="group",
                shuffle_dataset=False,
                seed=arguments.seeds[0],
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(
                [
                    {"prompt": p.prompt, "entry": json.dumps(p.columns["entry"], default=str)}
                    for p in problems
                ]
            ),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        loaded = peak_mb()
        started = time.perf_counter()
        trainer.train()
        between = [b - a for a, b in zip([started, *ends], ends, strict=False)]
        return result(
            started,
            loaded,
            ends,
            rewards,
            rollout_seconds=generating,
            update_seconds=[b - g for b, g in zip(between, generating, strict=True)],
            tokens=tokens,
        )


if __name__ == "__main__":
    main()
