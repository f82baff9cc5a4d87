"""A run of `trimtab-rl` small enough for a test: every part of the pack on, about 0.05 s an update.

The policy is a random two-layer Llama over characters; the reward is the number of digits that it
writes, so every group has rollouts of different reward and length and every update a gradient.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

TINY: dict[str, Any] = {
    "task": {
        "class_path": "trimtab.rl.tasks.JsonLinesTask",
        "init_args": {
            "path": "prompts.jsonl",
            "reward": "reward_functions:digits_written",
            "stop": ";",
        },
    },
    "policy": {"path": "tiny-policy"},
    "updates": 24,
    "threads": 1,
    "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 24},
    "update": {
        "lr": 3e-3,
        "weight_decay": 0.01,
        "pruning": {"rho": 0.01},
        "trust_region": {},
        "length_rate": {"warmup": 2, "ratio": 1.02, "smoothing": 0.0, "period_factor": 1.0},
    },
    "evaluation": {"problems": 4, "samples": 2},
    "record": {"checkpoint_every": 4},
    "trainer": {"accelerator": "cpu", "devices": 1},
}


METHODS: dict[str, list[str]] = {
    "reval": [
        "--update.loss=reval",
        "--update.reval.beta=0.5",
        "--update.replay={size: 40, updates: 2}",
        "--update.reference={reset_every: 2}",
    ],
    "remax-knapsack": [
        "--update.advantage=remax",
        "--problems=4",
        "--rollout.budget={low: 2, high: 9, threshold: 0.2}",
    ],
    "reinforce_pp-kl": ["--update.advantage=reinforce_pp", "--update.reference={kl: 0.5}"],
    "imitation": ["--update.loss=imitation", "--teacher.path=tiny-teacher"],
    "asynchronous": ["--rollout.asynchronous=true", "--update.loss=ppo_clip"],
    "tree": ["--update.advantage=tree", "--rollout.tree={segment: 3}"],
}
"""Arguments that switch a method of the family on."""


def make_policy(folder: Path, seed: int = 0) -> None:
    """A random policy and its tokenizer in the transformers format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.rl.warmup import character_tokenizer

    tokenizer = character_tokenizer("0123456789abcdef;", 32)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The tiny recipe with dotted changes, its policy and its prompts, in `folder`."""
    if not (folder / "tiny-policy").exists():
        make_policy(folder / "tiny-policy")
        lines = [json.dumps({"prompt": f"{i % 10}ab{i * 7 % 10}c"}) for i in range(40)]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
    recipe = copy.deepcopy(TINY)
    for key, value in (changes or {}).items():
        node = recipe
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(
    arguments: list[str | Path], folder: Path, module: str = "trimtab.rl"
) -> subprocess.Popen[str]:
    """`python -m trimtab.rl` with these arguments, in `folder`; tests/ is importable."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)  # the CPU path is what a user without a GPU runs
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Shells without job control start `pytest &` with Ctrl-C ignored; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(arguments: list[str | Path], folder: Path, timeout: float = 240) -> str:
    """The output of a run that must end well."""
    process = start(arguments, folder)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def run_here(arguments: list[str | Path], folder: Path) -> str:
    """`run` in this process, which has imported everything: that takes longer than a run."""
    from trimtab.rl.cli import main

    output = io.StringIO()
    logged = logging.StreamHandler(output)
    logger = logging.getLogger("trimtab")
    logger.addHandler(logged)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(output):
            main([str(argument) for argument in arguments])
    finally:
        logger.removeHandler(logged)
    return output.getvalue()


def metrics_of(run_folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the wall times."""
    timed = ("time/", "prefix/seconds_")
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
